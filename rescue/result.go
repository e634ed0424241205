package rescue

import (
	"encoding/json"
	"fmt"
	"image/color"
	"io"
	"strings"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/picture"
)

// A Result says what was rescued, as JSON and as text.
type Result struct {
	Certain  int64    `json:"certain_bytes"`
	Doubtful int64    `json:"doubtful_bytes"`
	Lost     int64    `json:"lost_bytes"`
	Behind   int64    `json:"behind_end_bytes"` // kept for what is behind the end of the origin; not in the image
	Ranges   []Range  `json:"ranges"`           // of the whole snapshot, ascending
	Problems []string `json:"problems"`
}

// Result returns the totals of ranges, which Write or Plan returned.
func (r *Rescue) Result(ranges []Range) Result {
	sum := Totals(ranges)
	res := Result{sum[Certain], sum[Doubtful], sum[Lost], r.Behind(), ranges, []string{}}
	for _, f := range r.Report().Findings {
		res.Problems = append(res.Problems, f.String())
	}
	return res
}

// WriteText writes the problems, and the totals of the image at path of a snapshot of origin.
func (res Result) WriteText(w io.Writer, path, origin string) error {
	for _, p := range res.Problems {
		fmt.Fprintln(w, p)
	}
	behind := ""
	if res.Behind > 0 {
		behind = fmt.Sprintf("; %s more are kept for what is after the end of %s, which is too small, and are omitted", bytesize.Text(res.Behind), origin)
	}
	_, err := fmt.Fprintf(w, "%s: %s certain, %s doubtful, %s lost%s\n", path,
		bytesize.Text(res.Certain), bytesize.Text(res.Doubtful), bytesize.Text(res.Lost), behind)
	return err
}

// WriteMap writes the ranges: as JSON or as a picture if kind is ".json", ".svg" or ".png", else a line each.
func WriteMap(w io.Writer, ranges []Range, kind string) error {
	switch kind {
	case ".json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(ranges)
	case ".svg":
		return picture.SVG(w, certaintyPanel(ranges))
	case ".png":
		return picture.PNG(w, certaintyPanel(ranges))
	}
	var text strings.Builder
	for _, x := range ranges {
		fmt.Fprintf(&text, "%d %d %v\n", x.Off, x.Length, x.Class)
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// certaintyPanel draws the disk as a strip. Lost ranges have precedence over doubtful ones, and those over certain
// ones.
func certaintyPanel(ranges []Range) picture.Panel {
	size := int64(0)
	for _, x := range ranges {
		size += x.Length
	}
	s := picture.NewStrip(size, 64*32,
		picture.Class{Name: Certain.String(), Letter: '.', Colour: color.RGBA{0x2e, 0x8b, 0x57, 0xff}},
		picture.Class{Name: Doubtful.String(), Letter: 'd', Colour: color.RGBA{0xe6, 0xa8, 0x17, 0xff}},
		picture.Class{Name: Lost.String(), Letter: 'l', Colour: color.RGBA{0xc0, 0x39, 0x2b, 0xff}})
	for _, x := range ranges {
		if x.Class != Certain {
			s.Add(x.Off, x.Length, int(x.Class))
		}
	}
	return picture.Panel{Title: "classes of the rescued image", Strip: s, Columns: 64, Label: bytesize.Text}
}
