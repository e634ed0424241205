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
	err := block.Copy(out, 0, v.cow, 0, v.cow.Size(), block.IntoZeros, func(int64) error { return context.Cause(ctx) })
	if err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return v.mark(out)
}
