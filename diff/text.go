package diff

import (
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
)

// NewTextPrinter prints the ranges of a disk of size bytes that differ, and a summary, for people. verified says that the extents
// were compared.
func NewTextPrinter(w io.Writer, size int64, verified bool) Printer {
	return &textPrinter{w: w, size: size, verified: verified}
}

// textPrinter is the printer for people.
type textPrinter struct {
	w               io.Writer
	size            int64
	verified        bool
	ranges          uint64
	changed, copied int64 // bytes
	line            []byte
}

// Extent prints a range that differs.
func (p *textPrinter) Extent(e Extent) error {
	if e.Class == Copied {
		p.copied += e.Length
		return nil
	}
	p.ranges++
	p.changed += e.Length
	p.line = text.AppendInt(p.line[:0], 14, e.Off)
	p.line = append(bytesize.Append(append(p.line, "  "...), e.Length), '\n')
	_, err := p.w.Write(p.line)
	return err
}

// End prints the summary.
func (p *textPrinter) End() error {
	verb := "may differ"
	if p.verified {
		verb = "differ"
	}
	if p.ranges == 0 {
		fmt.Fprintf(p.w, "no difference in %s", bytesize.Text(p.size))
	} else {
		fmt.Fprintf(p.w, "%s of %s %s, in %s", bytesize.Text(p.changed), bytesize.Text(p.size), verb, text.Count(p.ranges, "range"))
	}
	if p.copied > 0 {
		fmt.Fprintf(p.w, "; %s are stored and the same", bytesize.Text(p.copied))
	}
	_, err := fmt.Fprintln(p.w)
	return err
}
