package compact

import (
	"context"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A Result describes the new store.
type Result struct {
	Exceptions uint64 // chunks of the new size
	Dropped    uint64 // chunks of the new size that were stored, at least in part, and are the origin's
	Filled     int64  // bytes of the disk that were not stored and are now, read from the origin
}

// Write makes the new store on dst, which has at least Size bytes, and makes it durable. The order of writes is that of
// package store: the previous content of dst is lost from the first write on, and at every instant dst holds no store,
// or a valid one of the first chunks. Ranges of zeros become holes where dst supports them.
//
// Errors: ctx's cause; what store.Create says of dst; store.ErrFull where dst, or the underlying file system, has no
// space; failed reads and writes.
func (p *Plan) Write(ctx context.Context, dst block.Device) (Result, error) {
	st, err := store.CreateFor(dst, p.to, true, p.old.OriginFormat())
	if err != nil {
		return Result{}, err
	}
	w := &writer{p: p, ctx: ctx, st: st, fill: store.NewFiller(st, pieceBytes)}
	for s := range p.spans() {
		if err := w.span(s); err != nil {
			return Result{}, err
		}
	}
	if err := w.fill.Flush(); err != nil {
		return Result{}, err
	}
	if err := st.Sync(); err != nil {
		return Result{}, err
	}
	if err := w.close(); err != nil {
		return Result{}, err
	}
	return w.made, dst.Flush()
}

// A writer fills one new store.
type writer struct {
	p    *Plan
	ctx  context.Context
	st   *store.Store
	fill *store.Filler
	made Result
	done uint64 // chunks processed
}

// span copies the chunks of s that are to be kept, as many at a time as fit in a piece.
func (w *writer) span(s span) error {
	together := max(1, uint64(pieceBytes)>>w.p.to.Shift())
	for s.count > 0 {
		part := span{s.first, min(together, s.count)}
		if err := w.part(part); err != nil {
			return err
		}
		s = span{s.first + ondisk.OriginChunk(part.count), s.count - part.count}
		w.done += part.count
		if w.p.o.Progress != nil {
			w.p.o.Progress(int64(w.done)<<w.p.to.Shift(), int64(w.p.most)<<w.p.to.Shift())
		}
	}
	return nil
}

// part copies the chunks of s, or those that differ.
func (w *writer) part(s span) error {
	if !w.p.o.DropUnchanged {
		return w.copy(s)
	}
	differs, err := w.p.compare(w.ctx, s)
	if err != nil {
		return err
	}
	for i := uint64(0); i < s.count; {
		k := uint64(1)
		for i+k < s.count && differs[i+k] == differs[i] {
			k++
		}
		if !differs[i] {
			w.made.Dropped += k
		} else if err := w.copy(span{s.first + ondisk.OriginChunk(i), k}); err != nil {
			return err
		}
		i += k
	}
	return nil
}

// copy adds all chunks of s to the store.
func (w *writer) copy(s span) error {
	err := w.fill.Add(s.first, s.count, func(b []byte, off int64) error {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		filled, err := w.p.read(b, off)
		w.made.Filled += filled
		return err
	})
	if err == nil {
		w.made.Exceptions += s.count
	}
	return err
}

// close frees the space that was reserved for further chunks.
func (w *writer) close() error {
	dev, l := w.st.Device(), w.p.to
	end := int64(l.ChunksNeeded(w.made.Exceptions)) << l.Shift()
	return block.Discard(dev, end, dev.Size()-end)
}
