package rescue

import (
	"context"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A Revalidation marks an invalid store valid again, so that it can be loaded. Its content then is that of Plan,
// including doubtful parts, which are not marked any more.
type Revalidation struct {
	cow    block.Device
	report *check.Report
}

// NewRevalidation checks a store, invalid or not. A store with any other problem is refused; see package repair.
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

// InPlace marks the store itself valid. Before that it calls save, once, as repair.Plan.InPlace does; with nothing to
// do it does not. The change is one sector, durable when InPlace returns.
func (v *Revalidation) InPlace(ctx context.Context, save func(write func(w io.Writer) error) error) (changed bool, err error) {
	if v.Valid() {
		return false, nil
	}
	first := make([]byte, ondisk.SectorSize)
	if _, err := v.cow.ReadAt(first, 0); err != nil {
		return false, err
	}
	v.valid().Encode(first)
	u := undo.New(v.cow, nil, first, v.cow.Size())
	if err := save(func(w io.Writer) error { return u.Save(ctx, w) }); err != nil {
		return false, err
	}
	if err := u.Mark(); err != nil {
		return true, err
	}
	return true, v.mark(v.cow)
}

// valid is the header with the valid mark.
func (v *Revalidation) valid() ondisk.Header {
	h := v.report.Header
	h.Valid = 1
	return h
}

// mark makes the header on dev a valid one.
func (v *Revalidation) mark(dev block.Device) error {
	head := make([]byte, ondisk.HeaderSize)
	v.valid().Encode(head)
	return block.WriteDurable(dev, head, 0)
}

// Copy makes a valid copy on out, which is as long as the store and reads as zeros.
func (v *Revalidation) Copy(ctx context.Context, out block.Device) error {
	err := block.Copy(out, 0, v.cow, 0, v.cow.Size(), block.IntoZeros, func(int64) error { return context.Cause(ctx) })
	if err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return v.mark(out)
}
