package main

import (
	"fmt"
	"html"
	"io"
	"math"
	"strings"
)

// The plot's measures, in pixels.
const (
	plotWidth  = 900
	plotLabels = 420 // the texts on the left
	plotBar    = 14
	plotGap    = 6
)

// plotRatios draws a bar for each ratio that has a bar to reach, as long as the share of it that was reached.
// The line is where a bar is reached; the thin stroke spans the rounds.
func (r *report) plotRatios(w io.Writer) error {
	const scale = (plotWidth - plotLabels - 80) / 3.0 // pixels of a ratio of 1: three times the bar is all there is space for
	var b strings.Builder
	y := 30
	for _, row := range r.Rows {
		var drawn []verdict
		for _, v := range row.Bars {
			if v.Peer != "" {
				drawn = append(drawn, v)
			}
		}
		if len(drawn) == 0 {
			continue
		}
		fmt.Fprintf(&b, "<text x='8' y='%d' font-weight='bold'>%s</text>\n", y+plotBar-3, html.EscapeString(row.Name))
		y += plotBar + plotGap
		for _, v := range drawn {
			share := func(x float64) float64 { return min(x/v.Least, 3) * scale }
			colour := "#b5483a"
			if v.Reached {
				colour = "#3a7d57"
			}
			fmt.Fprintf(&b, "<text x='%d' y='%d' text-anchor='end'>%s</text>\n", plotLabels-8, y+plotBar-3, html.EscapeString(v.Bar+" ("+titled(v.Peer)+")"))
			fmt.Fprintf(&b, "<rect x='%d' y='%d' width='%.1f' height='%d' fill='%s'/>\n", plotLabels, y, share(v.Ratio), plotBar, colour)
			fmt.Fprintf(&b, "<path d='M%.1f %d H%.1f' stroke='black'/>\n", plotLabels+share(v.Low), y+plotBar/2, plotLabels+share(v.High))
			fmt.Fprintf(&b, "<text x='%.1f' y='%d'>%.2f</text>\n", plotLabels+max(share(v.Ratio), share(v.High))+6, y+plotBar-3, v.Ratio)
			y += plotBar + plotGap
		}
		y += plotGap
	}
	line := plotLabels + scale
	_, err := fmt.Fprintf(w, "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' font-family='sans-serif' font-size='12'>\n"+
		"<rect width='100%%' height='100%%' fill='white'/>\n"+
		"<text x='%.1f' y='16' text-anchor='middle'>bar</text>\n%s"+
		"<path d='M%.1f 22 V%d' stroke='#333' stroke-dasharray='4 3'/>\n</svg>\n", plotWidth, y+10, line, b.String(), line, y)
	return err
}

// The measures of one curve's panel.
const (
	panelWidth  = 430
	panelHeight = 220
	panelMargin = 50
)

// plotCurves draws a panel for each curve, two beside each other: a point for each median, a stroke from the
// least to the greatest, the horizontal axis by factors of two.
func (r *report) plotCurves(w io.Writer) error {
	var b strings.Builder
	curves := r.curves()
	for i, curve := range curves {
		fmt.Fprintf(&b, "<g transform='translate(%d %d)'>\n%s</g>\n", i%2*panelWidth, i/2*panelHeight, panel(curve))
	}
	_, err := fmt.Fprintf(w, "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' font-family='sans-serif' font-size='11'>\n"+
		"<rect width='100%%' height='100%%' fill='white'/>\n%s</svg>\n", 2*panelWidth, (len(curves)+1)/2*panelHeight, b.String())
	return err
}

// panel draws one curve. Its vertical axis begins at 0.
func panel(curve []rowResult) string {
	const left, bottom, top = panelMargin, panelHeight - 40, 36
	first, last := math.Log2(curve[0].X), math.Log2(curve[len(curve)-1].X)
	most := 0.0
	for _, p := range curve {
		most = max(most, p.of(ours).Max)
	}
	x := func(v float64) float64 {
		return left + (math.Log2(v)-first)/max(last-first, 1)*(panelWidth-panelMargin-30)
	}
	y := func(v float64) float64 { return bottom - v/most*(bottom-top) }
	var b, line strings.Builder
	fmt.Fprintf(&b, "<text x='%d' y='16' font-weight='bold'>%s</text>\n<text x='%d' y='30'>%s</text>\n",
		left, html.EscapeString(curve[0].Name), left, html.EscapeString(curve[0].Unit))
	for _, share := range []float64{0, 0.5, 1} {
		fmt.Fprintf(&b, "<path d='M%d %.1f H%d' stroke='#ddd'/><text x='%d' y='%.1f' text-anchor='end'>%s</text>\n",
			left, y(share*most), panelWidth-20, left-4, y(share*most)+4, digits(share*most))
	}
	for i, p := range curve {
		c := p.of(ours)
		fmt.Fprintf(&line, "%c%.1f %.1f ", "ML"[min(i, 1)], x(p.X), y(c.Median))
		fmt.Fprintf(&b, "<path d='M%.1f %.1f V%.1f' stroke='black'/><circle cx='%.1f' cy='%.1f' r='3'/><text x='%.1f' y='%d' text-anchor='middle'>%g</text>\n",
			x(p.X), y(c.Min), y(c.Max), x(p.X), y(c.Median), x(p.X), bottom+14, p.X)
	}
	fmt.Fprintf(&b, "<path d='%s' fill='none' stroke='#3a7d57'/>\n<text x='%d' y='%d' text-anchor='end'>%s</text>\n",
		line.String(), panelWidth-20, bottom+28, html.EscapeString(curve[0].Axis))
	return b.String()
}
