// Package rescue gets out of a snapshot what can still be had, and says what it is worth.
//
// When a COW device was full, Linux marks its store invalid and refuses everything, though nothing of what
// the store holds was lost: an exception that is in an area has its data on the device, written before it.
// What did get lost is knowledge: of a chunk without an exception the origin has the only copy, and nobody
// kept it from being overwritten after the store had become invalid. So each byte of the snapshot is
//
//	certain    as the snapshot showed it: the chunk has an exception, or the store is valid, whole and not in use
//	doubtful   what the origin holds now; it may have been overwritten since
//	lost       neither: the exception's data can't be read, or is not on the device any more
//
// A [Rescue] is made by looking at a store without believing it (package check), and written out with
// [Rescue.Write].
package rescue

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/chunkmap"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// Class says what a byte of a rescued snapshot is worth.
type Class uint8

const (
	Certain  Class = iota // as the snapshot showed it
	Doubtful              // the origin's content of today
	Lost                  // not to be had; the origin's content, or zeros where that can't be read either
)

var classes = [...]string{"certain", "doubtful", "lost"}

func (c Class) String() string { return classes[c] }

// MarshalText gives JSON the word.
func (c Class) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads it.
func (c *Class) UnmarshalText(text []byte) error {
	for i, word := range classes {
		if word == string(text) {
			*c = Class(i)
			return nil
		}
	}
	return fmt.Errorf("%q is none of certain, doubtful, lost", text)
}

// A Range is bytes of the snapshot of one class.
type Range struct {
	Off    int64 `json:"offset"`
	Length int64 `json:"length"`
	Class  Class `json:"class"`
}

// Options say how to look at the store. The zero value is ready.
type Options struct {
	ChunkSectors uint32 // believed instead of the header's, for a header that is damaged; 0: the header's

	// Live says that somebody may be writing to the store and its origin: what has no exception is
	// doubtful then, also where the store is valid, as it may get one, and be overwritten, at any time.
	Live bool
}

// A Rescue is a store that was looked at, with its origin.
type Rescue struct {
	origin, cow block.Device
	report      *check.Report
	layout      ondisk.Layout
	kept        chunkmap.Map                // exceptions to go by
	doubtful    map[ondisk.OriginChunk]bool // of those, the ones that contradict another
	lost        map[ondisk.OriginChunk]bool // exceptions whose data is not on the device
	whole       bool                        // what has no exception is as it was
}

// Open looks at the store on cow and at its origin. Nothing is written.
//
// It fails when the layout of the areas can't be made out (then Options.ChunkSectors helps, if somebody
// knows it), and with ctx's error.
func Open(ctx context.Context, origin, cow block.Device, o Options) (*Rescue, error) {
	r := &Rescue{origin: origin, cow: cow, doubtful: make(map[ondisk.OriginChunk]bool), lost: make(map[ondisk.OriginChunk]bool)}
	var err error
	r.report, err = check.Run(ctx, cow, check.Options{ChunkSectors: o.ChunkSectors, Each: r.hear})
	if err != nil {
		return nil, err
	}
	if r.layout = r.report.Layout; r.layout.ChunkSectors == 0 {
		if len(r.report.Findings) > 0 {
			return nil, fmt.Errorf("nothing to rescue by: %v", r.report.Findings[0])
		}
		return nil, fmt.Errorf("nothing to rescue by: no layout")
	}
	rep := r.report
	r.whole = rep.Header.Valid != 0 && rep.Header.Magic == ondisk.Magic && !o.Live
	// After these there may be exceptions, or there were, that nothing is known of.
	for _, c := range []check.Code{check.DeviceTooSmall, check.NoEndMark, check.AreaPastDevice, check.Unreadable, check.HeaderNamed, check.OriginImpossible} {
		r.whole = r.whole && !rep.Has(c)
	}
	return r, nil
}

// hear takes a slot as check judged it.
func (r *Rescue) hear(e store.Entry, c check.Code) {
	switch c {
	case 0, check.OutOfOrder, check.OriginTooSmall:
		r.kept.Insert(e.Exception)
	case check.DuplicateOrigin, check.COWShared:
		// One of the two is right, and nobody can tell which. Kernels before 6.12 believed the first.
		if !r.kept.Insert(e.Exception) && r.lost[e.Old] {
			delete(r.lost, e.Old)
		}
		r.doubtful[e.Old] = true
	default:
		if _, kept := r.kept.Get(e.Old); !kept {
			r.lost[e.Old] = true
		}
	}
}

// Report is what check said of the store.
func (r *Rescue) Report() *check.Report { return r.report }

// Size is that of the snapshot in bytes: the origin's.
func (r *Rescue) Size() int64 { return r.origin.Size() }

// classOf says what n > 0 chunks from old on are, and how many of them are alike.
func (r *Rescue) classOf(old ondisk.OriginChunk, limit uint64) (c Class, new ondisk.COWChunk, n uint64, mapped bool) {
	new, n, mapped = r.kept.Run(old, limit)
	odd := func(x ondisk.OriginChunk) bool { return mapped && r.doubtful[x] || !mapped && r.lost[x] }
	if len(r.doubtful)+len(r.lost) > 0 {
		first, k := odd(old), uint64(1)
		for k < n && odd(old+ondisk.OriginChunk(k)) == first {
			k++
		}
		if n = k; first && mapped {
			return Doubtful, new, n, true
		} else if first {
			return Lost, 0, n, false
		}
	}
	if mapped || r.whole {
		return Certain, new, n, mapped
	}
	return Doubtful, 0, n, false
}

// Plan returns the ranges of the whole snapshot, ascending, without reading any data: what can't be read is
// only found by Write.
func (r *Rescue) Plan() []Range {
	var ranges []Range
	chunks := r.layout.Chunks(r.Size(), true)
	for old := uint64(0); old < chunks; {
		c, _, n, _ := r.classOf(ondisk.OriginChunk(old), chunks-old)
		from := r.layout.OriginOffset(ondisk.OriginChunk(old))
		to := min(r.layout.OriginOffset(ondisk.OriginChunk(old+n)), r.Size())
		ranges = join(ranges, Range{from, to - from, c})
		old += n
	}
	return ranges
}

// join appends x, or makes the last range longer.
func join(ranges []Range, x Range) []Range {
	if k := len(ranges) - 1; k >= 0 && ranges[k].Class == x.Class && ranges[k].Off+ranges[k].Length == x.Off {
		ranges[k].Length += x.Length
		return ranges
	}
	if x.Length == 0 {
		return ranges
	}
	return append(ranges, x)
}

const (
	copyBytes = 1 << 20 // read at once
	zeroBytes = 4096    // zeros of this size and alignment are left out
)

// Write writes the best that can be had of the snapshot to out, which reads as zeros and is as long as Size,
// and returns what each part is worth. Sectors that can't be read are lost, and left out. progress, where
// not nil, hears how many bytes are done.
//
// Errors: those of writing, and ctx's.
func (r *Rescue) Write(ctx context.Context, out io.WriterAt, progress func(done int64)) ([]Range, error) {
	var ranges []Range
	buf := make([]byte, copyBytes)
	for off := int64(0); off < r.Size(); {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		old := r.layout.OriginChunkAt(off)
		limit := r.layout.Chunks(r.Size(), true) - uint64(old)
		class, new, n, mapped := r.classOf(old, limit)
		end := min(r.layout.OriginOffset(old+ondisk.OriginChunk(n)), r.Size(), off+copyBytes)
		from, dev := off, r.origin
		if mapped {
			from, dev = r.layout.COWOffset(new)+off-r.layout.OriginOffset(old), r.cow
		}
		for _, part := range readParts(dev, buf[:end-off], from) {
			x := Range{off + part.Off, part.Length, class}
			if part.Class == Lost {
				x.Class = Lost
			} else if err := writeSparse(out, buf[part.Off:part.Off+part.Length], x.Off); err != nil {
				return nil, err
			}
			ranges = join(ranges, x)
		}
		off = end
		if progress != nil {
			progress(off)
		}
	}
	return ranges, nil
}

// readParts fills p from dev and returns its parts: those that could be read are Certain, the others Lost.
// A read that fails is tried again sector by sector.
func readParts(dev block.Device, p []byte, off int64) (parts []Range) {
	if _, err := dev.ReadAt(p, off); err == nil {
		return []Range{{0, int64(len(p)), Certain}}
	}
	for i := int64(0); i < int64(len(p)); i += ondisk.SectorSize {
		n := min(ondisk.SectorSize, int64(len(p))-i)
		c := Certain
		if _, err := dev.ReadAt(p[i:i+n], off+i); err != nil {
			c = Lost
		}
		parts = join(parts, Range{i, n, c})
	}
	return parts
}

var zeros [zeroBytes]byte

// writeSparse writes p but for aligned blocks of zeros.
func writeSparse(out io.WriterAt, p []byte, off int64) error {
	for len(p) > 0 {
		n := 0
		for zero := isZero(p, off); n < len(p) && isZero(p[n:], off+int64(n)) == zero; {
			n += piece(p[n:], off+int64(n))
		}
		if !isZero(p, off) {
			if _, err := out.WriteAt(p[:n], off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// piece is how much of p, at byte off, lies in the block it begins in.
func piece(p []byte, off int64) int { return int(min(zeroBytes-off%zeroBytes, int64(len(p)))) }

func isZero(p []byte, off int64) bool {
	n := piece(p, off)
	return bytes.Equal(p[:n], zeros[:n])
}

// Totals adds up the bytes of each class.
func Totals(ranges []Range) (bytes [3]int64) {
	for _, x := range ranges {
		bytes[x.Class] += x.Length
	}
	return bytes
}
