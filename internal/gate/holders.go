package gate

import (
	"sort"

	"github.com/dmsnap/dmsnap/latency"
)

// A holder is an owner, a waiting owner, a reader, or a call of Drain.
type holder struct {
	gate   *Gate
	serial uint64        // increases with each use, so that a ticket of an earlier use is recognised
	at     int           // its index in the list
	spans  []Span        // an owner's
	waits  int           // how many holders it still waits for
	ready  chan struct{} // gets a value when waits is 0 again; made at the first wait
	behind []*holder     // holders that wait for it
}

// waitFor makes h wait until x releases.
func (h *holder) waitFor(x *holder) {
	if h.ready == nil {
		h.ready = make(chan struct{}, 1)
	}
	h.waits++
	x.behind = append(x.behind, h)
}

// wait waits until all that h waits for have gone, and records how long that took. No lock is held.
func (h *holder) wait(took *latency.Recorder) {
	begin := latency.Now()
	<-h.ready
	took.Add(begin.Since())
}

// A ticket is one use of a holder.
type ticket struct {
	holder *holder
	serial uint64
}

// gate returns the gate of a ticket. A holder never changes its gate.
func (t ticket) gate(done string) *Gate {
	if t.holder == nil {
		panic("gate: " + done + " what was never held")
	}
	return t.holder.gate
}

// holders is the list of holders, unordered, and of unused ones for reuse. The hulls are in the list because every
// search goes through all of it.
type holders struct {
	list   []held
	unused []*holder
	serial uint64
}

type held struct {
	hull Span // from its first chunk to its last
	*holder
}

// take returns a holder with a new serial, which isn't in the list.
func (l *holders) take(g *Gate, spans []Span) *holder {
	var h *holder
	if last := len(l.unused) - 1; last >= 0 {
		h = l.unused[last]
		l.unused = l.unused[:last]
	} else {
		h = &holder{gate: g}
	}
	l.serial++
	h.serial = l.serial
	h.spans = append(h.spans, spans...)
	return h
}

func (l *holders) add(h *holder, hull Span) {
	h.at = len(l.list)
	l.list = append(l.list, held{hull, h})
}

// queue makes h, which has come last, wait for all in the list that overlap it.
//
// It need not wait for each: a holder that covers all of h waits itself for earlier ones that overlap h, so h waits
// only for the latest such holder and for those after it. Otherwise a thousand requests for the same chunk would make
// half a million entries.
func (l *holders) queue(h *holder, hull Span) {
	since, overlap := uint64(0), false
	for _, x := range l.list {
		if x.hull.overlaps(hull) && x.overlaps(h) {
			overlap = true
			if len(x.spans) == 1 && x.hull.covers(hull) {
				since = max(since, x.serial)
			}
		}
	}
	if !overlap {
		return
	}
	for _, x := range l.list {
		if x.serial >= since && x.hull.overlaps(hull) && x.overlaps(h) {
			h.waitFor(x.holder)
		}
	}
}

// overlaps reports whether two owners, whose hulls overlap, share a chunk. Each span of the one with
// fewer is searched for in the other.
func (h *holder) overlaps(x *holder) bool {
	few, many := h.spans, x.spans
	if len(few) > len(many) {
		few, many = many, few
	}
	for _, s := range few {
		i := 0
		if len(many) > 1 {
			i = sort.Search(len(many), func(i int) bool { return many[i].Last >= s.First })
		}
		many = many[i:] // the next span is after it
		if len(many) == 0 {
			return false
		}
		if s.overlaps(many[0]) {
			return true
		}
	}
	return false
}

// drop removes the holder of a ticket from the list and wakes holders that waited only for it.
func (l *holders) drop(t ticket, done string) {
	h := t.holder
	if h.serial != t.serial {
		panic("gate: " + done + " twice")
	}
	last := len(l.list) - 1
	l.list[h.at] = l.list[last]
	l.list[h.at].at = h.at
	l.list[last] = held{}
	l.list = l.list[:last]
	for _, w := range h.behind {
		if w.waits--; w.waits == 0 {
			w.ready <- struct{}{} // never blocks: a holder waits once in a use
		}
	}
	l.giveBack(h)
}

// giveBack keeps h for reuse, without slices that are unusually large.
func (l *holders) giveBack(h *holder) {
	h.serial = 0 // unused
	clear(h.behind)
	h.spans, h.behind = h.spans[:0], h.behind[:0]
	if cap(h.spans) > 16 {
		h.spans = nil
	}
	if cap(h.behind) > 16 {
		h.behind = nil
	}
	l.unused = append(l.unused, h)
}

// hullOf returns the span from the first chunk to the last.
func hullOf(spans []Span) Span {
	if len(spans) == 0 {
		panic("gate: no spans")
	}
	for i, s := range spans {
		if s.First > s.Last || i > 0 && s.First <= spans[i-1].Last {
			panic("gate: spans must be ascending and disjoint")
		}
	}
	return Span{spans[0].First, spans[len(spans)-1].Last}
}
