package picture

import (
	"bufio"
	"fmt"
	"image/color"
	"io"
	"unicode/utf8"
)

// A Panel is a strip with what is written beside it.
type Panel struct {
	Title   string
	Strip   *Strip
	Columns int                    // cells a row, > 0
	Label   func(off int64) string // formats a byte offset; nil: no labels
}

// rows is the number of rows.
func (p Panel) rows() int { return (p.Strip.cells + p.Columns - 1) / p.Columns }

// label is the text before a row.
func (p Panel) label(row int) string {
	if p.Label == nil {
		return ""
	}
	off, _ := p.Strip.Bounds(row * p.Columns)
	return p.Label(off)
}

// margin is the width of the longest label.
func (p Panel) margin() int {
	n := 0
	for row := range p.rows() {
		n = max(n, utf8.RuneCountInString(p.label(row)))
	}
	return n
}

// Letters writes the panel in plain ASCII, a row a line, with a legend.
func (p Panel) Letters(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "%s\n", p.Title)
	margin := p.margin()
	for row := range p.rows() {
		fmt.Fprintf(b, "%*s  ", margin, p.label(row))
		for i := row * p.Columns; i < min((row+1)*p.Columns, p.Strip.cells); i++ {
			b.WriteByte(p.Strip.Letter(i))
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(b, "%*s", margin, "")
	for c, class := range p.Strip.classes {
		fmt.Fprintf(b, "  %c %s %s", class.Letter, class.Name, p.percent(c))
	}
	b.WriteByte('\n')
	return b.Flush()
}

func (p Panel) percent(class int) string { return Percent(p.Strip.Total(class), p.Strip.length) }

// upperHalf is a cell and the one below it: the first in the foreground's colour, the other in the
// background's. Characters are about twice as high as wide, so cells become squares.
const upperHalf = "▀"

// Colours writes the panel for a terminal with 256 colours, two rows a line, with a legend.
func (p Panel) Colours(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "%s\n", p.Title)
	margin := p.margin()
	for row := 0; row < p.rows(); row += 2 {
		fmt.Fprintf(b, "%*s  ", margin, p.label(row))
		set := ""
		for i := row * p.Columns; i < min((row+1)*p.Columns, p.Strip.cells); i++ {
			codes := fmt.Sprintf("\x1b[0;38;5;%dm", terminalColour(p.Strip.Colour(i)))
			if below := i + p.Columns; below < p.Strip.cells {
				codes = fmt.Sprintf("\x1b[38;5;%d;48;5;%dm", terminalColour(p.Strip.Colour(i)), terminalColour(p.Strip.Colour(below)))
			}
			if codes != set {
				b.WriteString(codes)
				set = codes
			}
			b.WriteString(upperHalf)
		}
		b.WriteString("\x1b[0m\n")
	}
	fmt.Fprintf(b, "%*s", margin, "")
	for c, class := range p.Strip.classes {
		fmt.Fprintf(b, "  \x1b[38;5;%dm■\x1b[0m %s %s", terminalColour(class.Colour), class.Name, p.percent(c))
	}
	b.WriteByte('\n')
	return b.Flush()
}

// terminalColour is the nearest of the colours that terminals with 256 agree upon: a cube of 6×6×6 from 16 on,
// and 24 greys from 232 on.
func terminalColour(c color.RGBA) int {
	levels := [6]int{0, 95, 135, 175, 215, 255}
	nearest := func(x uint8) (index int) {
		for i, l := range levels {
			if distance(int(x), l) < distance(int(x), levels[index]) {
				index = i
			}
		}
		return index
	}
	r, g, b := nearest(c.R), nearest(c.G), nearest(c.B)
	cube := distance(int(c.R), levels[r]) + distance(int(c.G), levels[g]) + distance(int(c.B), levels[b])
	grey := min(max((int(c.R)+int(c.G)+int(c.B))/3-3, 0)/10, 23)
	level := 8 + 10*grey
	if distance(int(c.R), level)+distance(int(c.G), level)+distance(int(c.B), level) < cube {
		return 232 + grey
	}
	return 16 + 36*r + 6*g + b
}

func distance(a, b int) int { return (a - b) * (a - b) }
