package vhost

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
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
	together      inline.Together // only the goroutine that fetches uses it
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
	piece   []byte // for the data of quick requests; nil at first
	pending bool   // c is a request that was fetched and is not executed, since it may take long

	// Quick reads that follow each other are executed together (block.CacheReader), as far as their bytes are in memory. Those
	// whose bytes are not get a goroutine each.
	group []*chain     // fetched and not executed
	reads []block.Read // of group: their data, in piece
	used  int          // bytes of piece that reads have
	left  []*chain     // requests that are to be executed by a goroutine each

	armed bool // the watchdog is, with mark
	mark  uint64
}

// release gives up the memory.
func (f *fetcher) release() {
	for _, c := range append(append(f.group, f.left...), f.c) {
		if c != nil {
			c.release()
		}
	}
}

// loop executes what the driver makes available until the queue is stopped. kept is false when another goroutine fetches now.
func (f *fetcher) loop() (kept bool, err error) {
	q := f.q
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
		err = q.waitKick()
		awake.Add(1)
		switch {
		case err == nil || errors.Is(err, os.ErrDeadlineExceeded):
		case err == errFault:
			return true, err
		case errors.Is(err, io.EOF):
			return true, errors.New("the kick descriptor was closed")
		default:
			return true, fmt.Errorf("kick: %w", err)
		}
	}
}

// waitKick waits until the driver kicks, or has made requests available.
//
// An eventfd is not read: each kick is an event of its own for the runtime's poller, whatever the counter is. The race considered: waiting
// begins by forgetting the events that came before, so the ring is looked at once more after that.
func (q *queue) waitKick() error {
	if q.kickFD == nil {
		var b [8]byte
		_, err := q.kick.Read(b[:])
		return err
	}
	var fault error
	waited := false
	err := q.kickFD.Read(func(uintptr) bool {
		if waited {
			return true
		}
		waited = true
		var idx uint16
		fault = guard(q.shared, func() { idx = load16(q.avail, 2) })
		return fault != nil || idx != q.lastAvail
	})
	return cmp.Or(fault, err)
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
		if !q.waitRoom() {
			return false, true, nil
		}
		kept, err := f.batch(idx)
		if err == errFault {
			return false, kept, err
		}
		if f.pending {
			f.left, f.pending, f.c = append(f.left, f.c), false, nil
			f.lookAtMemory()
		}
		for _, c := range f.left {
			q.run(c)
		}
		f.left = f.left[:0]
		if !kept || err != nil {
			return false, kept, err
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
	q := f.q
	for n := 0; n < quickBatch && q.lastAvail != idx; n++ {
		head := load16(q.avail, 4+2*int(q.lastAvail&(q.n-1)))
		if err = q.begin(head); err != nil {
			break
		}
		q.lastAvail++
		f.c.clear()
		if err = q.parse(f.c, head); err != nil {
			break
		}
		t := q.inline.trial(f.c)
		if t == nil || !t.Passed() || awake.Load() > processors {
			f.pending = true
			break
		}
		if f.piece == nil {
			f.piece = make([]byte, quickBytes)
		}
		off, room := f.readsAlong(t)
		if room == 0 || f.used+room > len(f.piece) {
			if !f.readTogether() {
				f.pending = true
				return false, nil
			}
		}
		if room > 0 {
			f.hold(off, room)
			continue
		}
		kept, f.pending = f.executeQuick(f.c, t)
		if !kept || f.pending {
			return kept, nil
		}
	}
	return f.readTogether(), err
}

// executeQuick executes a request inline. It was not executed when it waits for space.
func (f *fetcher) executeQuick(c *chain, t *inline.Trial) (kept, waits bool) {
	q := f.q
	began := time.Now()
	f.mark, f.armed = q.inline.watchdog.Arm(), true
	written, ok := q.s.execute(c, f.piece)
	kept = q.inline.watchdog.Disarm(f.mark)
	f.armed = false
	if !ok && kept {
		return true, true
	}
	if !ok {
		written, ok = q.s.execute(c, nil)
	}
	t.Took(time.Since(began))
	if ok {
		q.push(c.head, written)
	}
	return kept, false
}

// readsAlong returns the place and the length of the quick request c when it is a legal read that is to be executed with others, else 0, 0.
func (f *fetcher) readsAlong(t *inline.Trial) (off int64, n int) {
	q := f.q
	if t != &q.inline.reads || len(f.group) == 0 && !q.inline.together.May() {
		return 0, 0
	}
	off, n, ok := q.s.plainRead(f.c)
	if !ok {
		return 0, 0
	}
	return off, n
}

// hold adds the read c, of n bytes at off, to those that are executed together.
func (f *fetcher) hold(off int64, n int) {
	f.group = append(f.group, f.c)
	f.reads = append(f.reads, block.Read{P: f.piece[f.used:][:n:n], Off: off})
	f.used += n
	f.c = newChain(f.c.table.acquire())
}

// readTogether executes the reads that are held, or leaves them to goroutines.
func (f *fetcher) readTogether() (kept bool) {
	q := f.q
	kept = true
	switch len(f.group) {
	case 0:
		return true
	case 1:
		var waits bool
		kept, waits = f.executeQuick(f.group[0], &q.inline.reads)
		f.reads[0].Done = !waits
	default:
		kept = f.readGroup()
	}
	for i, c := range f.group {
		if f.reads[i].Done {
			c.release()
		} else {
			f.left = append(f.left, c)
		}
		f.group[i] = nil // a fault releases the others
	}
	clear(f.reads)
	f.group, f.reads, f.used = f.group[:0], f.reads[:0], 0
	return kept
}

// readGroup executes those of several reads whose bytes are in memory.
func (f *fetcher) readGroup() (kept bool) {
	q := f.q
	began := time.Now()
	f.mark, f.armed = q.inline.watchdog.Arm(), true
	done := block.ReadCached(q.s.export.Device, f.reads)
	kept = q.inline.watchdog.Disarm(f.mark)
	f.armed = false
	if done > 0 {
		q.inline.reads.Took(time.Since(began) / time.Duration(done))
	}
	if kept {
		q.inline.together.Ended(done == len(f.group))
	}
	for i, c := range f.group {
		if r := f.reads[i]; r.Done {
			q.push(c.head, q.s.answerRead(c, r.P))
		}
	}
	return kept
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
