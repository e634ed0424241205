// Package picture draws what is where on a disk: a strip of cells, each standing for an equal range of the disk and
// coloured by what that range holds, folded into rows like text.
//
//	   0  ....ddD.............
//	1 GiB ..d.....DDDDd.......
//
// A Strip counts, for every cell, the share of its bytes of each class. One strip can be drawn as letters for a log, as
// half blocks for a terminal with colours, as a PNG and as an SVG. A cell often stands for gigabytes: small ranges must
// still be visible, so a single chunk is drawn stronger than its share.
package picture

import (
	"fmt"
	"image/color"
	"math/bits"
)

// A Class is one kind of content.
type Class struct {
	Name   string
	Letter byte // lower case: where it is less than half of a cell; the capital where it is more
	Colour color.RGBA
}

// A Strip counts the bytes of each class in each of its cells. The first class is the background: bytes that were not
// added. Later classes are more important: where a cell can show only one, the last one present is shown. A Strip may
// be drawn concurrently, and not while extents are added.
type Strip struct {
	length  int64
	classes []Class
	cells   int
	bytes   []int64 // cells × classes without the ground
}

// NewStrip returns a strip for length ≥ 0 bytes with the given number of cells, fewer when there are fewer bytes, and
// at least one. It needs 8 bytes a cell and class.
func NewStrip(length int64, cells int, classes ...Class) *Strip {
	if length < 0 || cells < 1 || len(classes) < 1 {
		panic(fmt.Sprintf("picture: strip of %d bytes, %d cells, %d classes", length, cells, len(classes)))
	}
	cells = int(max(1, min(int64(cells), length)))
	return &Strip{length, classes, cells, make([]int64, cells*(len(classes)-1))}
}

// Cells returns the number of cells.
func (s *Strip) Cells() int { return s.cells }

// Classes returns the classes, the ground first.
func (s *Strip) Classes() []Class { return s.classes }

// Bounds returns the range of cell i. Cells differ by one byte at most.
func (s *Strip) Bounds(i int) (off, n int64) {
	off = mulDiv(int64(i), s.length, int64(s.cells))
	return off, mulDiv(int64(i)+1, s.length, int64(s.cells)) - off
}

// mulDiv is a·b/c without overflow, for a ≤ c.
func mulDiv(a, b, c int64) int64 {
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	q, _ := bits.Div64(hi, lo, uint64(c))
	return int64(q)
}

// Add adds n bytes at off of a class other than the background. Bytes outside the strip are ignored. The extents added
// must not overlap; where they do, the shares are too large.
func (s *Strip) Add(off, n int64, class int) {
	if class < 1 || class >= len(s.classes) {
		panic(fmt.Sprintf("picture: class %d of %d", class, len(s.classes)))
	}
	if off < 0 {
		n, off = n+off, 0
	}
	n = min(n, s.length-off)
	if n <= 0 {
		return
	}
	i := int(mulDiv(off, int64(s.cells), s.length)) // or one less than the cell, by the rounding
	for ; n > 0; i++ {
		begin, length := s.Bounds(i)
		if k := min(n, begin+length-off); k > 0 {
			s.bytes[i*(len(s.classes)-1)+class-1] += k
			off, n = off+k, n-k
		}
	}
}

// Bytes returns how many bytes of cell i are of the class.
func (s *Strip) Bytes(i, class int) int64 {
	if class > 0 {
		return s.bytes[i*(len(s.classes)-1)+class-1]
	}
	_, rest := s.Bounds(i)
	for c := 1; c < len(s.classes); c++ {
		rest -= s.Bytes(i, c)
	}
	return max(rest, 0)
}

// Share returns which part of cell i is of the class: 0 to 1.
func (s *Strip) Share(i, class int) float64 {
	_, n := s.Bounds(i)
	return float64(s.Bytes(i, class)) / float64(max(n, 1))
}

// Total returns how many bytes of the strip are of the class.
func (s *Strip) Total(class int) (sum int64) {
	for i := range s.cells {
		sum += s.Bytes(i, class)
	}
	return sum
}

// shown is the most important class in cell i, and its share.
func (s *Strip) shown(i int) (class int, share float64) {
	for c := len(s.classes) - 1; c > 0; c-- {
		if x := s.Share(i, c); x > 0 {
			return c, x
		}
	}
	return 0, 1
}

// Letter returns cell i as a character: the ground's letter where there is nothing else.
func (s *Strip) Letter(i int) byte {
	class, share := s.shown(i)
	letter := s.classes[class].Letter
	if class > 0 && share >= 0.5 && 'a' <= letter && letter <= 'z' {
		letter -= 'a' - 'A'
	}
	return letter
}

// leastVisible is how much of a cell's colour is not the ground's wherever there is anything.
const leastVisible = 0.35

// Colour mixes the classes of cell i. What isn't ground counts for leastVisible at least, and half of that
// is at least the most important class's.
func (s *Strip) Colour(i int) color.RGBA {
	top, share := s.shown(i)
	if top == 0 {
		return s.classes[0].Colour
	}
	ground := s.Share(i, 0)
	there := 1 - ground
	mix := mixture{}
	visible := leastVisible + (1-leastVisible)*there
	mix.add(s.classes[0].Colour, 1-visible)
	most := max(share/there, 0.5)
	mix.add(s.classes[top].Colour, visible*most)
	if others := there - share; others > 0 {
		for c := 1; c < top; c++ {
			mix.add(s.classes[c].Colour, visible*(1-most)*s.Share(i, c)/others)
		}
	} else {
		mix.add(s.classes[top].Colour, visible*(1-most))
	}
	return mix.colour()
}

// mixture adds colours up.
type mixture struct{ r, g, b, sum float64 }

func (m *mixture) add(c color.RGBA, part float64) {
	m.r += part * float64(c.R)
	m.g += part * float64(c.G)
	m.b += part * float64(c.B)
	m.sum += part
}

func (m *mixture) colour() color.RGBA {
	at := func(x float64) uint8 { return uint8(min(x/m.sum+0.5, 255)) }
	return color.RGBA{at(m.r), at(m.g), at(m.b), 255}
}

// Percent formats a share for a legend: a share that is not zero is never "0.0 %".
func Percent(part, whole int64) string {
	if part <= 0 || whole <= 0 {
		return "0 %"
	}
	p := 100 * float64(part) / float64(whole)
	switch {
	case p < 0.1:
		return "< 0.1 %"
	case p > 99.9 && part < whole:
		return "> 99.9 %"
	}
	return fmt.Sprintf("%.1f %%", p)
}
