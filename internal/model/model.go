// Package model says what an origin and its snapshots must show: a second, deliberately simple telling of
// the specification, without devices, caches, locks or durability. Tests hold the engine against it.
//
// It shares no code with the engine, not even arithmetic: a mistake in one of the two shows as a
// difference. Everything is in sectors of [Sector] bytes. Nothing here is safe for concurrent use.
package model

import "fmt"

// Sector is the size of a sector in bytes.
const Sector = 512

// Result is what becomes of a request.
type Result int

const (
	OK Result = iota
	Invalid
	Overflow
)

func (r Result) String() string { return [...]string{"ok", "invalid", "overflow"}[r] }

// An Origin is a disk with snapshots.
type Origin struct {
	Raw       []byte // what stands on its disk
	Snapshots []*Snapshot
	Merging   *Snapshot // whose exceptions lie over the disk, nil: none
}

// A Snapshot is a COW device in use.
type Snapshot struct {
	Chunk      int64 // sectors
	COW        int64 // sectors of the COW device
	Store      string
	Zeroes     bool // discard_zeroes_cow
	invalid    bool
	overflowed bool
	origin     *Origin
	order      []int64          // origin chunks in the order of their exceptions
	data       map[int64][]byte // their content; short at the origin's end
}

// sectors is the origin's size.
func (o *Origin) sectors() int64 { return int64(len(o.Raw)) / Sector }

// Attach makes a snapshot with an empty store and adds it.
func (o *Origin) Attach(s *Snapshot) {
	s.origin, s.data = o, make(map[int64][]byte)
	o.Snapshots = append(o.Snapshots, s)
}

// Detach takes a snapshot off the origin; its store stays as it is.
func (o *Origin) Detach(s *Snapshot) {
	for i := range o.Snapshots {
		if o.Snapshots[i] == s {
			o.Snapshots = append(o.Snapshots[:i:i], o.Snapshots[i+1:]...)
			return
		}
	}
	panic("model: detaching what is not attached")
}

// Reopen loads a snapshot's store again: an overflow is forgotten, and a transient store with all it holds.
func (s *Snapshot) Reopen() {
	s.overflowed = false
	if s.Store == "N" {
		s.order, s.data, s.invalid = nil, make(map[int64][]byte), false
	}
	s.origin.Snapshots = append(s.origin.Snapshots, s)
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

// Status is the kernel's status text.
func (s *Snapshot) Status() string {
	switch n := int64(len(s.order)); {
	case s.invalid:
		return "Invalid"
	case s.overflowed:
		return "Overflow"
	case s.Store == "N":
		return fmt.Sprintf("%d/%d 0", s.chunksFor(n)*s.Chunk, s.COW)
	default:
		return fmt.Sprintf("%d/%d %d", s.chunksFor(n)*s.Chunk, s.COW, (s.chunksFor(n)-n)*s.Chunk)
	}
}

// Exceptions is how many there are.
func (s *Snapshot) Exceptions() int { return len(s.order) }

// bounds returns the sectors of an origin chunk.
func (s *Snapshot) bounds(chunk int64) (from, to int64) {
	return chunk * s.Chunk, min((chunk+1)*s.Chunk, s.origin.sectors())
}

// except makes an exception with the disk's content, if there is room.
func (s *Snapshot) except(chunk int64) bool {
	if s.data[chunk] != nil {
		return true
	}
	if s.chunksFor(int64(len(s.order))+1)*s.Chunk > s.COW {
		return false
	}
	from, to := s.bounds(chunk)
	s.data[chunk] = append([]byte(nil), s.origin.Raw[from*Sector:to*Sector]...)
	s.order = append(s.order, chunk)
	return true
}

// each calls f for every chunk of n sectors from at on, with the part of the range that lies in it, until
// f returns false.
func (s *Snapshot) each(at, n int64, f func(chunk, from, to int64) bool) {
	for end := at + n; at < end; {
		chunk := at / s.Chunk
		to := min((chunk+1)*s.Chunk, end)
		if !f(chunk, at, to) {
			return
		}
		at = to
	}
}

// Read returns what the snapshot shows.
func (s *Snapshot) Read(at, n int64) ([]byte, Result) {
	if s.invalid {
		return nil, Invalid
	}
	return s.overlay(at, n), OK
}

// overlay is the disk with the snapshot's chunks over it.
func (s *Snapshot) overlay(at, n int64) []byte {
	b := append([]byte(nil), s.origin.Raw[at*Sector:(at+n)*Sector]...)
	s.each(at, n, func(chunk, from, to int64) bool {
		if d := s.data[chunk]; d != nil {
			copy(b[(from-at)*Sector:(to-at)*Sector], d[(from-chunk*s.Chunk)*Sector:])
		}
		return true
	})
	return b
}

// Write writes to the snapshot. A request that finds no room has changed the chunks before that.
func (s *Snapshot) Write(at int64, p []byte) Result {
	switch {
	case s.invalid:
		return Invalid
	case s.overflowed:
		return Overflow
	}
	result := OK
	s.each(at, int64(len(p))/Sector, func(chunk, from, to int64) bool {
		if !s.except(chunk) {
			if s.Store == "PO" {
				s.overflowed, result = true, Overflow
			} else {
				s.invalid, result = true, Invalid
			}
			return false
		}
		copy(s.data[chunk][(from-chunk*s.Chunk)*Sector:], p[(from-at)*Sector:(to-at)*Sector])
		return true
	})
	return result
}

// Discard discards a range of the snapshot. It returns the parts whose content is undefined now, each
// sector of them as before or zero: see Adopt.
func (s *Snapshot) Discard(at, n int64) (undefined [][2]int64, r Result) {
	switch {
	case s.invalid:
		return nil, Invalid
	case s.overflowed:
		return nil, Overflow
	case !s.Zeroes:
		return nil, OK
	}
	s.each(at, n, func(chunk, from, to int64) bool {
		switch d := s.data[chunk]; {
		case d == nil:
		case to-from == s.Chunk:
			clear(d)
		default:
			undefined = append(undefined, [2]int64{from, to})
		}
		return true
	})
	return undefined, OK
}

// Adopt takes what is shown of an undefined range over, and reports whether it may be shown.
func (s *Snapshot) Adopt(at int64, p []byte) bool {
	before := s.overlay(at, int64(len(p))/Sector)
	for i := 0; i < len(p); i += Sector {
		was, is := before[i:i+Sector], p[i:i+Sector]
		if string(was) != string(is) && string(is) != string(make([]byte, Sector)) {
			return false
		}
	}
	s.each(at, int64(len(p))/Sector, func(chunk, from, to int64) bool {
		copy(s.data[chunk][(from-chunk*s.Chunk)*Sector:], p[(from-at)*Sector:(to-at)*Sector])
		return true
	})
	return true
}

// preserve has every snapshot keep what it shows of a range, before the disk changes there.
func (o *Origin) preserve(at, n int64) {
	for _, s := range o.Snapshots {
		if s.invalid {
			continue
		}
		s.each(at, n, func(chunk, _, _ int64) bool {
			s.invalid = !s.except(chunk)
			return !s.invalid
		})
	}
}

// Read returns what the origin shows: its disk, or what it will be when the merge is complete.
func (o *Origin) Read(at, n int64) []byte {
	if o.Merging != nil {
		return o.Merging.overlay(at, n)
	}
	return append([]byte(nil), o.Raw[at*Sector:(at+n)*Sector]...)
}

// Write writes to the origin. It never fails.
func (o *Origin) Write(at int64, p []byte) {
	m := o.Merging
	if m == nil {
		o.preserve(at, int64(len(p))/Sector)
		copy(o.Raw[at*Sector:], p)
		return
	}
	m.each(at, int64(len(p))/Sector, func(chunk, from, to int64) bool {
		part := p[(from-at)*Sector : (to-at)*Sector]
		if d := m.data[chunk]; d != nil {
			copy(d[(from-chunk*m.Chunk)*Sector:], part)
			return true
		}
		o.preserve(from, to-from)
		copy(o.Raw[from*Sector:], part)
		return true
	})
}

// BeginMerge lays the exceptions of an attached snapshot over the origin. It reports false for one that
// can't be merged.
func (o *Origin) BeginMerge(s *Snapshot) bool {
	if o.Merging != nil || s.Store == "N" || s.invalid {
		return false
	}
	o.Detach(s)
	o.Merging = s
	return true
}

// Step merges the last exceptions, at most max of them; with max 0 the run that a kernel would merge: the
// last one and those before it in its area that lead up to it, in origin and COW device alike. It returns
// how many.
func (o *Origin) Step(max int64) int64 {
	m := o.Merging
	n := int64(len(m.order))
	if n == 0 {
		return 0
	}
	k := min(max, n)
	if max == 0 {
		for k = 1; k < n && (n-1-k)/m.slots() == (n-1)/m.slots() && m.order[n-1-k] == m.order[n-1]-k; k++ {
		}
	}
	gone := m.order[n-k:]
	for _, chunk := range gone {
		from, to := m.bounds(chunk)
		o.preserve(from, to-from)
	}
	for _, chunk := range gone {
		from, _ := m.bounds(chunk)
		copy(o.Raw[from*Sector:], m.data[chunk])
		delete(m.data, chunk)
	}
	m.order = m.order[:n-k]
	return k
}

// EndMerge closes the merge, complete or not, and returns the snapshot, which is attached to nothing.
func (o *Origin) EndMerge() *Snapshot {
	m := o.Merging
	o.Merging = nil
	return m
}

// Valid reports whether the store can be read.
func (s *Snapshot) Valid() bool { return !s.invalid }
