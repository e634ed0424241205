package picture

import (
	"bufio"
	"encoding/xml"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"strings"
)

// Sizes in pixels.
const (
	cellSide   = 10 // with a gap of one pixel at the right and below
	gap        = 1
	border     = 12
	lineHeight = 18
	fontSize   = 12
	letterWide = 7 // of a character, about
)

var paper = color.RGBA{255, 255, 255, 255}

// PNG writes the strips of the panels, one below the other. An image has no letters: titles, labels and
// legend are what SVG is for.
func PNG(w io.Writer, panels ...Panel) error {
	width, height := 0, border
	for _, p := range panels {
		width = max(width, min(p.Columns, p.Strip.cells)*cellSide)
		height += p.rows()*cellSide + border
	}
	img := image.NewRGBA(image.Rect(0, 0, width+2*border, height))
	draw.Draw(img, img.Bounds(), image.NewUniform(paper), image.Point{}, draw.Src)
	top := border
	for _, p := range panels {
		for i := range p.Strip.cells {
			x, y := border+i%p.Columns*cellSide, top+i/p.Columns*cellSide
			cell := image.Rect(x, y, x+cellSide-gap, y+cellSide-gap)
			draw.Draw(img, cell, image.NewUniform(p.Strip.Colour(i)), image.Point{}, draw.Src)
		}
		top += p.rows()*cellSide + border
	}
	return png.Encode(w, img)
}

// SVG writes the panels with their titles, labels and legends. Pointing at a cell shows its range and its classes.
func SVG(w io.Writer, panels ...Panel) error {
	b := bufio.NewWriter(w)
	width, height := 0, border
	for _, p := range panels {
		width = max(width, p.margin()*letterWide+p.Columns*cellSide, len(p.Title)*letterWide)
		height += p.svgHeight()
	}
	width += 3 * border
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="%d">`+"\n",
		width, height, width, height, fontSize)
	fmt.Fprintf(b, `<rect width="%d" height="%d" fill="%s"/>`+"\n", width, height, hexColour(paper))
	top := border
	for _, p := range panels {
		p.svg(b, top)
		top += p.svgHeight()
	}
	b.WriteString("</svg>\n")
	return b.Flush()
}

// svgHeight is the height of title, rows, legend and the gap to the next panel.
func (p Panel) svgHeight() int {
	return lineHeight + p.rows()*cellSide + len(p.Strip.classes)*lineHeight + 2*border
}

func (p Panel) svg(b *bufio.Writer, top int) {
	svgText(b, border, top+fontSize, "start", p.Title)
	left := border + p.margin()*letterWide + border/2
	top += lineHeight
	for row := range p.rows() {
		y := top + row*cellSide
		if row%2 == 0 { // a line of text is higher than a row
			svgText(b, left-border/2, y+cellSide-1, "end", p.label(row))
		}
		end := min((row+1)*p.Columns, p.Strip.cells)
		for i := row * p.Columns; i < end; {
			n := p.alike(i, end)
			x := left + i%p.Columns*cellSide
			fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"><title>%s</title></rect>`+"\n",
				x, y, n*cellSide-gap, cellSide-gap, hexColour(p.Strip.Colour(i)), escaped(p.tip(i, n)))
			i += n
		}
	}
	y := top + p.rows()*cellSide + border/2
	for c, class := range p.Strip.classes {
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", left, y+3, cellSide, cellSide, hexColour(class.Colour))
		svgText(b, left+2*cellSide, y+fontSize, "start", class.Name+" "+p.percent(c))
		y += lineHeight
	}
}

// alike counts the cells from i on, before end, that are wholly of the same class; a mixed cell counts alone.
func (p Panel) alike(i, end int) int {
	class, share := p.Strip.shown(i)
	n := 1
	for ; share == 1 && i+n < end; n++ {
		if c, s := p.Strip.shown(i + n); c != class || s != 1 {
			break
		}
	}
	return n
}

// tip describes the range of n cells from i on, and the classes of the first one.
func (p Panel) tip(i, n int) string {
	off, _ := p.Strip.Bounds(i)
	last, length := p.Strip.Bounds(i + n - 1)
	words := []string{fmt.Sprintf("bytes %d-%d:", off, last+length-1)}
	for c, class := range p.Strip.classes {
		if share := p.Strip.Share(i, c); share > 0 {
			words = append(words, fmt.Sprintf("%s %s", class.Name, Percent(int64(share*1e6), 1e6)))
		}
	}
	return strings.Join(words, " ")
}

func svgText(b *bufio.Writer, x, y int, anchor, text string) {
	if text != "" {
		fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="%s">%s</text>`+"\n", x, y, anchor, escaped(text))
	}
}

// escaped makes any bytes, such as a path, fit for XML.
func escaped(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}

func hexColour(c color.RGBA) string { return fmt.Sprintf("#%02x%02x%02x", c.R, c.G, c.B) }
