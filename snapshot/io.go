package snapshot

import (
	"errors"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/gate"
	"github.com/dmsnap/dmsnap/internal/scratch"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// batchBytes bounds how much of a request is copied, reserved and owned at once; a chunk that is larger
// is one batch.
const batchBytes = scratch.Most

// ReadAt reads what the snapshot shows. A chunk that is being copied is read without waiting (docs/spec/dm-snapshot.md
// §5.4).
func (s *Snapshot) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), s.size); err != nil {
		return 0, err
	}
	s.life.RLock()
	defer s.life.RUnlock()
	if err := s.usable(); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := s.read(p, off)
	return int(n), err
}

// enter registers a gate reader of n > 0 bytes at off. Chunks without an exception are read from the origin, their
// bytes and their extents, under a gate reader: from Enter on, an origin write to these chunks waits in Drain. One that
// passed its Drain before had made the exception visible by then, or had made s invalid, so the caller looks up the
// chunks after enter, and enter checks that s is still usable. life is held.
func (s *Snapshot) enter(off, n int64) (gate.Reader, error) {
	first, count := chunks(s.store.Layout(), off, n)
	reader := s.gate.Enter(span(first, count))
	if err := s.usable(); err != nil {
		reader.Leave()
		return gate.Reader{}, err
	}
	return reader, nil
}

// read reads len(p) > 0 bytes at off and returns how many it has read. A request of many pieces registers once.
func (s *Snapshot) read(p []byte, off int64) (int64, error) {
	n := int64(len(p))
	pc := nextPiece(s.store, off, n)
	if pc.mapped && pc.n == n {
		if err := s.readCOW(p, pc); err != nil {
			return 0, err
		}
		return n, nil
	}
	reader, err := s.enter(off, n)
	if err != nil {
		return 0, err
	}
	defer reader.Leave()
	g := getGathered()
	defer g.put()
	g.add(s.store, p, off, 0)
	if err := block.ReadAll(s.cow, g.cow.reads); err != nil {
		return 0, err
	}
	if err := block.ReadAll(s.origin.dev, g.origin.reads); err != nil {
		return 0, err
	}
	for _, r := range g.cow.reads {
		if err := s.store.CheckData(r.Off, int64(len(r.P))); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// readCOW reads a piece that is stored in the COW device.
func (s *Snapshot) readCOW(p []byte, pc piece) error {
	if _, err := s.cow.ReadAt(p, pc.cow); err != nil {
		return err
	}
	return s.store.CheckData(pc.cow, pc.n)
}

func span(first ondisk.OriginChunk, count uint64) gate.Span {
	return gate.Span{First: uint64(first), Last: uint64(first) + count - 1}
}

// WriteAt writes to the snapshot: in place where a chunk has an exception, else into a new chunk of the
// COW device, for which the rest of the chunk is copied from the origin. The origin isn't changed. A
// later Flush makes it durable (SyncFlush), or it is durable when WriteAt returns (SyncAlways).
//
// When there is no space in the COW device the snapshot becomes invalid, or, with PersistentOverflow, refuses this and
// every later write with ErrOverflow (docs/spec/dm-snapshot.md §6.1, §6.2), unless Options.OnFull says otherwise;
// earlier parts of the request may have been written.
func (s *Snapshot) WriteAt(p []byte, off int64) (int, error) {
	if err := s.change("write", payload{data: p}, off, int64(len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteDurableAt is WriteAt, durable when it returns.
func (s *Snapshot) WriteDurableAt(p []byte, off int64) error {
	return s.change("write", payload{data: p, durable: true}, off, int64(len(p)))
}

// ZeroAt makes a range read as zeros, with the same effect on exceptions as a write.
func (s *Snapshot) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if flags&block.OnlyFast != 0 {
		return block.ErrNotFast // a chunk without an exception may have to be copied first
	}
	return s.change("zero", payload{zero: flags}, off, n)
}

// change applies pl to n bytes at off.
func (s *Snapshot) change(op string, pl payload, off, n int64) error {
	if err := block.CheckRange(op, off, n, s.size); err != nil {
		return err
	}
	if s.opts.Fetched {
		if err := s.Fetch(off, n); err != nil {
			return err
		}
	}
	return s.origin.changing(func() error { return s.changeNow(pl, off, n) })
}

// Fetch reads the chunks of which a change of n bytes at off keeps a part. Over an origin that is fetched from a server the change does
// not wait for that then: flushes and checkpoints wait for changes that are in flight.
func (s *Snapshot) Fetch(off, n int64) error {
	if err := block.CheckRange("write", off, n, s.size); err != nil {
		return err
	}
	chunk, last := s.store.Layout().ChunkBytes(), int64(-1)
	for _, edge := range [2]int64{off, off + n} {
		from := edge - edge%chunk
		if from == edge || from == last {
			continue
		}
		last = from
		if err := s.readThrough(from, min(chunk, s.size-from)); err != nil {
			return err
		}
	}
	return nil
}

// readThrough reads a range, of which a chunk may have 1 GiB, for the sake of reading it.
func (s *Snapshot) readThrough(off, n int64) error {
	return scratch.With(min(n, scratch.Most), func(b []byte) error {
		for ; n > 0; off, n = off+int64(len(b)), n-int64(len(b)) {
			b = b[:min(n, int64(len(b)))]
			if _, err := s.ReadAt(b, off); err != nil {
				return err
			}
		}
		return nil
	})
}

// changeNow applies pl, as far as there is space. Doing it again does no harm. Like a request to the origin, a long one
// is made piece by piece, so that Suspend and Close do not wait long.
func (s *Snapshot) changeNow(pl payload, off, n int64) error {
	durable := pl.durable || s.opts.Sync == SyncAlways
	pl.durable = false // one Sync at the end covers data and exceptions
	if n <= lockedBytes {
		return s.changeLocked(pl, off, n, durable)
	}
	err := pieces(off, n, func(at, k int64) error {
		return s.changeLocked(pl.part(at-off, k), at, k, false)
	})
	if err == nil && durable {
		return s.changeLocked(pl.part(n, 0), off+n, 0, true)
	}
	return err
}

// changeLocked applies pl to n bytes at off, under one hold of life.
func (s *Snapshot) changeLocked(pl payload, off, n int64, durable bool) error {
	s.life.RLock()
	defer s.life.RUnlock()
	if err := s.writable(); err != nil {
		return err
	}
	for done := int64(0); done < n; {
		k, err := s.changePiece(pl.part(done, n-done), off+done, n-done)
		if err != nil {
			return err
		}
		done += k
	}
	if durable {
		return s.sync()
	}
	return nil
}

// changePiece applies the first piece of pl and returns its length; 0 when another request made the exception first.
func (s *Snapshot) changePiece(pl payload, off, n int64) (int64, error) {
	pc := nextPiece(s.store, off, n)
	if pc.mapped {
		if err := s.store.CheckData(pc.cow, pc.n); err != nil {
			return 0, err // the rest of the chunk would be wrong
		}
		return pc.n, s.inPlace(pc.cow, pc.n, pl.part(0, pc.n).put(s.cow, pc.cow, pc.n))
	}
	l := s.store.Layout()
	first, count := chunks(l, pc.off, pc.n)
	count = min(count, uint64(max(1, batchBytes/l.ChunkBytes())))
	owned := s.gate.Own(span(first, count))
	defer owned.Release()
	_, count, mapped := s.store.LookupRun(first, count)
	if mapped {
		return 0, nil
	}
	r, err := s.reserve(first, count)
	if err != nil {
		return 0, s.noSpace(err)
	}
	_, end := l.OriginRange(first, r.Count, off+n)
	k := end - off
	if err := s.fill(r, pl.part(0, k), off, k); err != nil {
		if none := s.noRoom(err); none != nil {
			r.Cancel()
			return 0, none
		}
		if errors.Is(err, block.ErrUnavailable) { // only this request fails: the snapshot shows what it did
			r.Cancel()
			return 0, err
		}
		return 0, s.invalidate(reasonIO, err)
	}
	if err := s.commit(r); err != nil {
		return 0, s.invalidate(reasonIO, err)
	}
	from, to := l.OriginRange(r.Old, r.Count, s.origin.dev.Size())
	s.fills.add(r.Count, to-from-k)
	return k, nil
}

// inPlace returns the error of a request for a change of n bytes at off of the COW device, in chunks that have
// exceptions. A chunk that was trimmed may have no space on the file system, and then needs some as a new chunk does.
func (s *Snapshot) inPlace(off, n int64, err error) error {
	if err == nil {
		if at := s.fullAt.Load(); at > 0 && off < at && at <= off+n && s.fullAt.CompareAndSwap(at, 0) {
			s.full.Store(false)
		}
		return nil
	}
	if none := s.noRoom(err); none != nil {
		s.fullAt.Store(off + 1)
		return none
	}
	return err
}

// fill writes the reserved chunks: the origin's content with n bytes at off replaced by pl. The range
// lies in the chunks and touches each. No read where it covers a chunk up to the origin's end.
func (s *Snapshot) fill(r store.Reservation, pl payload, off, n int64) error {
	l := s.store.Layout()
	start, end := l.OriginRange(r.Old, r.Count, s.origin.dev.Size())
	to := l.COWOffset(r.New) - start // what to add to an offset of the origin
	head, tail := off-start, end-(off+n)
	if head == 0 && tail == 0 {
		return pl.put(s.cow, off+to, n)
	}
	if end-start > scratch.Most { // one large chunk
		if err := block.Copy(s.cow, start+to, s.origin.dev, start, head, block.LongHoles, nil); err != nil {
			return err
		}
		if err := block.Copy(s.cow, off+n+to, s.origin.dev, off+n, tail, block.LongHoles, nil); err != nil {
			return err
		}
		return pl.put(s.cow, off+to, n)
	}
	return scratch.With(end-start, func(b []byte) error {
		if err := s.readAround(b, start, head, tail); err != nil {
			return err
		}
		pl.lay(b[head : head+n])
		return block.WriteSparse(s.cow, b, start+to, block.LongHoles)
	})
}

// readAround reads the whole chunks at the edges of b, which begins at byte start of the origin, when
// head bytes at its beginning or tail bytes at its end are not going to be replaced.
func (s *Snapshot) readAround(b []byte, start, head, tail int64) error {
	c := s.store.Layout().ChunkBytes()
	size := int64(len(b))
	first := min(c, size)      // of the first chunk
	last := (size - 1) / c * c // where the last chunk begins
	if head > 0 || last == 0 {
		if _, err := s.origin.dev.ReadAt(b[:first], start); err != nil {
			return &block.CopyError{Op: "read", Err: err}
		}
	}
	if tail > 0 && last > 0 {
		if _, err := s.origin.dev.ReadAt(b[last:], start+last); err != nil {
			return &block.CopyError{Op: "read", Err: err}
		}
	}
	return nil
}

// Flush makes durable every write that was acknowledged before the call. It reaches the COW device only, and succeeds
// on an invalid snapshot (docs/spec/dm-snapshot.md §5.4).
func (s *Snapshot) Flush() error {
	s.life.RLock()
	defer s.life.RUnlock()
	if err := s.usable(); err != nil {
		if errors.Is(err, store.ErrInvalid) {
			return s.cow.Flush()
		}
		return err
	}
	return s.sync()
}

// Discard frees space as the features specify (docs/spec/dm-snapshot.md §5.9). Without DiscardZeroesCOW it does
// nothing. With it, a whole chunk that has an exception reads as zeros afterwards, a part of one is undefined, and a
// chunk without one is unchanged; usage never shrinks. With DiscardPassdownOrigin the range is discarded on the origin
// device as well, without preserving it for other snapshots.
func (s *Snapshot) Discard(off, n int64) error {
	if err := block.CheckRange("discard", off, n, s.size); err != nil {
		return err
	}
	if !s.opts.DiscardZeroesCOW || n == 0 {
		s.life.RLock()
		defer s.life.RUnlock()
		return s.writable()
	}
	if err := s.origin.changing(func() error { return s.discardChunks(off, n) }); err != nil {
		return err
	}
	s.origin.room.made() // other snapshots may have their COW devices on the same file system
	if s.opts.DiscardPassdownOrigin {
		s.origin.mu.RLock()
		defer s.origin.mu.RUnlock()
		return s.origin.dev.Discard(off, n)
	}
	return nil
}

// discardChunks is Discard of what is stored in the COW device.
func (s *Snapshot) discardChunks(off, n int64) error {
	for end := off + n; off < end; {
		k, err := s.discardPiece(off, end-off)
		if err != nil {
			return err
		}
		off += k
	}
	return nil
}

// discardBytes is about how much is discarded while the snapshot's lock is held once.
const discardBytes = 8 << 20

// discardPiece discards the beginning of n bytes at off, at most one piece, and returns how much.
func (s *Snapshot) discardPiece(off, n int64) (int64, error) {
	s.life.RLock()
	defer s.life.RUnlock()
	if err := s.writable(); err != nil {
		return 0, err
	}
	pc := nextPiece(s.store, off, n)
	if !pc.mapped {
		return pc.n, nil
	}
	if err := s.store.CheckData(pc.cow, pc.n); err != nil {
		return 0, err
	}
	// Whole chunks in the middle, parts at the edges.
	c := s.store.Layout().ChunkBytes()
	if end := (off + max(c, discardBytes)) / c * c; end < off+pc.n {
		pc.n = end - off
	}
	if k := min(pc.n, c-off%c); k < c {
		return k, s.inPlace(pc.cow, k, block.Discard(s.cow, pc.cow, k))
	}
	k := pc.n / c * c
	return k, s.inPlace(pc.cow, k, block.Zero(s.cow, pc.cow, k, 0))
}

// maxPieces bounds the pieces that one call of Extents or Changed looks at. It is small because a client may keep
// only the first extent of an answer (NBD_CMD_FLAG_REQ_ONE), and each piece costs system calls. A caller that wants
// more calls again.
const maxPieces = 4

// Extents returns where the holes of the snapshot are, by the device that holds each piece. Like a read, it queries the
// origin under a gate reader: without one, the origin could be zeroed between the lookup and the answer, and the
// snapshot's data would be reported as zeros.
func (s *Snapshot) Extents(off, n int64) ([]block.Extent, error) {
	return s.describe(off, n, func(pc piece) ([]block.Extent, error) {
		if pc.mapped {
			all, err := block.Extents(s.cow, pc.cow, pc.n)
			if err == nil {
				err = s.store.CheckData(pc.cow, pc.n) // lost chunks may have become holes
			}
			return all, err
		}
		return block.Extents(s.origin.dev, pc.off, pc.n)
	})
}

// InCOW is the flag of an extent of Changed that is stored in the COW device.
const InCOW block.ExtentFlags = 1

// Changed returns which ranges have exceptions: flag InCOW, else 0. Like block.Extents it may stop early.
func (s *Snapshot) Changed(off, n int64) ([]block.Extent, error) {
	return s.describe(off, n, func(pc piece) ([]block.Extent, error) {
		e := block.Extent{Length: pc.n}
		if pc.mapped {
			e.Flags = InCOW
		}
		return []block.Extent{e}, nil
	})
}

// describe collects the extents of pieces from off on.
func (s *Snapshot) describe(off, n int64, of func(piece) ([]block.Extent, error)) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, s.size); err != nil {
		return nil, err
	}
	s.life.RLock()
	defer s.life.RUnlock()
	if err := s.usable(); err != nil || n == 0 {
		return nil, err
	}
	reader, err := s.enter(off, n)
	if err != nil {
		return nil, err
	}
	defer reader.Leave()
	return gatherExtents(s.store, off, n, of)
}

// gatherExtents joins the extents of the first pieces of a range, at most maxPieces of them, and ends with the piece
// where the second extent begins: the first one is complete then, as far as the pieces are concerned.
func gatherExtents(st *store.Store, off, n int64, of func(piece) ([]block.Extent, error)) ([]block.Extent, error) {
	var all []block.Extent
	for pieces := 0; n > 0 && pieces < maxPieces && len(all) < 2; pieces++ {
		es, err := of(nextPiece(st, off, n))
		if err != nil {
			return nil, err
		}
		for _, e := range es {
			all = block.AppendExtent(all, e)
			off, n = off+e.Length, n-e.Length
		}
	}
	return all, nil
}
