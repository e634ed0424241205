package vhost

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/internal/inline"
)

// Quick requests are executed by the goroutine that fetches (package inline), and signalled together: when no more are
// available, or quickBatch are held back. When one is overdue, the watchdog starts another goroutine that fetches.
const (
	quickBytes = 64 << 10 // of data of a request
	quickBatch = 16       // completions whose signal is held back at most
)

// inlineState is the state of inline execution of a queue. The goroutine that fetches uses what is not atomic.
type inlineState struct {
	reads, writes inline.Trial
	heldBack      int // completions without a signal
	watchdog      *inline.Watchdog
}

// awake counts the goroutines that fetch and do not wait for a kick. Requests are executed inline only while they are no more than
// processors: one that never waits keeps its processor, and others would get it only when the scheduler preempts it.
var awake atomic.Int32

var processors = int32(runtime.GOMAXPROCS(0))

// trial returns the trial for requests of the kind of c, nil for those that are never executed inline. It goes by
// the buffers' sizes: only reads have room for a sector, only writes bring one.
func (h *inlineState) trial(c *chain) *inline.Trial {
	out, in := c.out.total(), c.in.total()
	switch {
	case c.bad != nil || out+in > quickBytes+17:
	case out == 16 && in > 512:
		return &h.reads
	case in == 1 && out >= 16+512:
		return &h.writes
	}
	return nil
}

// mayInline reports whether a request is likely to be quick.
func (q *queue) mayInline(c *chain) bool {
	t := q.inline.trial(c)
	return t != nil && t.Passed() && awake.Load() <= processors
}

// executeInline executes a request on the goroutine that fetches. kept is false when another one fetches now.
func (q *queue) executeInline(c *chain) (kept bool, err error) {
	q.requests.Add(1)
	defer q.requests.Done()
	defer func() { <-q.room }()
	defer c.release()
	mark := q.inline.watchdog.Arm()
	fault := guard(q.s.shared(q.table, c.table), func() {
		if written, ok := q.timed(c); ok {
			q.push(c.head, written)
		}
	})
	if kept = q.inline.watchdog.Disarm(mark); fault != nil || !kept {
		if fault == nil {
			fault = guard(q.s.shared(q.table), q.signal)
		}
		return kept, fault
	}
	if q.inline.heldBack++; q.inline.heldBack >= quickBatch {
		return true, q.signalHeldBack()
	}
	return true, nil
}

// timed executes a request and records how long it took.
func (q *queue) timed(c *chain) (written uint32, ok bool) {
	t := q.inline.trial(c)
	began := time.Now()
	written, ok = q.s.execute(c)
	if t != nil {
		t.Took(time.Since(began))
	}
	return written, ok
}

// signalHeldBack signals for completions whose signal was held back.
func (q *queue) signalHeldBack() error {
	if q.inline.heldBack == 0 {
		return nil
	}
	q.inline.heldBack = 0
	return guard(q.s.shared(q.table), q.signal)
}

// overdue starts another goroutine that fetches, since the one that does executes a request for too long.
func (q *queue) overdue() {
	if err := q.signalHeldBack(); err != nil {
		q.s.fail(err)
	}
	awake.Add(-1)
	go q.serve() // it takes over the place in fetching, and is awake instead
}
