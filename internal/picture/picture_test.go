package picture_test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"image/color"
	"image/png"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/internal/picture"
)

var (
	grey = color.RGBA{200, 200, 200, 255}
	blue = color.RGBA{0, 0, 255, 255}
	red  = color.RGBA{255, 0, 0, 255}

	classes = []picture.Class{{"free", '.', grey}, {"used", 'u', blue}, {"lost", 'x', red}}
)

func letters(s *picture.Strip) string {
	var b strings.Builder
	for i := range s.Cells() {
		b.WriteByte(s.Letter(i))
	}
	return b.String()
}

func TestLetters(t *testing.T) {
	s := picture.NewStrip(1000, 10, classes...)
	s.Add(100, 150, 1) // cell 1 whole, half of cell 2
	s.Add(310, 1, 1)
	s.Add(450, 10, 2)
	s.Add(460, 40, 1) // the rarer one is more important
	s.Add(900, 1000, 1)
	s.Add(-50, 60, 2)
	if got, want := letters(s), "xUUux....U"; got != want {
		t.Errorf("letters %q, want %q", got, want)
	}
	if s.Total(1) != 150+1+40+100 || s.Total(2) != 20 || s.Total(0) != 1000-311 {
		t.Errorf("totals %d, %d, %d", s.Total(0), s.Total(1), s.Total(2))
	}
	if s.Share(4, 0) != 0.5 || s.Share(4, 1) != 0.4 || s.Share(4, 2) != 0.1 {
		t.Errorf("shares of cell 4: %v %v %v", s.Share(4, 0), s.Share(4, 1), s.Share(4, 2))
	}
}

// Cells cover the disk without gaps, whatever its size, and what is added is found again.
func TestCellsCoverTheDisk(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		length := r.Int64N(1 << (1 + r.IntN(62)))
		s := picture.NewStrip(length, 1+r.IntN(300), classes...)
		at := int64(0)
		for i := range s.Cells() {
			off, n := s.Bounds(i)
			if off != at || n < 1 && length > 0 {
				t.Fatalf("%d bytes: cell %d is %d+%d, after byte %d", length, i, off, n, at)
			}
			at += n
		}
		if at != length {
			t.Fatalf("cells of %d bytes end at %d", length, at)
		}
		if length == 0 {
			s.Add(0, 10, 1)
			continue
		}
		off := r.Int64N(length)
		n := 1 + r.Int64N(length-off)
		s.Add(off, n, 1)
		if s.Total(1) != n {
			t.Fatalf("%d of %d bytes were added, %d found", n, length, s.Total(1))
		}
		for i := range s.Cells() {
			begin, size := s.Bounds(i)
			inside := max(0, min(begin+size, off+n)-max(begin, off))
			if want := float64(inside) / float64(size); s.Share(i, 1) != want {
				t.Fatalf("%d bytes, %d+%d added: cell %d has %v, want %v", length, off, n, i, s.Share(i, 1), want)
			}
		}
	}
}

// The smallest thing is seen, and more of it is seen more.
func TestColoursShowWhatIsSmall(t *testing.T) {
	s := picture.NewStrip(4<<40, 4, classes...)
	s.Add(0, 512, 1)
	s.Add(1<<40, 1<<39, 1)
	s.Add(2<<40, 1<<40, 1)
	s.Add(3<<40, 1<<40-512, 1)
	s.Add(4<<40-512, 512, 2)
	if c := s.Colour(2); c != blue {
		t.Errorf("a full cell is %v", c)
	}
	little, half := s.Colour(0), s.Colour(1)
	if little.R > 140 || little.R <= half.R || half.R == 0 {
		t.Errorf("a sector %v, half a cell %v, nothing %v", little, half, grey)
	}
	if c := s.Colour(3); c.R < 120 {
		t.Errorf("a lost sector in a used cell is %v", c)
	}
}

func panel(columns int) picture.Panel {
	s := picture.NewStrip(1000, 10, classes...)
	s.Add(0, 200, 1)
	s.Add(500, 10, 2)
	return picture.Panel{Title: `a "disk" & <more>` + "\xff", Strip: s, Columns: columns, Label: func(off int64) string { return fmt.Sprint(off) }}
}

func TestPanelAsLetters(t *testing.T) {
	var b bytes.Buffer
	p := panel(4)
	p.Title = "disk"
	if err := p.Letters(&b); err != nil {
		t.Fatal(err)
	}
	want := "disk\n  0  UU..\n400  .x..\n800  ..\n     . free 79.0 %  u used 20.0 %  x lost 1.0 %\n"
	if b.String() != want {
		t.Errorf("drew\n%swant\n%s", b.String(), want)
	}
}

func TestPanelInColours(t *testing.T) {
	var b bytes.Buffer
	p := panel(4)
	p.Title = "disk"
	if err := p.Colours(&b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(b.String(), "\n")
	if len(lines) != 5 || !strings.HasPrefix(lines[1], "  0  \x1b[38;5;21;48;5;") || !strings.HasPrefix(lines[2], "800  \x1b[0;38;5;251m▀▀\x1b[0m") {
		t.Errorf("drew %q", lines)
	}
	if n := strings.Count(lines[1], "▀"); n != 4 {
		t.Errorf("%d columns in %q", n, lines[1])
	}
	for _, l := range lines[1:4] {
		if !strings.Contains(l, "\x1b[0m") {
			t.Errorf("line %q leaves its colours behind", l)
		}
	}
}

func TestPNG(t *testing.T) {
	var b bytes.Buffer
	if err := picture.PNG(&b, panel(4), panel(10)); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	at := func(column, row, below int) color.Color {
		return color.RGBAModel.Convert(img.At(12+10*column+3, 12+10*row+3+below))
	}
	if at(0, 0, 0) != blue || at(2, 0, 0) != grey || at(1, 0, 42) != blue || at(9, 0, 42) != grey || at(3, 2, 0) == grey {
		t.Errorf("cells: %v %v %v %v %v", at(0, 0, 0), at(2, 0, 0), at(1, 0, 42), at(9, 0, 42), at(3, 2, 0))
	}
	if s := img.Bounds().Size(); s.X != 124 || s.Y != 76 {
		t.Errorf("size %v", s)
	}
}

// The SVG is XML whatever the title, and says what a cell is.
func TestSVG(t *testing.T) {
	var b bytes.Buffer
	if err := picture.SVG(&b, panel(4), panel(10)); err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(bytes.NewReader(b.Bytes()))
	var words []string
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if c, ok := tok.(xml.CharData); ok {
			words = append(words, string(c))
		}
	}
	text := strings.Join(words, "")
	for _, w := range []string{`a "disk" & <more>`, "bytes 0-199: used 100.0 %", "bytes 500-599: free 90.0 % lost 10.0 %", "lost 1.0 %", "400"} {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in %q", w, text)
		}
	}
}

func TestPercent(t *testing.T) {
	for want, in := range map[string][2]int64{
		"0 %": {0, 5}, "< 0.1 %": {1, 1 << 40}, "> 99.9 %": {1<<40 - 1, 1 << 40}, "100.0 %": {7, 7}, "33.3 %": {1, 3},
	} {
		if got := picture.Percent(in[0], in[1]); got != want {
			t.Errorf("%d of %d: %q, want %q", in[0], in[1], got, want)
		}
	}
}
