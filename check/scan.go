package check

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A scanner is one check in progress.
type scanner struct {
	ctx    context.Context
	dev    block.Device
	o      Options
	r      *Report
	l      ondisk.Layout
	chunks uint64 // whole ones on the device

	olds, news set
	maxOld     uint64 // origin chunks from here on are impossible
	originEnd  uint64 // an origin chunk from here on is not in the origin; MaxUint64: not known

	prev      ondisk.COWChunk  // of the last slot whose chunk was in allocation order, or past a truncated device
	areaNext  uint64           // the first area chunk behind prev, so that few divisions are made
	lastSound ondisk.Exception // to count runs
	ended     bool             // the end mark was met
	fetched   uint64           // unused; it keeps the compiler from removing fetch

	disorder, beyond, past first // findings that are reported once, with all their slots
	need                   uint64
	twice                  []*second
}

// first is the first place of a problem, and how often it was found.
type first struct {
	slot  ondisk.Slot
	e     ondisk.Exception
	count uint64
}

func (f *first) met(s ondisk.Slot, e ondisk.Exception) {
	if f.count == 0 {
		f.slot, f.e = s, e
	}
	f.count++
}

// areas checks one area after the other.
func (s *scanner) areas() error {
	s.maxOld = uint64(math.MaxInt64)>>s.l.Shift() + 1 // the last chunk may overlap the largest offset
	s.originEnd = math.MaxUint64
	if s.o.Origin != nil {
		s.originEnd = s.l.Chunks(s.o.Origin.Size(), true)
	}
	s.prev, s.areaNext = ondisk.FirstDataChunk-1, uint64(s.l.AreaChunk(1))
	for area := uint64(0); !s.ended; area++ {
		if err := context.Cause(s.ctx); err != nil {
			return err
		}
		if uint64(s.l.AreaChunk(area)) >= s.chunks {
			s.noArea(area)
			return nil
		}
		s.r.Areas = area + 1
		s.area(area)
		if s.o.Progress != nil {
			s.o.Progress(s.l.COWOffset(s.l.AreaChunk(area))+s.l.ChunkBytes(), s.r.Size)
		}
	}
	return nil
}

// noArea reports that an area is missing.
func (s *scanner) noArea(area uint64) {
	off := s.l.COWOffset(s.l.AreaChunk(area))
	c, why := NoEndMark, "the device ends exactly there"
	switch {
	case s.past.count > 0:
		c, why = AreaPastDevice, "the device ends before it, and data of exceptions in earlier areas is missing too"
	case off < s.r.Size:
		c, why = AreaPastDevice, fmt.Sprintf("only %d bytes of it are on the device", s.r.Size-off)
	}
	s.r.add(s.o.Limit, c, func() string { return fmt.Sprintf("area %d, byte 0x%x", area, off) }, 1,
		func() string {
			return fmt.Sprintf("all slots of area %d are used, so that area %d must follow: %s", area-1, area, why)
		})
}

// area checks the slots of one area.
func (s *scanner) area(area uint64) {
	void := first{}
	var last ondisk.Slot
	for p := range store.RawArea(s.dev, s.l, area) {
		if p.Err != nil {
			s.unreadable(area, p)
			continue
		}
		at := ondisk.Slot{Area: area, Index: p.Index}
		b := p.Bytes
		if !s.ended {
			n := s.slots(at, b)
			at.Index += uint64(n)
			b = b[n*ondisk.SlotSize:]
		}
		if s.ended {
			for len(b) > 0 {
				skip := leadingZeros(b) / ondisk.SlotSize
				at.Index += uint64(skip)
				if b = b[skip*ondisk.SlotSize:]; len(b) > 0 {
					void.met(at, ondisk.DecodeException(b))
					last = at
					at.Index++
					b = b[ondisk.SlotSize:]
				}
			}
		}
	}
	if void.count > 0 {
		s.r.add(s.o.Limit, VoidSlots, func() string { return s.l.Place(void.slot) }, void.count, func() string {
			return fmt.Sprintf("%s not zero, the last is slot %d; the first says that origin chunk %d is in COW chunk %d", are(void.count, "slot"), last.Index, void.e.Old, void.e.New)
		})
	}
}

var zeros [4096]byte

// leadingZeros is how many bytes b begins with that are zero, as whole slots.
func leadingZeros(b []byte) int {
	n := 0
	for len(b)-n >= len(zeros) && bytes.Equal(b[n:n+len(zeros)], zeros[:]) {
		n += len(zeros)
	}
	for n < len(b) && bytes.Equal(b[n:n+ondisk.SlotSize], zeros[:ondisk.SlotSize]) {
		n += ondisk.SlotSize
	}
	return n
}

func (s *scanner) unreadable(area uint64, p store.RawPiece) {
	s.r.add(s.o.Limit, Unreadable, func() string { return s.l.Place(ondisk.Slot{Area: area, Index: p.Index}) }, uint64(p.Missing)/ondisk.SlotSize,
		func() string {
			return fmt.Sprintf("%s not to be read: %v", are(uint64(p.Missing)/ondisk.SlotSize, "slot"), p.Err)
		})
}

// fetchSlots is for how many slots ahead the words of the set are fetched.
const fetchSlots = 64

// slots checks slots up to the end mark, and returns how many bytes of b it checked, the end mark included. It is the
// inner loop, for tens of millions of exceptions.
func (s *scanner) slots(at ondisk.Slot, b []byte) int {
	n := 0
	for ; len(b) >= ondisk.SlotSize; b = b[ondisk.SlotSize:] {
		if n%fetchSlots == 0 {
			s.fetched += s.olds.fetch(b[:min(len(b), fetchSlots*ondisk.SlotSize)])
		}
		e := ondisk.Exception{Old: ondisk.OriginChunk(binary.LittleEndian.Uint64(b)), New: ondisk.COWChunk(binary.LittleEndian.Uint64(b[8:]))}
		slot := ondisk.Slot{Area: at.Area, Index: at.Index + uint64(n)}
		n++
		if e.New == 0 {
			s.ended = true
			if e.Old != 0 {
				s.found(HeaderNamed, slot, "origin chunk %d is said to be in COW chunk 0; the exceptions end here", e.Old)
			}
			return n
		}
		s.r.Slots++
		wrong := s.examine(slot, e)
		if wrong == 0 {
			s.r.Exceptions++
			s.r.LastOrigin = max(s.r.LastOrigin, e.Old)
			if e.Old != s.lastSound.Old+1 || e.New != s.lastSound.New+1 || s.r.Runs == 0 {
				s.r.Runs++
			}
			s.lastSound = e
		}
		if s.o.Each != nil {
			s.o.Each(store.Entry{Slot: slot, Exception: e}, wrong)
		}
	}
	return n
}

// examine returns the first problem of a slot, or 0, and records all.
func (s *scanner) examine(slot ondisk.Slot, e ondisk.Exception) Code {
	wrong := Code(0)
	if c := s.judgeNew(slot, e); c != 0 {
		wrong = c
	} else if !s.news.add(uint64(e.New)) {
		s.shared(COWShared, slot, e)
		wrong = COWShared
	}
	switch {
	case uint64(e.Old) >= s.maxOld:
		s.found(OriginImpossible, slot, "origin chunk %d, of %d bytes a chunk", e.Old, s.l.ChunkBytes())
		wrong = cmpOr(wrong, OriginImpossible)
	case wrong != 0:
		// A slot that is dropped for its COW chunk does not make another slot for its origin chunk a duplicate.
	case !s.olds.add(uint64(e.Old)):
		s.shared(DuplicateOrigin, slot, e)
		wrong = DuplicateOrigin
	case uint64(e.Old) >= s.originEnd:
		s.beyond.met(slot, e)
	}
	return wrong
}

func cmpOr(a, b Code) Code {
	if a != 0 {
		return a
	}
	return b
}

// judgeNew checks the COW chunk of a slot.
func (s *scanner) judgeNew(slot ondisk.Slot, e ondisk.Exception) Code {
	new := uint64(e.New)
	if new > uint64(s.prev) && new < s.areaNext && new < s.chunks {
		s.prev = e.New
		return 0 // the usual case: shortly after the one before, in the same area's data
	}
	switch {
	case new >= 1<<56:
		s.found(COWTooLarge, slot, "origin chunk %d is said to be in COW chunk 0x%x", e.Old, new)
		return COWTooLarge
	case new >= s.chunks:
		return s.pastDevice(slot, e)
	case s.l.IsArea(e.New):
		s.found(COWIsMetadata, slot, "origin chunk %d is said to be in COW chunk %d, which is area %d", e.Old, new, new/(s.l.SlotsPerArea()+1))
		return COWIsMetadata
	case new < uint64(s.prev):
		s.disorder.met(slot, e)
	}
	s.prev = e.New
	s.areaNext = uint64(s.l.AreaChunk((new-1)/(s.l.SlotsPerArea()+1) + 1))
	return 0
}

// pastDevice distinguishes a truncated device from an invalid slot: in a truncated store the chunks continue in the
// order of allocation.
func (s *scanner) pastDevice(slot ondisk.Slot, e ondisk.Exception) Code {
	n := slot.Area*s.l.SlotsPerArea() + slot.Index
	if e.New == s.l.DataChunk(n) || e.New == s.l.NextData(s.prev+1) {
		s.past.met(slot, e)
		s.prev = e.New
		s.need = max(s.need, uint64(e.New)+1)
		return DeviceCut
	}
	s.found(COWPastDevice, slot, "origin chunk %d is said to be in COW chunk %d; the device has %d chunks", e.Old, e.New, s.chunks)
	return COWPastDevice
}

// found records a finding about one slot.
func (s *scanner) found(c Code, slot ondisk.Slot, format string, args ...any) *Finding {
	return s.r.add(s.o.Limit, c, func() string { return s.l.Place(slot) }, 1, func() string { return fmt.Sprintf(format, args...) })
}
