// Package gate orders the work on the chunks of one snapshot: one owner a chunk, and readers that an
// owner can wait for, kept only while they are held.
//
// Owners exclude each other chunk by chunk: whoever makes an exception, or writes while a merge is under
// way. Readers are requests that read a chunk from the origin because it has no exception. They never
// wait, not even for an owner, so that reading a chunk that is just being copied takes no longer than
// reading any other (checklist 47). They are only ever waited for, by [Gate.Drain], before the origin
// changes beneath them (specification 5.6).
//
// Few holders are there at a time, as many as there are requests under way, so they are kept in plain
// lists under one lock; only a merge owns many spans at once, and those are searched by halving.
package gate

import (
	"sort"
	"sync"
	"sync/atomic"
)

// A Span is chunks First to Last, both included.
type Span struct{ First, Last uint64 }

func (a Span) overlaps(b Span) bool { return a.First <= b.Last && b.First <= a.Last }

// A Gate is ready in its zero value. Its methods may be called concurrently.
type Gate struct {
	mu      sync.Mutex
	owners  []*Owned // holding
	waiting []*Owned // in the order in which they came

	readers  []reader // slots; free ones have a zero serial
	free     []int
	serial   uint64
	left     *sync.Cond   // a reader that somebody may wait for has left; made at need
	draining int          // callers that wait in Drain
	entered  atomic.Int64 // readers inside
}

// reader is one slot of Gate.readers.
type reader struct {
	span   Span
	serial uint64 // unique per Enter; 0: the slot is free
}

// Owned is what Own returned: chunks owned until Release.
type Owned struct {
	gate  *Gate
	spans []Span // ascending, disjoint
	one   [1]Span
	ready chan struct{} // closed when a waiting owner gets its turn; nil if it never waited
}

var pool = sync.Pool{New: func() any { return new(Owned) }}

// Own waits until nobody else owns a chunk of the spans, and then owns all of them at once: so callers
// that own several spans can't deadlock with each other. Spans are ascending and disjoint.
//
// First come, first served among those that overlap: a merge that wants a whole window gets it however
// many small owners follow.
func (g *Gate) Own(spans ...Span) *Owned {
	o := pool.Get().(*Owned)
	o.gate, o.ready = g, nil
	if len(spans) == 1 {
		o.one[0] = spans[0]
		o.spans = o.one[:]
	} else {
		o.spans = append([]Span(nil), spans...)
	}
	g.mu.Lock()
	if !overlapsAny(o, g.owners) && !overlapsAny(o, g.waiting) {
		g.owners = append(g.owners, o)
		g.mu.Unlock()
		return o
	}
	o.ready = make(chan struct{})
	ready := o.ready
	g.waiting = append(g.waiting, o)
	g.mu.Unlock()
	<-ready
	return o
}

// Release gives the chunks up. Releasing twice panics.
func (o *Owned) Release() {
	g := o.gate
	if g == nil {
		panic("gate: released twice")
	}
	g.mu.Lock()
	for i, x := range g.owners {
		if x == o {
			last := len(g.owners) - 1
			g.owners[i], g.owners[last] = g.owners[last], nil
			g.owners = g.owners[:last]
			break
		}
	}
	g.admit()
	g.mu.Unlock()
	o.gate, o.spans = nil, nil
	pool.Put(o)
}

// admit lets those waiting in who overlap neither an owner nor anybody who came before them. g.mu is
// held.
func (g *Gate) admit() {
	still := g.waiting[:0]
	for _, w := range g.waiting {
		if overlapsAny(w, g.owners) || overlapsAny(w, still) {
			still = append(still, w)
			continue
		}
		g.owners = append(g.owners, w)
		close(w.ready)
	}
	clear(g.waiting[len(still):])
	g.waiting = still
}

func overlapsAny(o *Owned, others []*Owned) bool {
	for _, x := range others {
		if overlap(o.spans, x.spans) {
			return true
		}
	}
	return false
}

// overlap reports whether two ascending lists of disjoint spans share a chunk: each span of the shorter
// is searched for in the longer.
func overlap(a, b []Span) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	for _, s := range a {
		i := 0
		if len(b) > 1 {
			i = sort.Search(len(b), func(i int) bool { return b[i].Last >= s.First })
		}
		if i < len(b) && s.overlaps(b[i]) {
			return true
		}
	}
	return false
}

// A Reader is what Enter returned.
type Reader struct {
	gate *Gate
	slot int
}

// Enter registers a reader of the span. It never waits for anybody.
//
// A caller looks after Enter whether it still has to read from the origin: whoever made the exception
// before that either drains after it, and finds this reader, or made it visible before.
func (g *Gate) Enter(s Span) Reader {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.serial++
	slot := len(g.readers)
	if k := len(g.free) - 1; k >= 0 {
		slot = g.free[k]
		g.free = g.free[:k]
		g.readers[slot] = reader{s, g.serial}
	} else {
		g.readers = append(g.readers, reader{s, g.serial})
	}
	g.entered.Add(1)
	return Reader{g, slot}
}

// Leave ends the reader. It is called once.
func (r Reader) Leave() {
	g := r.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.readers[r.slot] = reader{}
	g.free = append(g.free, r.slot)
	g.entered.Add(-1)
	if g.draining > 0 {
		g.left.Broadcast()
	}
}

// Drain waits until no reader is left that had entered before the call and whose span overlaps s.
// Readers that enter later aren't waited for, so it ends.
func (g *Gate) Drain(s Span) {
	if g.entered.Load() == 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.left == nil {
		g.left = sync.NewCond(&g.mu)
	}
	upTo := g.serial
	g.draining++
	defer func() { g.draining-- }()
	for i := 0; i < len(g.readers); {
		if r := g.readers[i]; r.serial != 0 && r.serial <= upTo && r.span.overlaps(s) {
			g.left.Wait() // for any to leave; then look at the same slot again
			continue
		}
		i++
	}
}
