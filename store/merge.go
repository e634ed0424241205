package store

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A Run is Count exceptions that are consecutive on both sides: origin chunks Old, Old+1, … are stored in COW chunks
// New, New+1, ….
type Run struct {
	Old   ondisk.OriginChunk
	New   ondisk.COWChunk
	Count uint64
}

// LastRun returns the run that the kernel would merge next (prepare_merge, docs/spec/dm-snapshot.md §4.1): the last
// exception and those before it, in the same area, that lead up to it on both sides. Count is 0 when the store is
// empty. It changes nothing, so a failed call can be repeated.
func (s *Store) LastRun() (Run, error) {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	if err := s.mergeable(); err != nil {
		return Run{}, err
	}
	var r Run
	for p := s.durable; ; {
		part, err := s.readBack(p, s.layout.SlotsPerArea())
		if err != nil {
			return Run{}, err
		}
		for i := len(part) - 1; i >= 0; i-- {
			if e := part[i]; r.Count == 0 || e.Old+1 == r.Old && e.New+1 == r.New {
				r = Run{e.Old, e.New, r.Count + 1}
			} else {
				return r, nil
			}
		}
		if p = s.back(p, uint64(len(part))); p.index == 0 {
			return r, nil // the area's beginning, or nothing at all
		}
	}
}

// Last returns, in slot order, the last exceptions of the store: at most max ≥ 1, fewer only when the
// store holds fewer. It changes nothing.
//
// What it reads is compared with memory: an exception that is on disk but not in memory, or twice, is a
// *ondisk.CorruptError, so that neither a damaged area nor a single wrong read can make a merge copy or drop the wrong
// chunk.
func (s *Store) Last(max uint64) ([]ondisk.Exception, error) {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	if err := s.mergeable(); err != nil {
		return nil, err
	}
	var parts [][]ondisk.Exception
	n := uint64(0)
	for p := s.durable; n < max; {
		part, err := s.readBack(p, max-n)
		if err != nil {
			return nil, err
		}
		if len(part) == 0 {
			break
		}
		parts = append(parts, part)
		n += uint64(len(part))
		p = s.back(p, uint64(len(part)))
	}
	all := inSlotOrder(parts, n)
	return all, checkDistinct(all)
}

// inSlotOrder joins parts of a total of n exceptions that were read backwards, the last slots first.
func inSlotOrder(parts [][]ondisk.Exception, n uint64) []ondisk.Exception {
	all := make([]ondisk.Exception, 0, n)
	for _, part := range slices.Backward(parts) {
		all = append(all, part...)
	}
	return all
}

// checkDistinct refuses two exceptions for one origin chunk, which can't both be in memory: one of the slots was read
// wrong.
func checkDistinct(all []ondisk.Exception) error {
	byOld := slices.Clone(all)
	slices.SortFunc(byOld, func(a, b ondisk.Exception) int { return cmp.Compare(a.Old, b.Old) })
	for i := 1; i < len(byOld); i++ {
		if byOld[i].Old == byOld[i-1].Old {
			return &ondisk.CorruptError{Place: "last slots",
				What: fmt.Sprintf("origin chunk %d is in two of them, and in memory once", byOld[i].Old)}
		}
	}
	return nil
}

// mergeable returns why nothing may be merged. s.syncing is held.
func (s *Store) mergeable() error {
	if s.transient {
		return ErrNoMerge
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if s.sealed {
		return ondisk.ErrSealed
	}
	if len(s.queue) > 0 || len(s.ready) > 0 {
		panic("store: merge of a store with exceptions that are not durable")
	}
	return nil
}

// stepBack returns p, or the end of the area before it when nothing is used in p's area (docs/spec/dm-snapshot.md §4.1
// step 1). ok is false at the first slot of the store.
func (s *Store) stepBack(p position) (q position, ok bool) {
	if p.index > 0 {
		return p, true
	}
	if p.area == 0 {
		return p, false
	}
	return position{p.area - 1, s.layout.SlotsPerArea()}, true
}

// back returns the position n ≥ 1 slots before p, all of them in one area. Like the kernel's counters it stays in an
// area that becomes empty.
func (s *Store) back(p position, n uint64) position {
	p, _ = s.stepBack(p)
	return position{p.area, p.index - n}
}

// readBack reads at most max slots before p, in one area, and checks them against memory.
func (s *Store) readBack(p position, max uint64) ([]ondisk.Exception, error) {
	p, ok := s.stepBack(p)
	if !ok {
		return nil, nil
	}
	n := min(p.index, max, scanPiece/ondisk.SlotSize)
	buf := make([]byte, n*ondisk.SlotSize)
	first := ondisk.Slot{Area: p.area, Index: p.index - n}
	if _, err := s.dev.ReadAt(buf, s.layout.SlotOffset(first)); err != nil {
		return nil, fmt.Errorf("read area %d: %w", p.area, err)
	}
	exceptions := make([]ondisk.Exception, n)
	for i := range exceptions {
		e := ondisk.DecodeException(buf[i*ondisk.SlotSize:])
		if err := s.checkKnown(e, ondisk.Slot{Area: first.Area, Index: first.Index + uint64(i)}); err != nil {
			return nil, err
		}
		exceptions[i] = e
	}
	return exceptions, nil
}

// checkKnown refuses an exception that was read again and differs from the one in memory.
func (s *Store) checkKnown(e ondisk.Exception, at ondisk.Slot) error {
	if m, ok := s.exceptions.Get(e.Old); !ok || m != e.New {
		return &ondisk.CorruptError{Place: s.layout.Place(at),
			What: fmt.Sprintf("exception for origin chunk %d in COW chunk %d is on disk but not in memory", e.Old, e.New)}
	}
	return nil
}

// DropLast removes the last exceptions, merged as Last returned them, which the caller has copied to the origin and
// made durable there (commit_merge, docs/spec/dm-snapshot.md §4.2): their slots become zero on disk, durably, and only
// then the numbers in memory change. The first slot cleared ends the exceptions, so that a torn clear leaves either an
// exception that was merged, and may be merged again, or void slots.
//
// The slots are read again and must hold what Last returned, or it is a *ondisk.CorruptError: if the device returns
// wrong data for one of the two reads, even another slot of the same store, no exception is dropped that was not
// merged.
//
// Afterwards the next chunk is counted as if all that is left had been committed in order (docs/spec/dm-snapshot.md
// §4.2, step 4); the number is only for the status line, since nothing may be reserved any more.
//
// A failed read changes nothing and may be tried again. After a failed write or flush the store refuses writes
// (ErrFailed): open it again to continue.
func (s *Store) DropLast(merged []ondisk.Exception) error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	if err := s.mergeable(); err != nil {
		return err
	}
	n := uint64(len(merged))
	if n == 0 || n > s.exceptions.Len() {
		panic(fmt.Sprintf("store: drop of %d exceptions out of %d", n, s.exceptions.Len()))
	}
	runs, end, gone, err := s.dropPlan(n)
	if err != nil {
		return err
	}
	for i, e := range gone {
		if e != merged[i] {
			return &ondisk.CorruptError{Place: s.layout.Place(s.slotAfter(end, uint64(i))),
				What: fmt.Sprintf("exception for origin chunk %d is to be dropped, and the one for %d was merged", e.Old, merged[i].Old)}
		}
	}
	tail, err := s.tailAt(end)
	if err != nil {
		return err
	}
	if err := s.clearSlots(runs, end, tail); err != nil {
		return s.fail(fmt.Errorf("%w: clear merged exceptions: %w", ErrFailed, err))
	}
	s.durable, s.tail, s.settled = end, tail, true
	s.mu.Lock()
	s.pos, s.reserved = end, end
	s.next = s.layout.AreaChunk(end.area) + ondisk.COWChunk(end.index) + 1
	s.mu.Unlock()
	for i := len(gone) - 1; i >= 0; i-- {
		s.exceptions.Delete(gone[i].Old)
	}
	return nil
}

// range is a row of used slots in one area.
type slotRun struct {
	area     uint64
	from, to uint64
}

// dropPlan finds the slots of the last n exceptions, last area first, the position before them, and
// what they hold.
func (s *Store) dropPlan(n uint64) (runs []slotRun, end position, gone []ondisk.Exception, err error) {
	end = s.durable
	var parts [][]ondisk.Exception
	for left := n; left > 0; {
		part, err := s.readBack(end, left)
		if err != nil {
			return nil, end, nil, err
		}
		if len(part) == 0 {
			return nil, end, nil, errors.New("fewer exceptions on disk than in memory")
		}
		q := s.back(end, uint64(len(part)))
		st := slotRun{q.area, q.index, q.index + uint64(len(part))}
		if k := len(runs); k > 0 && runs[k-1].area == st.area {
			runs[k-1].from = st.from
		} else {
			runs = append(runs, st)
		}
		parts = append(parts, part)
		end, left = q, left-uint64(len(part))
	}
	return runs, end, inSlotOrder(parts, n), nil
}

// slotAfter is the slot i slots after p.
func (s *Store) slotAfter(p position, i uint64) ondisk.Slot {
	p = s.advance(p, i)
	return ondisk.Slot{Area: p.area, Index: p.index}
}

// tailAt returns the block that holds slot p as it is to be when p is the end: slots before p as they are on disk,
// zeros from p on. It is going to be written, so it must not depend on a single read: it is the block in memory, or it
// is read twice, and each slot is compared with memory.
func (s *Store) tailAt(p position) ([]byte, error) {
	slot := s.layout.SlotOffset(ondisk.Slot{Area: p.area, Index: p.index})
	tail := make([]byte, metaBlock(s.layout))
	i := slot % int64(len(tail))
	if off, _ := s.tailOffset(); off == slot-i {
		copy(tail[:i], s.tail)
		return tail, nil
	}
	if i == 0 {
		return tail, nil
	}
	again := make([]byte, i)
	for _, b := range [][]byte{tail[:i], again} {
		if _, err := s.dev.ReadAt(b, slot-i); err != nil {
			return nil, fmt.Errorf("read area %d: %w", p.area, err)
		}
	}
	for b := int64(0); b < i; b += ondisk.SlotSize {
		at := ondisk.Slot{Area: p.area, Index: p.index - uint64((i-b)/ondisk.SlotSize)}
		e := ondisk.DecodeException(tail[b:])
		if err := s.checkKnown(e, at); err != nil {
			return nil, err
		}
		if e != ondisk.DecodeException(again[b:]) {
			return nil, &ondisk.CorruptError{Place: s.layout.Place(at), What: "read twice, and different"}
		}
	}
	return tail, nil
}

// clearSlots writes zeros over the ranges, and durably the new tail last: with one block to change, as when runs are
// short, that is one write. A step over several blocks needs no order among them.
func (s *Store) clearSlots(runs []slotRun, end position, tail []byte) error {
	if err := s.scrubTail(); err != nil {
		return err
	}
	slot := s.layout.SlotOffset(ondisk.Slot{Area: end.area, Index: end.index})
	tailOff := slot - slot%int64(len(tail))
	others := false
	for _, st := range runs {
		from := s.layout.SlotOffset(ondisk.Slot{Area: st.area, Index: st.from})
		to := s.layout.SlotOffset(ondisk.Slot{Area: st.area, Index: st.to})
		if st.area == end.area {
			from = max(from, tailOff+int64(len(tail)))
		}
		if from >= to {
			continue
		}
		others = true
		// Areas are short: writing takes less time than a punched hole each, which is a transaction of the file system.
		if err := block.WriteZeros(s.dev, from, to-from); err != nil {
			return err
		}
	}
	if others {
		// Flush the zeros first: a durable write of the tail does not cover them.
		if err := s.dev.Flush(); err != nil {
			return err
		}
	}
	return block.WriteDurable(s.dev, tail, tailOff)
}
