package vhost

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/internal/inline"
)

// Quick requests are executed by the goroutine that fetches (package inline), and signalled together: when no more are
// available, or quickBatch are completed. When one is overdue, the watchdog starts another goroutine that fetches.
const (
	quickBytes = 64 << 10 // of data of a request
	quickBatch = 16       // completions whose signal is held back at most
)

// inlineState is the state of inline execution of a queue.
type inlineState struct {
	reads, writes inline.Trial
	watchdog      *inline.Watchdog
}

// awake counts the goroutines that fetch and do not wait for a kick. Requests are executed inline only while they are no more than
// processors: one that never waits keeps its processor, and others would get it only when the scheduler preempts it.
var awake atomic.Int32

var processors = int32(runtime.GOMAXPROCS(0))

// trial returns the trial for requests of the kind of c, nil for those that are never executed inline. It goes by
// the buffers' sizes: only reads have room for a sector, only writes bring one.
func (h *inlineState) trial(c *chain) *inline.Trial {
	out, in := c.outBytes, c.inBytes
	switch {
	case c.bad != nil || out+in > quickBytes+17:
	case out == 16 && in > 512:
		return &h.reads
	case in == 1 && out >= 16+512:
		return &h.writes
	}
	return nil
}

// A fetcher is a goroutine that fetches the requests of a queue, and executes those that are quick.
type fetcher struct {
	q       *queue
	c       *chain // of the request that is looked at; nil at first
	piece   []byte // for the data of a quick request; nil at first
	pending bool   // c is a request that was fetched and is not executed, since it may take long

	armed bool // the watchdog is, with mark
	mark  uint64
}

// release gives up the memory.
func (f *fetcher) release() {
	if f.c != nil {
		f.c.release()
	}
}

// loop executes what the driver makes available until the queue is stopped. kept is false when another goroutine fetches now.
func (f *fetcher) loop() (kept bool, err error) {
	q, b := f.q, make([]byte, 8)
	for {
		more, kept, err := f.fetch()
		if !kept || err != nil {
			return kept, err
		}
		select {
		case <-q.stop:
			return true, nil
		default:
		}
		if more {
			continue
		}
		awake.Add(-1)
		_, err = q.kick.Read(b)
		awake.Add(1)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if errors.Is(err, io.EOF) {
				return true, errors.New("the kick descriptor was closed")
			}
			return true, fmt.Errorf("kick: %w", err)
		}
	}
}

// fetch takes all available requests, and executes or starts them. It reports more when there may be others, and not
// when the driver will kick for the next one.
func (f *fetcher) fetch() (more, kept bool, err error) {
	q := f.q
	idx, err := q.available()
	if err != nil {
		return false, true, err
	}
	f.lookAtMemory()
	for idx != q.lastAvail {
		// A request that turns out to take long must find a place, and nobody else takes one.
		if len(q.room) == cap(q.room) {
			select {
			case q.room <- struct{}{}:
				<-q.room
			case <-q.stop:
				return false, true, nil
			}
		}
		if kept, err := f.batch(idx); !kept || err != nil {
			return false, kept, err
		}
		if f.pending {
			q.room <- struct{}{}
			q.run(f.c)
			f.pending, f.c = false, nil
			f.lookAtMemory()
		}
	}
	idx, err = q.armKick()
	return idx != q.lastAvail, true, err
}

// lookAtMemory makes c ready for requests that are available already: their buffers are in the memory that the guest has now.
func (f *fetcher) lookAtMemory() {
	t := f.q.s.currentTable()
	if f.c == nil {
		f.c = newChain(t)
		return
	}
	f.c.table.release()
	f.c.table = t
}

// batch executes quick requests before idx, at most quickBatch, and signals. It ends at the first one that may take long, which is
// pending then. kept is false when another goroutine fetches now.
func (f *fetcher) batch(idx uint16) (kept bool, err error) {
	q := f.q
	fault := guard(q.s.shared(q.table, f.c.table), func() {
		kept, err = f.executeBatch(idx)
		q.signal()
	})
	if fault != nil {
		kept, err = true, fault
		if f.armed {
			kept = q.inline.watchdog.Disarm(f.mark)
		}
	}
	return kept, err
}

// executeBatch is batch, under guard and without the signal.
func (f *fetcher) executeBatch(idx uint16) (kept bool, err error) {
	q, c := f.q, f.c
	began := time.Now()
	for n := 0; n < quickBatch && q.lastAvail != idx; n++ {
		head := load16(q.avail, 4+2*int(q.lastAvail&(q.n-1)))
		if err := q.begin(head); err != nil {
			return true, err
		}
		q.lastAvail++
		c.clear()
		if err := q.parse(c, head); err != nil {
			return true, err
		}
		t := q.inline.trial(c)
		if t == nil || !t.Passed() || awake.Load() > processors {
			f.pending = true
			return true, nil
		}
		if f.piece == nil {
			f.piece = make([]byte, quickBytes)
		}
		f.mark, f.armed = q.inline.watchdog.Arm(), true
		written, ok := q.s.execute(c, f.piece)
		kept := q.inline.watchdog.Disarm(f.mark)
		f.armed = false
		if !ok && kept { // it has to wait for space
			f.pending = true
			return true, nil
		}
		if !ok {
			written, ok = q.s.execute(c, nil)
		}
		now := time.Now()
		t.Took(now.Sub(began))
		began = now
		if ok {
			q.push(head, written)
		}
		if !kept {
			return false, nil
		}
	}
	return true, nil
}

// overdue starts another goroutine that fetches, since the one that does executes a request for too long.
func (q *queue) overdue() {
	if err := guard(q.shared, q.signal); err != nil {
		q.s.fail(err)
	}
	awake.Add(-1)
	q.requests.Add(1)
	go q.serve() // it takes over the place in fetching, and is awake instead
}
