// Package gate synchronises work on the chunks of one snapshot: a chunk has at most one owner, and readers that an owner
// can wait for.
//
// Owners exclude each other chunk by chunk: a request that makes an exception, or one that writes while a merge is active.
// Readers are requests that read a chunk from the origin because it has no exception. They never wait, not even for an
// owner, so that reading a chunk that is being copied takes no longer than reading any other (checklist 47). Others wait
// for them, by [Gate.Drain], before the origin changes (docs/spec/dm-snapshot.md §5.6).
//
// There are as many holders as requests in flight, usually below a hundred, so they are two plain lists, one of owners and
// one of readers, each under a mutex. A new owner goes through the list once, counts the holders that it has to wait for,
// and registers with each; the last of them to release wakes it. So the cost of a release depends on who waits for it, not
// on the number of holders. Waiting owners are in the list too, and a later one that overlaps waits for them: all waits are
// for earlier holders, which rules out a deadlock, and an owner of many chunks does not starve.
package gate

import (
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/latency"
)

// A Span is chunks First to Last, both included.
type Span struct{ First, Last uint64 }

func (a Span) overlaps(b Span) bool { return a.First <= b.Last && b.First <= a.Last }
func (a Span) covers(b Span) bool   { return a.First <= b.First && b.Last <= a.Last }

// A Gate is ready in its zero value. Its methods may be called concurrently. It keeps memory for as many
// holders as it had at once.
type Gate struct {
	owning sync.Mutex
	owners holders // and those that wait to be

	reading sync.Mutex
	readers holders
	entered atomic.Int64 // len of readers, for Drain to look at without the lock

	owns, drains latency.Recorder // of those calls that had to wait
}

// OwnWaits returns how long calls of Own waited, those that had to.
func (g *Gate) OwnWaits() latency.Histogram { return g.owns.Histogram() }

// DrainWaits returns how long calls of Drain waited, those that had to.
func (g *Gate) DrainWaits() latency.Histogram { return g.drains.Histogram() }

// An Owned is what Own returned: chunks owned until Release.
type Owned struct{ ticket }

// Own waits until no chunk of the spans has another owner, and then owns all of them at once: so callers that own
// several spans can't deadlock with each other. Spans are ascending and disjoint. An owner of a chunk must not call Own
// for it again.
//
// First come, first served among those that overlap: a merge gets its whole window however many small owners follow.
func (g *Gate) Own(spans ...Span) Owned {
	hull := hullOf(spans)
	g.owning.Lock()
	h := g.owners.take(g, spans)
	g.owners.queue(h, hull)
	g.owners.add(h, hull)
	o := Owned{ticket{h, h.serial}}
	wait := h.waits > 0
	g.owning.Unlock()
	if wait {
		h.wait(&g.owns)
	}
	return o
}

// Release ends the ownership. Releasing twice panics.
func (o Owned) Release() {
	g := o.gate("released")
	g.owning.Lock()
	defer g.owning.Unlock()
	g.owners.drop(o.ticket, "released")
}

// A Reader is what Enter returned: it may be reading until Leave.
type Reader struct{ ticket }

// Enter registers a reader of the span. It never waits.
//
// After Enter the caller checks again whether it has to read from the origin. The request that makes an exception calls
// Drain after that, so it either finds this reader, or the exception was visible before Enter.
func (g *Gate) Enter(s Span) Reader {
	g.reading.Lock()
	h := g.readers.take(g, nil)
	g.readers.add(h, s)
	r := Reader{ticket{h, h.serial}}
	g.entered.Store(int64(len(g.readers.list)))
	g.reading.Unlock()
	return r
}

// Leave ends the reader. Leaving twice panics.
func (r Reader) Leave() {
	g := r.gate("left")
	g.reading.Lock()
	defer g.reading.Unlock()
	g.readers.drop(r.ticket, "left")
	g.entered.Store(int64(len(g.readers.list)))
}

// Drain waits until no reader is left that had entered before the call and whose span overlaps s.
// Readers that enter later aren't waited for, so it ends.
func (g *Gate) Drain(s Span) {
	// Without the lock: a reader that this misses entered after the exception was made, and finds it.
	if g.entered.Load() == 0 {
		return
	}
	g.reading.Lock()
	h := g.readers.take(g, nil) // it waits, but isn't in the list
	for _, x := range g.readers.list {
		if x.hull.overlaps(s) {
			h.waitFor(x.holder)
		}
	}
	wait := h.waits > 0
	g.reading.Unlock()
	if wait {
		h.wait(&g.drains)
	}
	g.reading.Lock()
	g.readers.giveBack(h)
	g.reading.Unlock()
}
