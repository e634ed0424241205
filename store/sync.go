package store

import (
	"fmt"
	"math"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Sync makes durable everything that was written to the COW device and every exception that was committed before the
// call: data first, then slots in the order of the reservations. Concurrent callers share one round.
//
// It may wait for reservations that are older than the newest committed one, never for later ones. A transient store
// only flushes its device.
//
// An error is the store's Err from now on (see ErrFailed).
func (s *Store) Sync() error {
	s.syncs.Add(1)
	// A round that began before this call may have flushed before the caller's last write, so only one that begins
	// after it counts. The goroutine that gets the lock first makes that round for all that wait for it.
	mine := s.rounds.Load() + 1
	s.syncing.Lock()
	defer s.syncing.Unlock()
	if s.rounds.Load() >= mine {
		return s.Err()
	}
	s.rounds.Add(1)
	begin := latency.Now()
	err := s.round()
	s.syncTook.Add(begin.Since())
	return err
}

// round decides the order of writes and flushes, here and nowhere else: zeros of the next area, data, flush; slots;
// flush. Slots are written in the order of the reservations, in whatever order the copies completed, so that a crash
// leaves no holes (docs/spec/dm-snapshot.md §3.2). The first slot that is zero ends the exceptions, and what a torn write
// leaves after it is void (§8.2, H8): Open ignores it, and the first round writes zeros over it before it adds a slot
// (H4). s.syncing is held.
func (s *Store) round() error {
	batch, below, err := s.takeBatch()
	if err != nil {
		return err
	}
	if len(batch) > 0 {
		err = s.writeBatch(batch, below)
	} else if err = s.flushData(below); err == nil {
		s.durableBelow.Store(max(s.durableBelow.Load(), uint64(s.written)))
	}
	if err != nil {
		err = s.fail(fmt.Errorf("%w: %w", ErrFailed, err))
		// No later Sync flushes what was committed until now. Where a write failed and no flush, one flush may keep all of
		// it; after a failed one a second says nothing.
		if s.lostFrom.Load() == math.MaxUint64 {
			s.flush()
		}
	}
	return err
}

// flushData flushes the device, after the data of the exceptions below a COW chunk was written.
func (s *Store) flushData(below ondisk.COWChunk) error {
	if err := s.flush(); err != nil {
		return fmt.Errorf("flush data: %w", err)
	}
	s.flushed = max(s.flushed, below)
	return nil
}

// flush flushes the device. After a failure only data that was flushed before can be read. s.syncing is held.
func (s *Store) flush() error {
	err := s.dev.Flush()
	if err != nil {
		s.lostFrom.Store(uint64(s.flushed))
	}
	return err
}

// writeBatch is the barrier: zeros and data, flush, slots, flush. Then memory is updated.
//
//  1. The area after each one that the batch fills is zeroed, and so are void slots after the end
//     mark: wherever a torn write of slots ends, a reader finds an end.
//  2. Flush: data of the batch and the zeros are durable.
//  3. Slots are written. Any part of them may reach the disk in any order: each names durable data, and
//     the first one missing ends the exceptions.
//  4. Flush: the batch is durable.
//
// The data of all exceptions below a COW chunk was written before.
func (s *Store) writeBatch(batch []Run, below ondisk.COWChunk) error {
	if err := s.zeroAhead(batch); err != nil {
		return fmt.Errorf("zero area: %w", err)
	}
	if err := s.flushData(below); err != nil {
		return err
	}
	pos, tail, err := s.writeSlots(batch)
	if err != nil {
		return fmt.Errorf("write exceptions: %w", err)
	}
	if err := s.flush(); err != nil {
		return fmt.Errorf("flush exceptions: %w", err)
	}
	s.durable, s.tail, s.settled = pos, tail, true
	last := batch[len(batch)-1]
	s.written = last.New + ondisk.COWChunk(last.Count)
	s.durableBelow.Store(uint64(s.written))
	return nil
}

// takeBatch waits until every reservation older than the newest committed one has completed, and takes
// all exceptions that are complete in order. The data of every exception below a COW chunk has been written then.
func (s *Store) takeBatch() (batch []Run, below ondisk.COWChunk, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var newest *reservation
	for i := len(s.queue) - 1; i >= 0; i-- {
		if s.queue[i].done {
			newest = s.queue[i]
			break
		}
	}
	// The queue is only shortened at its head; newest has completed when it is not found any more. New reservations are
	// appended after it and not waited for.
	if s.err == nil && newest != nil && s.queued(newest) {
		begin := latency.Now()
		for s.err == nil && s.queued(newest) {
			s.moved.Wait()
		}
		s.copyWaits.Add(begin.Since())
	}
	if s.err != nil {
		return nil, 0, s.err
	}
	if below = s.next; len(s.queue) > 0 {
		below = s.queue[0].New
	}
	batch = s.ready
	s.ready, s.unsynced = nil, 0
	return batch, below, nil
}

func (s *Store) queued(r *reservation) bool {
	for _, q := range s.queue {
		if q == r {
			return true
		}
	}
	return false
}

// zeroAhead does step 1 of writeBatch.
func (s *Store) zeroAhead(batch []Run) error {
	if err := s.scrubTail(); err != nil {
		return err
	}
	var n uint64
	for _, r := range batch {
		n += r.Count
	}
	c := s.layout.ChunkBytes()
	for area := s.durable.area + 1; area <= s.advance(s.durable, n).area; area++ {
		if err := block.Zero(s.dev, s.layout.COWOffset(s.layout.AreaChunk(area)), c, s.keepSpace()); err != nil {
			return err
		}
	}
	return nil
}

// scrubTail zeroes what follows the tail block in its area, once after Open. The block itself is clean
// in memory and is written whole.
func (s *Store) scrubTail() error {
	if !s.scrub {
		return nil
	}
	off, _ := s.tailOffset()
	off += int64(len(s.tail))
	if end := s.layout.COWOffset(s.layout.AreaChunk(s.durable.area) + 1); end > off {
		if err := s.zeroRest(off, end-off); err != nil {
			return err
		}
	}
	s.scrub = false
	return nil
}

// zeroRest zeroes what follows in an area. In a large one holes stay holes.
func (s *Store) zeroRest(off, n int64) error {
	if n <= areaStep {
		return block.Zero(s.dev, off, n, s.keepSpace())
	}
	for n > 0 {
		extents, err := block.Extents(s.dev, off, n)
		if err != nil {
			return err
		}
		for _, e := range extents {
			if e.Flags&block.ReadsZero == 0 {
				if err := block.Zero(s.dev, off, e.Length, s.keepSpace()); err != nil {
					return err
				}
			}
			off, n = off+e.Length, n-e.Length
		}
	}
	return nil
}

// keepSpace are the flags for zeroing areas that are still to be used: without freeing the space that Reserve
// allocated.
func (s *Store) keepSpace() block.ZeroFlags {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noSpace || s.space == 0 {
		return 0
	}
	return block.KeepAllocated
}

// slotsAtOnce is the size of the buffer that slots are collected in for one write, in bytes.
const slotsAtOnce = 64 << 10

// writeSlots does step 3 of writeBatch: blocks from s.tail on, adjacent ones in one write. It returns the position
// after the batch and the block that holds it.
func (s *Store) writeSlots(batch []Run) (pos position, tail []byte, err error) {
	off, i := s.tailOffset()
	pos = s.durable
	buf := append(make([]byte, 0, slotsAtOnce), s.tail...)
	write := func() error {
		_, err := s.dev.WriteAt(buf, off)
		return err
	}
	for _, r := range batch {
		for k := range r.Count {
			ondisk.Exception{Old: r.Old + ondisk.OriginChunk(k), New: r.New + ondisk.COWChunk(k)}.Encode(buf[i:])
			i += ondisk.SlotSize
			pos = s.advance(pos, 1)
			if i < int64(len(buf)) {
				continue
			}
			// The block is full: the next one follows it, or begins the next area.
			if pos.index != 0 && len(buf) < slotsAtOnce {
				buf = append(buf, make([]byte, len(s.tail))...)
				continue
			}
			if err := write(); err != nil {
				return pos, nil, err
			}
			off, i = s.layout.SlotOffset(ondisk.Slot{Area: pos.area, Index: pos.index}), 0
			buf = buf[:len(s.tail)]
			clear(buf)
		}
	}
	if i > 0 {
		if err := write(); err != nil {
			return pos, nil, err
		}
	}
	return pos, append([]byte(nil), buf[len(buf)-len(s.tail):]...), nil
}
