package diff

import (
	"context"
	"errors"
	"io"
	"iter"
	"strconv"

	"github.com/dmsnap/dmsnap/internal/jsonlist"
)

// A Printer prints extents, which come in ascending order; End completes the output.
type Printer interface {
	Extent(e Extent) error
	End() error
}

// Print prints the whole disk: what the stores say differs or, if verified, what does. progress, unless it is nil, is called with
// the byte that was reached, and the size of the disk. differs reports whether anything does. After an error, which is one of
// reading, of p, or the cause of ctx, the output is incomplete.
func (d *Diff) Print(ctx context.Context, p Printer, verified bool, progress func(reached, size int64)) (differs bool, err error) {
	extents := d.Stored(ctx)
	if verified {
		extents = d.Verified(ctx)
	}
	for e, err := range extents {
		if err == nil {
			differs = differs || e.Class == Changed
			err = p.Extent(e)
		}
		if err != nil {
			return differs, err
		}
		if progress != nil {
			progress(e.Off+e.Length, d.Size())
		}
	}
	return differs, p.End()
}

// Stored is Extents in the form of Verified: it reads no data, and ends with the cause of ctx.
func (d *Diff) Stored(ctx context.Context) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for e := range d.Extents() {
			if ctx.Err() != nil {
				yield(e, context.Cause(ctx))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// rangePrinter prints lines of text.
type rangePrinter struct{ w io.Writer }

// NewRangePrinter prints what differs, and nothing else: lines of offset and length in bytes, decimal.
func NewRangePrinter(w io.Writer) Printer { return rangePrinter{w} }

func (p rangePrinter) Extent(e Extent) error {
	if e.Class != Changed {
		return nil
	}
	b := strconv.AppendInt(make([]byte, 0, 40), e.Off, 10)
	b = strconv.AppendInt(append(b, ' '), e.Length, 10)
	_, err := p.w.Write(append(b, '\n'))
	return err
}

func (p rangePrinter) End() error { return nil }

// JSONRange is a range as the JSON printer prints it.
type JSONRange struct {
	Start   int64 `json:"start"`  // bytes
	Length  int64 `json:"length"` // bytes
	Changed bool  `json:"changed"`
	Stored  bool  `json:"stored"` // a store has exceptions for it
}

// jsonPrinter fills what is between the extents, so that the list covers the disk.
type jsonPrinter struct {
	list *jsonlist.Writer
	off  int64 // end of what was printed
	size int64
}

// NewJSONPrinter prints the whole disk of size bytes as a list of {"start", "length", "changed", "stored"}, without gaps,
// one to a line.
func NewJSONPrinter(w io.Writer, size int64) Printer {
	return &jsonPrinter{list: jsonlist.New(w), size: size}
}

func (p *jsonPrinter) Extent(e Extent) error {
	if err := p.same(e.Off); err != nil {
		return err
	}
	p.off += e.Length
	return p.list.Add(JSONRange{e.Off, e.Length, e.Class == Changed, true})
}

// same prints that nothing is stored up to byte end.
func (p *jsonPrinter) same(end int64) error {
	if end == p.off {
		return nil
	}
	r := JSONRange{Start: p.off, Length: end - p.off}
	p.off = end
	return p.list.Add(r)
}

func (p *jsonPrinter) End() error {
	return errors.Join(p.same(p.size), p.list.End())
}
