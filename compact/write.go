package compact

import (
	"bytes"
	"context"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A Result says what a new store is made of.
type Result struct {
	Exceptions uint64 // chunks of the new size
	Dropped    uint64 // chunks of the new size that were stored, at least in part, and are the origin's
	Filled     int64  // bytes of the disk that were not stored and are now, read from the origin
}

// Write makes the new store on dst, which has at least Size bytes, and makes it durable. The order of writes is
// that of package store: what dst held is gone from the first write on, and at every instant it holds
// no store, or a sound one of the first so many chunks. Where there is a stretch of zeros dst gets
// no space, if it can be without.
//
// Errors: ctx's cause; what store.Create says of dst; store.ErrFull where dst, or the file system beneath,
// has no room; failed reads and writes.
func (p *Plan) Write(ctx context.Context, dst block.Device) (Result, error) {
	st, err := store.Create(dst, p.to, true)
	if err != nil {
		return Result{}, err
	}
	w := &writer{p: p, ctx: ctx, st: st, buf: make([]byte, 0, pieceBytes)}
	for s := range p.spans() {
		if err := w.span(s); err != nil {
			return Result{}, err
		}
	}
	if err := w.flush(); err != nil {
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

// A writer fills one new store. Its chunks follow each other whatever their origin chunks are, so that it
// gathers scattered ones to large writes.
type writer struct {
	p    *Plan
	ctx  context.Context
	st   *store.Store
	made Result
	done uint64 // chunks looked at

	buf     []byte              // gathered, at most a piece
	at      int64               // byte of the device where buf belongs
	waiting []store.Reservation // whose last bytes are in buf
}

// span takes over what is to be kept of s, as many chunks at a time as fit in a piece.
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

// part takes over the chunks of s, or those that differ.
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
	for s.count > 0 {
		r, err := w.st.Reserve(s.first, s.count)
		if err != nil {
			return err
		}
		if err := w.gather(r); err != nil {
			return err
		}
		w.made.Exceptions += r.Count
		s = span{s.first + ondisk.OriginChunk(r.Count), s.count - r.Count}
	}
	return nil
}

// gather reads the chunks of a reservation.
func (w *writer) gather(r store.Reservation) error {
	l := w.p.to
	for i, n := int64(0), int64(r.Count)<<l.Shift(); i < n; {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		off := l.COWOffset(r.New) + i
		if len(w.buf) == cap(w.buf) || w.at+int64(len(w.buf)) != off { // full, or there is an area between
			if err := w.flush(); err != nil {
				return err
			}
			w.at = off
		}
		b := w.buf[len(w.buf):min(cap(w.buf), len(w.buf)+int(n-i))]
		filled, err := w.p.read(b, l.OriginOffset(r.Old)+i)
		if err != nil {
			return err
		}
		w.buf = w.buf[:len(w.buf)+len(b)]
		w.made.Filled += filled
		i += int64(len(b))
	}
	w.waiting = append(w.waiting, r)
	return nil
}

// flush writes what was gathered.
func (w *writer) flush() error {
	if err := writeSparse(w.st.Device(), w.buf, w.at); err != nil {
		return fmt.Errorf("write the new store: %w", err)
	}
	for _, r := range w.waiting {
		if err := r.Commit(); err != nil {
			return err
		}
	}
	w.buf, w.waiting = w.buf[:0], w.waiting[:0]
	return nil
}

// blockBytes is the unit in which file systems keep space, as a rule: less of it is not worth a hole.
const blockBytes = 4096

var zeros [blockBytes]byte

// writeSparse writes b at off, but blocks of zeros as holes where dev can.
func writeSparse(dev block.Device, b []byte, off int64) error {
	for len(b) > 0 {
		zero, n := startsZero(b, off)
		for int(n) < len(b) {
			next, k := startsZero(b[n:], off+n)
			if next != zero {
				break
			}
			n += k
		}
		var err error
		if zero {
			err = block.Zero(dev, off, n, 0)
		} else {
			_, err = dev.WriteAt(b[:n], off)
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+n
	}
	return nil
}

// startsZero reports whether the first n bytes of b, which end with a block of the device, are a whole block
// of zeros.
func startsZero(b []byte, off int64) (zero bool, n int64) {
	n = min(blockBytes-off%blockBytes, int64(len(b)))
	return n == blockBytes && bytes.Equal(b[:n], zeros[:]), n
}

// close gives back the space that was set aside for further chunks, and keeps the valid word: any but 0
// means the same, and the kernel leaves it as it is (specification 2.2).
func (w *writer) close() error {
	dev, l := w.st.Device(), w.p.to
	end := int64(l.ChunksNeeded(w.made.Exceptions)) << l.Shift()
	if err := block.Discard(dev, end, dev.Size()-end); err != nil {
		return err
	}
	valid := w.p.old.Header().Valid
	if valid == w.st.Header().Valid {
		return nil
	}
	b := make([]byte, block.BlockSize(dev))
	if _, err := dev.ReadAt(b, 0); err != nil {
		return err
	}
	h := w.st.Header()
	h.Valid = valid
	h.Encode(b)
	return block.WriteDurable(dev, b, 0)
}
