// Package model is the reference for the content of an origin and its snapshots: a second, deliberately simple
// implementation of the specification, without devices, caches, locks or durability. Tests compare the engine with it.
//
// Taking a snapshot copies the whole disk. What the engine finds out by looking where a chunk is stored is here
// simply the copy; which chunks have exceptions is kept beside it, and decides nothing but what is counted,
// what is full, and what a merge moves. So an exception that the engine forgets shows as a content that
// differs, and one too many as a number that differs.
//
// It shares no code with the engine, not even arithmetic. Everything is in sectors of [Sector] bytes.
// Nothing here is safe for concurrent use.
package model

import (
	"slices"
)

// Sector is the size of a sector in bytes.
const Sector = 512

// Result is the result of a request.
type Result int

const (
	OK       Result = iota
	Invalid         // the snapshot is invalid
	Overflow        // a PO snapshot was full once
	NoRoom          // there is no space, and the policy is only to fail the write
)

func (r Result) String() string { return [...]string{"ok", "invalid", "overflow", "no space"}[r] }

// An Origin is a disk with snapshots.
type Origin struct {
	Raw     []byte      // the content of its disk
	Merging *Snapshot   // whose exceptions lie over the disk, nil: none
	active  []*Snapshot // in the order in which a write visits them
	known   []*Snapshot // all that there ever were
}

// New returns an origin with a copy of this content.
func New(content []byte) *Origin { return &Origin{Raw: slices.Clone(content)} }

// sectors is the origin's size.
func (o *Origin) sectors() int64 { return int64(len(o.Raw)) / Sector }

// Attach makes a snapshot with an empty store.
func (o *Origin) Attach(c Config) *Snapshot {
	s := &Snapshot{Config: c, origin: o, view: slices.Clone(o.Raw)}
	o.known = append(o.known, s)
	o.insert(s)
	return s
}

// insert has writes visit s: larger chunks first, equals in the order of their coming (docs/spec/dm-snapshot.md §5.2).
func (o *Origin) insert(s *Snapshot) {
	i := 0
	for i < len(o.active) && o.active[i].Chunk >= s.Chunk {
		i++
	}
	o.active = slices.Insert(o.active, i, s)
}

// Read returns what the origin shows: its disk, or what it will be when the merge is complete.
func (o *Origin) Read(at, n int64) []byte {
	shown := o.Raw
	if m := o.Merging; m != nil && !m.invalid {
		shown = m.view
	}
	return slices.Clone(shown[at*Sector : (at+n)*Sector])
}

// Write writes to the origin. It fails only with NoRoom, to protect a snapshot; parts of the request before that, in
// pieces of one kind of chunks, stay written.
func (o *Origin) Write(at int64, p []byte) Result {
	m := o.Merging
	if m == nil || m.invalid {
		if r := o.preserve(at, int64(len(p))/Sector); r != OK {
			return r
		}
		o.put(at, p)
		return OK
	}
	for len(p) > 0 {
		n := m.alike(at, int64(len(p))/Sector)
		if m.index(at/m.Chunk) < 0 {
			if r := o.preserve(at, n); r != OK {
				return r
			}
			o.put(at, p[:n*Sector])
		}
		copy(m.view[at*Sector:], p[:n*Sector])
		at, p = at+n, p[n*Sector:]
	}
	return OK
}

// preserve makes every active snapshot's exceptions for a range, durably, before the disk changes there.
func (o *Origin) preserve(at, n int64) Result {
	for _, s := range o.active {
		for _, chunk := range s.chunks(at, n) {
			if s.invalid || s.except(chunk) {
				continue
			} else if s.FailFull {
				return NoRoom // and nothing is changed, so nothing had to be durable
			}
			s.invalid = true
		}
	}
	for _, s := range o.active {
		for _, chunk := range s.chunks(at, n) {
			s.synced = max(s.synced, s.index(chunk)+1)
		}
	}
	return OK
}

// put changes the disk. What a snapshot doesn't preserve changes in it too: past its end, and everything when
// it is not active. There it shows only once it is merged, or attached again.
func (o *Origin) put(at int64, p []byte) {
	copy(o.Raw[at*Sector:], p)
	n := int64(len(p)) / Sector
	for _, s := range o.known {
		from := at
		if slices.Contains(o.active, s) {
			from = max(at, s.Size)
		}
		s.follow(from, at+n)
	}
}

// BeginMerge lays the exceptions of a snapshot over the origin. It may be active, which is a handover, or
// not. It reports false for one that can't be merged.
func (o *Origin) BeginMerge(s *Snapshot) bool {
	if o.Merging != nil || s.Store == "N" {
		return false
	}
	if slices.Contains(o.active, s) {
		s.Detach()
	} else {
		s.overflowed = false // loaded again
	}
	o.Merging = s
	return true
}

// Step merges the last exceptions, at most max of them; with max 0 the run that a kernel would merge: the last one and
// those before it in its area that are consecutive with it on the origin and on the COW device. It returns how many.
// NoRoom makes the merge a failed one, until the next step.
func (o *Origin) Step(limit int64) (int64, Result) {
	m := o.Merging
	n := int64(len(m.order))
	if m.invalid {
		return 0, Invalid
	}
	if n == 0 {
		return 0, OK
	}
	k := min(limit, n)
	if limit == 0 {
		for k = 1; k < n && m.leadsTo(n-1-k, n-k); k++ {
		}
	}
	window := make([]int64, k) // numbers of exceptions, in the order of their origin chunks
	for i := range window {
		window[i] = n - k + int64(i)
	}
	slices.SortFunc(window, func(a, b int64) int { return int(m.order[a] - m.order[b]) })
	for i := 0; i < len(window); { // run by run
		j := i + 1
		for j < len(window) && m.leadsTo(window[j-1], window[j]) {
			j++
		}
		from, _ := m.bounds(m.order[window[i]])
		_, to := m.bounds(m.order[window[j-1]])
		if r := o.preserve(from, to-from); r != OK {
			m.failed = true
			return 0, r
		}
		i = j
	}
	for _, i := range window {
		from, to := m.bounds(m.order[i])
		o.put(from, m.view[from*Sector:to*Sector])
	}
	m.order = m.order[:n-k]
	m.synced = len(m.order)
	m.failed = false
	return k, OK
}

// EndMerge closes the merge, complete or not. The snapshot is then one that is not active.
func (o *Origin) EndMerge() *Snapshot {
	m := o.Merging
	o.Merging = nil
	m.overflowed, m.failed = false, false
	return m
}
