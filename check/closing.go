package check

import (
	"context"
	"fmt"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// closing adds the findings that are known only after all slots.
func (s *scanner) closing() {
	if f := s.past; f.count > 0 {
		s.r.add(s.o.Limit, DeviceCut, func() string { return s.l.Place(f.slot) }, f.count, func() string {
			return fmt.Sprintf("from here on %s for data past the end of the device, which has %d bytes and had at least %d", are(f.count, "exception"), s.r.Size, s.needBytes())
		})
	}
	if f := s.beyond; f.count > 0 {
		s.r.add(s.o.Limit, OriginTooSmall, func() string { return s.l.Place(f.slot) }, f.count, func() string {
			return fmt.Sprintf("%s for chunks past the end of the origin of %d bytes, this one for origin chunk %d", are(f.count, "exception"), s.o.Origin.Size(), f.e.Old)
		})
	}
	if f := s.disorder; f.count > 0 {
		s.r.add(s.o.Limit, OutOfOrder, func() string { return s.l.Place(f.slot) }, f.count, func() string {
			return fmt.Sprintf("%s behind one that names a higher COW chunk; this one names chunk %d", are(f.count, "slot"), f.e.New)
		})
	}
	s.leaked()
}

// are begins a sentence about n things: "1 slot is", "2 slots are".
func are(n uint64, what string) string {
	if n == 1 {
		return "1 " + what + " is"
	}
	return fmt.Sprintf("%d %ss are", n, what)
}

// needBytes is how long a device must be for the largest chunk that a truncated store names. It may be longer than any
// device.
func (s *scanner) needBytes() uint64 { return s.need << s.l.Shift() }

// leaked finds the data chunks below the next free one that no slot names.
func (s *scanner) leaked() {
	next, holes := ondisk.FirstDataChunk, uint64(0)
	hole := stretch{}
	for used := range s.news.all() {
		if gap := s.dataChunks(next, ondisk.COWChunk(used.first)); gap > 0 {
			if hole.count == 0 {
				hole = stretch{uint64(s.l.NextData(next)), gap}
			}
			s.r.Leaked += gap
			holes++
		}
		next = ondisk.COWChunk(used.first + used.count)
	}
	s.r.NextFree = s.l.NextData(next)
	if holes == 0 {
		return
	}
	s.r.add(s.o.Limit, LeakedChunks, func() string {
		return fmt.Sprintf("COW chunk %d, byte 0x%x", hole.first, s.l.COWOffset(ondisk.COWChunk(hole.first)))
	},
		s.r.Leaked, func() string {
			return fmt.Sprintf("%s named by no slot; holes: %d, chunks in this one: %d", are(s.r.Leaked, "chunk"), holes, hole.count)
		})
}

// dataChunks is how many chunks in [from, to) can hold data.
func (s *scanner) dataChunks(from, to ondisk.COWChunk) uint64 {
	// Chunks 1 … m-1 hold ⌈(m-1)/(E+1)⌉ areas.
	areas := func(m ondisk.COWChunk) uint64 { e := s.l.SlotsPerArea(); return (uint64(m) - 1 + e) / (e + 1) }
	if to <= from {
		return 0
	}
	return uint64(to-from) - (areas(to) - areas(from))
}

// second is a slot that repeats a chunk of an earlier one. The earlier one is searched for afterwards: to remember the
// slots of all exceptions would take more memory than everything else.
type second struct {
	code  Code
	index int // in Report.Findings
	slot  ondisk.Slot
	e     ondisk.Exception
}

func (s *scanner) shared(c Code, slot ondisk.Slot, e ondisk.Exception) {
	if s.found(c, slot, "") != nil {
		s.twice = append(s.twice, &second{c, len(s.r.Findings) - 1, slot, e})
	}
}

// findFirsts reads the areas again, as far as needed, and completes the findings.
func (s *scanner) findFirsts() error {
	wanted := map[uint64][]*second{} // by the number that is there twice
	for _, t := range s.twice {
		wanted[t.number()] = append(wanted[t.number()], t)
	}
	done := map[*second]bool{}
	for e, err := range store.Scan(s.dev, s.l) {
		if err != nil || len(done) == len(s.twice) {
			break
		}
		if e.Slot.Index == 0 && s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		for _, n := range []uint64{uint64(e.Old), uint64(e.New)} {
			for _, t := range wanted[n] {
				if !done[t] && t.matches(s.l, s.chunks, e) {
					done[t] = true
					s.r.Findings[t.index].Detail = t.detail(s.l, e)
				}
			}
		}
	}
	for _, t := range s.twice {
		if !done[t] { // what was readable before no longer is
			s.r.Findings[t.index].Detail = t.detail(s.l, store.Entry{})
		}
	}
	return nil
}

func (t *second) number() uint64 {
	if t.code == COWShared {
		return uint64(t.e.New)
	}
	return uint64(t.e.Old)
}

// matches reports whether e is the slot that t repeats.
func (t *second) matches(l ondisk.Layout, chunks uint64, e store.Entry) bool {
	if e.Slot == t.slot || e.IsEnd() || !l.IsData(e.New) || uint64(e.New) >= chunks {
		return false
	}
	if t.code == COWShared {
		return e.New == t.e.New
	}
	return e.Old == t.e.Old
}

// detail describes both slots.
func (t *second) detail(l ondisk.Layout, e store.Entry) string {
	if t.code == COWShared {
		return fmt.Sprintf("COW chunk %d is said to keep origin chunk %d here, and origin chunk %d in %s", t.e.New, t.e.Old, e.Old, l.Place(e.Slot))
	}
	return fmt.Sprintf("origin chunk %d is said to be in COW chunk %d here (kernel 6.12 uses it), and in COW chunk %d in %s (kernel 6.1 uses that)", t.e.Old, t.e.New, e.New, l.Place(e.Slot))
}
