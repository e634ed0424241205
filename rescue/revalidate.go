package rescue

import (
	"context"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/undo"
)

// A Revalidation makes a store that is marked invalid load again. What it then shows is what Plan says,
// doubtful parts among them, and nothing tells them from the rest any more.
type Revalidation struct {
	cow    block.Device
	report *check.Report
}

// NewRevalidation looks at a store, invalid or not. One with anything else wrong is refused; repair helps there.
func NewRevalidation(ctx context.Context, cow block.Device) (*Revalidation, error) {
	rep, err := check.Run(ctx, cow, check.Options{})
	if err != nil {
		return nil, err
	}
	for _, f := range rep.Findings {
		if f.Problem().Severity == check.Error && f.Code != check.MarkedInvalid {
			return nil, fmt.Errorf("more is wrong than the valid mark: %v", f)
		}
	}
	return &Revalidation{cow, rep}, nil
}

// Valid reports whether the store is valid as it is.
func (v *Revalidation) Valid() bool { return v.report.Header.Valid != 0 }

// KeptBytes is how much of the snapshot has exceptions, and is as the snapshot showed it.
func (v *Revalidation) KeptBytes() int64 {
	return int64(v.report.Exceptions) * v.report.Layout.ChunkBytes()
}

// InPlace marks the store itself valid. Before that it calls save, once, as repair.Plan.InPlace does; with
// nothing to do it doesn't. The change is one sector, durable when InPlace returns.
func (v *Revalidation) InPlace(save func(ranges []undo.Range, size int64) error) (changed bool, err error) {
	if v.Valid() {
		return false, nil
	}
	if err := save([]undo.Range{{Off: 0, Length: ondisk.SectorSize}}, v.cow.Size()); err != nil {
		return false, err
	}
	return true, v.mark(v.cow)
}

// mark makes the header on dev a valid one.
func (v *Revalidation) mark(dev block.Device) error {
	head := make([]byte, ondisk.HeaderSize)
	h := v.report.Header
	h.Valid = 1
	h.Encode(head)
	return block.WriteDurable(dev, head, 0)
}

// Copy makes a valid copy on out, which is as long as the store and reads as zeros.
func (v *Revalidation) Copy(ctx context.Context, out block.Device) error {
	for off := int64(0); off < v.cow.Size(); {
		extents, err := block.Extents(v.cow, off, v.cow.Size()-off)
		if err != nil {
			return err
		}
		for _, e := range extents {
			if e.Flags&block.ReadsZero == 0 {
				if err := v.copyRange(ctx, out, off, e.Length); err != nil {
					return err
				}
			}
			off += e.Length
		}
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return v.mark(out)
}

func (v *Revalidation) copyRange(ctx context.Context, out block.Device, off, n int64) error {
	buf := make([]byte, min(n, copyBytes))
	for end := off + n; off < end; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p := buf[:min(end-off, copyBytes)]
		if _, err := v.cow.ReadAt(p, off); err != nil {
			return err
		}
		if err := writeSparse(out, p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}
