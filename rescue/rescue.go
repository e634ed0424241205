// Package rescue recovers data from an invalid or damaged snapshot, and classifies every byte of it.
//
//	r, err := rescue.Open(ctx, origin, cow, rescue.Options{})
//	ranges, err := r.Write(ctx, out, nil) // out: a device of r.Size() bytes that reads as zeros
//
// Guarantee: Open and Write never write to the origin or the COW device.
//
// When a COW device becomes full, Linux marks its store invalid and refuses all access, though nothing in the store is
// lost: an exception in an area has its data on the device, written before it. What is lost is the certainty about chunks
// without an exception: the origin has the only copy, and it was not preserved any more after the store had become invalid.
// So each byte of the snapshot is
//
//	certain    as the snapshot showed it: the chunk has an exception, or the store is valid, complete and not in use
//	doubtful   the present content of the origin, which may have been overwritten since
//	lost       neither: the exception's data can't be read, or is not on the device any more
//
// [Open] reads the metadata as package check does, without relying on it, and [Rescue.Write] writes the recovered image.
package rescue

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/chunkmap"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// Class is the reliability of a byte of a rescued snapshot.
type Class uint8

const (
	Certain  Class = iota // as the snapshot showed it
	Doubtful              // the origin's content of today
	Lost                  // not available; the origin's content, or zeros where that can't be read either
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

// Options are the options of [Open]. The zero value is usable.
type Options struct {
	ChunkSectors uint32 // used instead of that in a damaged header; 0: the header's

	// Live: the store and its origin may be in use. Chunks without an exception are doubtful then, even if the store is
	// valid, as they may be overwritten at any time.
	Live bool
}

// A Rescue is an analysed store and its origin.
type Rescue struct {
	origin, cow block.Device
	report      *check.Report
	layout      ondisk.Layout
	kept        chunkmap.Map // exceptions that are used
	doubtful    chunkSet     // of those, the ones that contradict another
	lost        chunkSet     // exceptions whose data is not on the device
	whole       bool         // chunks without an exception are unchanged
}

// A chunkSet is a set of origin chunks, in a few bytes each whatever they are.
type chunkSet struct{ chunkmap.Map }

// add is called with chunks that an exception can name: their numbers are below 2^54.
func (c *chunkSet) add(old ondisk.OriginChunk) {
	c.Insert(ondisk.Exception{Old: old, New: ondisk.COWChunk(old) + 1}) // adjacent ones join to runs
}

// Open reads the metadata of the store on cow. Nothing is written.
//
// It fails when the layout of the areas is unknown (then set Options.ChunkSectors), and with ctx's error.
func Open(ctx context.Context, origin, cow block.Device, o Options) (*Rescue, error) {
	r := &Rescue{origin: origin, cow: cow}
	var err error
	r.report, err = check.Run(ctx, cow, check.Options{Origin: origin, ChunkSectors: o.ChunkSectors, Each: r.addSlot})
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
	// With these problems exceptions may be missing, or the origin is another disk.
	for _, c := range []check.Code{check.DeviceTooSmall, check.NoEndMark, check.AreaPastDevice, check.Unreadable, check.HeaderNamed, check.OriginImpossible, check.OriginTooSmall} {
		r.whole = r.whole && !rep.Has(c)
	}
	return r, nil
}

// addSlot is called for each slot as package check classified it.
func (r *Rescue) addSlot(e store.Entry, c check.Code) {
	if uint64(e.Old) >= 1<<54 {
		return // no disk has a chunk of that number, however small its chunks are
	}
	switch c {
	case 0, check.OutOfOrder, check.OriginTooSmall:
		r.kept.Insert(e.Exception)
	case check.DuplicateOrigin, check.COWShared:
		// One of the two is right, but it is unknown which. Kernels before 6.12 use the first.
		if !r.kept.Insert(e.Exception) {
			r.lost.Delete(e.Old)
		}
		r.doubtful.add(e.Old)
	default:
		if _, kept := r.kept.Get(e.Old); !kept {
			r.lost.add(e.Old)
		}
	}
}

// Report is the report of package check about the store.
func (r *Rescue) Report() *check.Report { return r.report }

// Size is that of the snapshot in bytes: the origin's.
func (r *Rescue) Size() int64 { return r.origin.Size() }

// Behind is how many bytes the store has for chunks after the end of the origin, which is too small then. They are not
// in the image.
func (r *Rescue) Behind() int64 {
	chunks, behind := r.layout.Chunks(r.Size(), true), uint64(0)
	for x := range r.kept.All() {
		if end := uint64(x.Old) + x.Count; end > chunks {
			behind += min(x.Count, end-chunks)
		}
	}
	return int64(behind) << r.layout.Shift()
}

// A stretch is consecutive bytes of the snapshot of one class on one device.
type stretch struct {
	off, end int64
	class    Class
	dev      block.Device // that they are read from
	at       int64        // at this byte
}

// ranges yields the whole snapshot, ascending. Its time is proportional to the number of runs in the store.
func (r *Rescue) stretches() iter.Seq[stretch] {
	return func(yield func(stretch) bool) {
		chunks := r.layout.Chunks(r.Size(), true)
		kept, doubtful, lost := newCursor(&r.kept), newCursor(&r.doubtful.Map), newCursor(&r.lost.Map)
		defer kept.stop()
		defer doubtful.stop()
		defer lost.stop()
		for old := uint64(0); old < chunks; {
			mapped, next := kept.seek(old)
			isDoubtful, k := doubtful.seek(old)
			isLost, l := lost.seek(old)
			next = min(next, k, l, chunks)
			s := stretch{class: Doubtful, dev: r.origin}
			s.off, s.end = r.layout.OriginRange(ondisk.OriginChunk(old), next-old, r.Size())
			s.at = s.off
			switch {
			case mapped:
				s.dev, s.at = r.cow, r.layout.COWOffset(kept.run.New+ondisk.COWChunk(old-uint64(kept.run.Old)))
				if !isDoubtful {
					s.class = Certain
				}
			case isLost:
				s.class = Lost
			case r.whole:
				s.class = Certain
			}
			if !yield(s) {
				return
			}
			old = next
		}
	}
}

// A cursor iterates over the runs of a map in ascending order.
type cursor struct {
	run  chunkmap.Run // the first that ends after the wanted chunk; Count 0: there is none
	next func() (chunkmap.Run, bool)
	stop func()
}

func newCursor(m *chunkmap.Map) *cursor {
	c := &cursor{}
	c.next, c.stop = iter.Pull(m.All())
	c.run, _ = c.next()
	return c
}

// seek reports whether chunk old is in the map, and up to which chunk that is so. old ascends from call to call.
func (c *cursor) seek(old uint64) (in bool, until uint64) {
	for c.run.Count > 0 && uint64(c.run.Old)+c.run.Count <= old {
		c.run, _ = c.next()
	}
	switch {
	case c.run.Count == 0:
		return false, math.MaxUint64
	case uint64(c.run.Old) > old:
		return false, uint64(c.run.Old)
	}
	return true, uint64(c.run.Old) + c.run.Count
}

// Plan returns the ranges of the whole snapshot, ascending, without reading any data: what can't be read is
// only found by Write.
func (r *Rescue) Plan() []Range {
	var ranges []Range
	for s := range r.stretches() {
		ranges = join(ranges, Range{s.off, s.end - s.off, s.class})
	}
	return ranges
}

// join appends x, or extends the last range.
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

const copyBytes = 1 << 20 // read at once around a sector that can't be read

// Write writes everything that can be recovered of the snapshot to out, which reads as zeros and is as long as Size,
// and returns the class of each part. It writes in ascending order. Sectors that can't be read are lost, and left out.
// Holes are not read. progress, where not nil, is called with how many bytes are done.
//
// Errors: those of writing, and ctx's.
func (r *Rescue) Write(ctx context.Context, out block.Device, progress func(done int64)) ([]Range, error) {
	w := &writer{ctx: ctx, out: out, progress: progress, size: r.Size()}
	for s := range r.stretches() {
		if err := w.stretch(s); err != nil {
			return nil, err
		}
	}
	return w.ranges, nil
}

// A writer writes ranges to out.
type writer struct {
	ctx         context.Context
	out         block.Device
	progress    func(done int64)
	size, shown int64
	buf         []byte // of part
	ranges      []Range
}

// range writes s, but for its holes.
func (w *writer) stretch(s stretch) error {
	for s.off < s.end {
		err := block.Copy(w.out, s.off, s.dev, s.at, s.end-s.off, block.IntoZeros, func(n int64) error {
			w.ranges = join(w.ranges, Range{s.off, n, s.class})
			s.off, s.at = s.off+n, s.at+n
			w.show(s.off)
			return context.Cause(w.ctx)
		})
		var failed *block.CopyError
		switch {
		case err == nil:
			return nil // all of it
		case !errors.As(err, &failed):
			return err
		case failed.Op != "read", errors.Is(err, block.ErrUnavailable): // a server that gives no answer has lost nothing
			return failed.Err
		}
		n := min(s.end-s.off, copyBytes)
		if err := w.part(s, n); err != nil {
			return err
		}
		s.off, s.at = s.off+n, s.at+n
		w.show(s.off)
	}
	return context.Cause(w.ctx)
}

// part writes the first n bytes of s, of which some can't be read.
func (w *writer) part(s stretch, n int64) error {
	if w.buf == nil {
		w.buf = make([]byte, copyBytes)
	}
	for _, part := range readParts(s.dev, w.buf[:n], s.at) {
		x := Range{s.off + part.Off, part.Length, s.class}
		if part.Class == Lost {
			x.Class = Lost
		} else if err := block.WriteSparse(w.out, w.buf[part.Off:part.Off+part.Length], x.Off, block.IntoZeros); err != nil {
			return err
		}
		w.ranges = join(w.ranges, x)
	}
	return context.Cause(w.ctx)
}

// show calls progress, at most once for each copyBytes.
func (w *writer) show(done int64) {
	if w.progress != nil && (done-w.shown >= copyBytes || done == w.size) {
		w.progress(done)
		w.shown = done
	}
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

// Totals adds up the bytes of each class.
func Totals(ranges []Range) (bytes [3]int64) {
	for _, x := range ranges {
		bytes[x.Class] += x.Length
	}
	return bytes
}
