package model

import (
	"fmt"
	"slices"
)

// Config is how a COW device is used. All sizes are in sectors.
type Config struct {
	Store    string // P, PO or N
	Chunk    int64
	COW      int64 // the COW device's size
	Size     int64 // of the snapshot
	Always   bool  // every write is durable
	Zeroes   bool  // discard_zeroes_cow
	Passdown bool  // discard_passdown_origin
	FailFull bool  // without space writes fail, here and on the origin, and nothing else happens
	GrowStep int64 // by how much the COW device is made longer when it is full, 0: never
	GrowMax  int64 // its greatest size then, 0: any
}

// A Snapshot is a copy of a disk, with what was written to it.
type Snapshot struct {
	Config
	origin     *Origin
	view       []byte  // as long as the origin
	order      []int64 // origin chunks in the order of their exceptions
	synced     int     // the number of them that are certainly on disk
	invalid    bool
	overflowed bool
	failed     bool // the last step of its merge failed
}

// Detach makes the snapshot inactive; its store stays as it is, all of it on disk.
func (s *Snapshot) Detach() {
	s.origin.active = slices.DeleteFunc(s.origin.active, func(t *Snapshot) bool { return t == s })
	s.Flush()
}

// Reattach loads the store of an inactive snapshot: an overflow is forgotten, and a transient store with all
// it held.
func (s *Snapshot) Reattach() {
	s.overflowed = false
	if s.Store == "N" {
		s.order, s.invalid = nil, false
		copy(s.view, s.origin.Raw)
	}
	s.origin.insert(s)
}

// slots is E, the exceptions an area holds.
func (s *Snapshot) slots() int64 { return s.Chunk * Sector / 16 }

// chunksFor is how many chunks a COW device needs for n exceptions: header, areas up to the one with the
// next free slot, and data.
func (s *Snapshot) chunksFor(n int64) int64 {
	if s.Store == "N" {
		return n
	}
	return 1 + (1 + n/s.slots()) + n
}

// home is the COW chunk of the i-th exception: what was there before it, and areas up to its own.
func (s *Snapshot) home(i int64) int64 {
	if s.Store == "N" {
		return i
	}
	return 1 + (1 + i/s.slots()) + i
}

// leadsTo reports whether two exceptions of one area are adjacent on the origin and on the COW device.
func (s *Snapshot) leadsTo(i, j int64) bool {
	return s.order[i]+1 == s.order[j] && s.home(i)+1 == s.home(j)
}

// Status is the kernel's status text.
func (s *Snapshot) Status() string {
	switch n := int64(len(s.order)); {
	case s.invalid:
		return "Invalid"
	case s.failed:
		return "Merge failed"
	case s.overflowed:
		return "Overflow"
	case s.Store == "N":
		return fmt.Sprintf("%d/%d 0", s.chunksFor(n)*s.Chunk, s.COW)
	default:
		return fmt.Sprintf("%d/%d %d", s.chunksFor(n)*s.Chunk, s.COW, (s.chunksFor(n)-n)*s.Chunk)
	}
}

// Valid reports whether the store can be read.
func (s *Snapshot) Valid() bool { return !s.invalid }

// Exceptions is how many there are.
func (s *Snapshot) Exceptions() int { return len(s.order) }

// Slots are the exceptions in the order of their slots: origin chunk, COW chunk. The first synced of them are on disk.
func (s *Snapshot) Slots() (slots [][2]int64, synced int) {
	for i, chunk := range s.order {
		slots = append(slots, [2]int64{chunk, s.home(int64(i))})
	}
	return slots, s.synced
}

// InCOW reports whether a sector is stored in the COW device.
func (s *Snapshot) InCOW(at int64) bool { return s.index(at/s.Chunk) >= 0 }

// index is which exception a chunk has, -1: none.
func (s *Snapshot) index(chunk int64) int { return slices.Index(s.order, chunk) }

// bounds returns the sectors of an origin chunk.
func (s *Snapshot) bounds(chunk int64) (from, to int64) {
	return chunk * s.Chunk, min((chunk+1)*s.Chunk, s.origin.sectors())
}

// chunks lists those of the snapshot that a range touches.
func (s *Snapshot) chunks(at, n int64) (all []int64) {
	for i := at; i < min(at+n, s.Size); i++ {
		if c := i / s.Chunk; len(all) == 0 || all[len(all)-1] != c {
			all = append(all, c)
		}
	}
	return all
}

// except makes an exception, unless there is one, and if there is space.
func (s *Snapshot) except(chunk int64) bool {
	if s.index(chunk) >= 0 {
		return true
	}
	need := s.chunksFor(int64(len(s.order))+1) * s.Chunk
	if need > s.COW && s.GrowStep > 0 {
		longer := s.COW + max(s.GrowStep, 2*s.Chunk)
		if s.GrowMax > 0 {
			longer = min(longer, s.GrowMax)
		}
		s.COW = max(s.COW, longer)
	}
	if need > s.COW {
		return false
	}
	s.order = append(s.order, chunk)
	return true
}

// alike is how many of n sectors from at on lie in consecutive chunks that all have exceptions, or all none.
func (s *Snapshot) alike(at, n int64) int64 {
	k := int64(1)
	for k < n && s.InCOW(at+k) == s.InCOW(at) {
		k++
	}
	return k
}

// follow shows the disk in sectors from..to, where there are no exceptions.
func (s *Snapshot) follow(from, to int64) {
	for at := from; at < to; at++ {
		if !s.InCOW(at) {
			copy(s.view[at*Sector:(at+1)*Sector], s.origin.Raw[at*Sector:])
		}
	}
}

// Read returns what the snapshot shows.
func (s *Snapshot) Read(at, n int64) ([]byte, Result) {
	if s.invalid {
		return nil, Invalid
	}
	return slices.Clone(s.view[at*Sector : (at+n)*Sector]), OK
}

// refused is why a write fails whatever it writes.
func (s *Snapshot) refused() Result {
	switch {
	case s.invalid:
		return Invalid
	case s.overflowed:
		return Overflow
	}
	return OK
}

// Write writes to the snapshot. A request that runs out of space has changed the chunks before that.
func (s *Snapshot) Write(at int64, p []byte) Result {
	if r := s.refused(); r != OK {
		return r
	}
	for i := int64(0); i < int64(len(p))/Sector; i++ { // sector by sector
		switch {
		case s.except((at + i) / s.Chunk):
			copy(s.view[(at+i)*Sector:], p[i*Sector:(i+1)*Sector])
		case s.FailFull:
			return NoRoom
		case s.Store == "PO":
			s.overflowed = true
			return Overflow
		default:
			s.invalid = true
			return Invalid
		}
	}
	if s.Always {
		s.Flush()
	}
	return OK
}

// Flush makes every exception durable.
func (s *Snapshot) Flush() {
	if !s.invalid {
		s.synced = len(s.order)
	}
}

// Discard discards a range of the snapshot. What is discarded of a device reads as zeros.
func (s *Snapshot) Discard(at, n int64) Result {
	if r := s.refused(); r != OK || !s.Zeroes {
		return r
	}
	for i := at; i < at+n; i++ {
		if s.InCOW(i) {
			clear(s.view[i*Sector : (i+1)*Sector])
		}
	}
	if s.Passdown { // past everybody's exceptions
		clear(s.origin.Raw[at*Sector : (at+n)*Sector])
		for _, t := range s.origin.known {
			t.follow(at, at+n)
		}
	}
	return OK
}
