package store

import (
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// maxUnsynced is how many exceptions may wait for a Sync before Reserve makes one itself: 256 Ki, 4 MiB
// of slots. Each such Sync writes out all data since the last one while writers wait.
const maxUnsynced = 256 << 10

// reservation is one entry of the queue.
type reservation struct {
	Run
	done bool
}

// A Reservation is a run of COW chunks allocated for as many consecutive origin chunks. Its owner writes the data and
// then calls Commit; if that fails it calls Cancel, or makes the whole store invalid with Invalidate. A reservation
// without any of these blocks every later Sync.
type Reservation struct {
	Old   ondisk.OriginChunk
	New   ondisk.COWChunk
	Count uint64 // ≥ 1

	store *Store
	entry *reservation
}

// Reserve allocates chunks for origin chunks old, old+1, … of which it takes at least one and at most max ≥ 1: it stops
// where the next COW chunk is an area, and where the device ends. None of them may have an exception or a reservation:
// the caller owns them (see internal/gate), and reserving twice is a program error that makes Commit panic.
//
// Order: chunks ascend within a call and from call to call (docs/spec/dm-snapshot.md §3.1).
//
// Errors: ErrFull when not even one fits. The last slot of an area counts as not fitting when the next area has no space
// on the device, so that a COW device that ends there stays valid (docs/spec/dm-snapshot.md §8.2, H10). The size of the
// device is looked up again first. Also the store's own Err.
func (s *Store) Reserve(old ondisk.OriginChunk, max uint64) (Reservation, error) {
	if s.mustSync() {
		if err := s.Sync(); err != nil {
			return Reservation{}, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return Reservation{}, s.err
	}
	if s.sealed {
		return Reservation{}, ondisk.ErrSealed
	}
	n := s.room(s.dev.Size(), max)
	if n == 0 {
		size, err := block.Refresh(s.dev)
		if err != nil {
			return Reservation{}, fmt.Errorf("size of COW device: %w", err)
		}
		if n = s.room(size, max); n == 0 {
			return Reservation{}, fmt.Errorf("%w: %d of %d chunks used", ErrFull, s.next, s.layout.Chunks(size, false))
		}
	}
	if err := s.allocate(s.next+ondisk.COWChunk(n), n); err != nil {
		return Reservation{}, err
	}
	e := &reservation{Run: Run{old, s.next, n}}
	s.queue = append(s.queue, e)
	s.next += ondisk.COWChunk(n)
	if !s.transient {
		s.next = s.layout.NextData(s.next)
		s.reserved = s.advance(s.reserved, n)
	}
	return Reservation{Old: old, New: e.New, Count: n, store: s, entry: e}, nil
}

// spaceStep is how much space is reserved at once beyond what is needed: an eighth of what is in use, at least 64 KiB
// and at most 8 MiB, so that small stores stay small and calls are few.
func spaceStep(used int64) int64 { return min(max(used/8, 64<<10), 8<<20) }

// allocate reserves space on the device below chunk end, for slots exceptions, in steps. Chunks ascend, and the slots
// of an exception lie before its data, so one number records the progress; the area that was in use when the store was
// opened has its own. s.mu is held: every reservation needs the space too.
func (s *Store) allocate(end ondisk.COWChunk, slots uint64) error {
	need := s.layout.COWOffset(end)
	if s.noSpace {
		return nil
	}
	from := s.space
	if from == 0 { // after Open: the area in use may have holes, and chunks between may be unused
		from = s.layout.COWOffset(s.next)
		s.openArea = s.reserved.area
	}
	if err := s.allocateSlots(slots); err != nil || need <= s.space {
		return err
	}
	// Try a whole step first; without space for it, only what is needed.
	far := min(need+spaceStep(need), s.dev.Size())
	if err := s.allocateRange(from, far-from); err == nil {
		s.space = far
		return nil
	}
	if err := s.allocateRange(from, need-from); err != nil {
		return err
	}
	s.space = need
	return nil
}

// areaStep is how much of an area is reserved at once, in bytes: areas of large chunks are larger than what most stores
// have slots for.
const areaStep = 1 << 20

// allocateSlots reserves space for the next slots, as far as they are in the area that was in use when the store was
// opened. A transient store has none, and its device may end where an area would be.
func (s *Store) allocateSlots(slots uint64) error {
	c := s.layout.ChunkBytes()
	need := int64(min(s.reserved.index+slots, s.layout.SlotsPerArea())) * ondisk.SlotSize
	if s.transient || s.reserved.area != s.openArea || need <= s.openSpace {
		return nil
	}
	far := min((need+areaStep-1)/areaStep*areaStep, c)
	if err := s.allocateRange(s.layout.COWOffset(s.layout.AreaChunk(s.openArea))+s.openSpace, far-s.openSpace); err != nil {
		return err
	}
	s.openSpace = far
	return nil
}

func (s *Store) allocateRange(off, n int64) error {
	can, err := block.Allocate(s.dev, off, n)
	s.noSpace = s.noSpace || !can && err == nil
	switch {
	case err == nil:
		return nil
	case block.IsNoSpace(err):
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return fmt.Errorf("reserve space: %w", err)
}

// room returns how many consecutive chunks from s.next on can be reserved on a device of size bytes,
// at most max.
func (s *Store) room(size int64, max uint64) uint64 {
	chunks := s.layout.Chunks(size, false)
	if uint64(s.next) >= chunks {
		return 0
	}
	n := min(max, chunks-uint64(s.next))
	if s.transient {
		return n
	}
	e := s.layout.SlotsPerArea()
	n = min(n, e+1-(uint64(s.next)-1)%(e+1)) // up to the next area's chunk
	// The exception that fills area k needs area k+1 to be there.
	if left := e - s.reserved.index; n >= left {
		for area := s.reserved.area + 1; left <= n; area, left = area+1, left+e {
			if uint64(s.layout.AreaChunk(area)) >= chunks {
				return left - 1
			}
		}
	}
	return n
}

// Free returns how many more exceptions the COW device has chunks for at its present size. The underlying file system may have
// less space than that.
func (s *Store) Free() uint64 {
	chunks := s.layout.Chunks(s.dev.Size(), false)
	s.mu.Lock()
	defer s.mu.Unlock()
	free := s.dataChunks(chunks) - min(s.dataChunks(chunks), s.dataChunks(uint64(s.next)))
	if s.transient {
		return free
	}
	// The exception that fills the last area that is there needs another one.
	e := s.layout.SlotsPerArea()
	slots := max(1, s.areas(chunks)*e) - 1
	return min(free, slots-min(slots, s.reserved.area*e+s.reserved.index))
}

// areas is the number of areas in the first so many chunks.
func (s *Store) areas(chunks uint64) uint64 {
	if chunks < 2 {
		return 0
	}
	return (chunks-2)/(s.layout.SlotsPerArea()+1) + 1
}

// dataChunks is the number of chunks for data among the first so many.
func (s *Store) dataChunks(chunks uint64) uint64 {
	if s.transient {
		return chunks
	}
	return chunks - min(chunks, 1+s.areas(chunks))
}

func (s *Store) mustSync() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unsynced >= maxUnsynced
}

// Commit completes the exceptions, after the data of the reserved chunks was written: from now on Lookup finds them. It
// returns the store's Err, and commits nothing, when the store has become unusable meanwhile.
//
// The exceptions of a persistent store are on disk after the next Sync.
func (r Reservation) Commit() error {
	s := r.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	for i := range r.Count {
		if !s.exceptions.Insert(ondisk.Exception{Old: r.Old + ondisk.OriginChunk(i), New: r.New + ondisk.COWChunk(i)}) {
			panic(fmt.Sprintf("store: origin chunk %d committed twice", r.Old+ondisk.OriginChunk(i)))
		}
	}
	s.commits += r.Count
	r.entry.done = true
	if s.queue[0] == r.entry {
		s.completeReady()
	}
	return nil
}

// Cancel ends a reservation whose data could not be written. Its chunks are allocated again when it is the newest
// reservation; else they stay unused until the store is opened again, which the format allows (docs/spec/dm-snapshot.md
// §3.5). Like Commit it must be called at most once.
func (r Reservation) Cancel() {
	s := r.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if !s.transient {
		s.reserved = s.retreat(s.reserved, r.entry.Count)
	}
	if last := len(s.queue) - 1; s.queue[last] == r.entry {
		s.next = r.entry.New
		s.queue = s.queue[:last]
		s.space = min(s.space, s.layout.COWOffset(s.next)) // a copy that failed may have made holes
	}
	r.entry.Count = 0
	r.entry.done = true
	s.completeReady()
}

// completeReady removes from the queue what has completed in order. s.mu is held.
func (s *Store) completeReady() {
	for len(s.queue) > 0 && s.queue[0].done {
		s.complete(s.queue[0].Run)
		s.queue[0] = nil
		s.queue = s.queue[1:]
	}
	s.moved.Broadcast()
}

// complete removes a run from the queue, in order. s.mu is held.
func (s *Store) complete(r Run) {
	if s.transient || r.Count == 0 {
		return
	}
	s.pos = s.advance(s.pos, r.Count)
	s.unsynced += r.Count
	if k := len(s.ready); k > 0 {
		if last := &s.ready[k-1]; last.Old+ondisk.OriginChunk(last.Count) == r.Old && last.New+ondisk.COWChunk(last.Count) == r.New {
			last.Count += r.Count
			return
		}
	}
	s.ready = append(s.ready, r)
}
