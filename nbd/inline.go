package nbd

import (
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Requests that take microseconds are executed inline, by the reader goroutine. To hand over the reader role means to
// wake another goroutine, mostly on another processor, which costs more than such a request. While the next request is
// already in the buffer, replies are held back and sent together with its reply in one system call.
//
// Which requests are quick is measured: a short READ or WRITE, or a BLOCK_STATUS with REQ_ONE, is executed inline when
// the last quickTrial of its kind were quick on this connection. Since any request can block, on a disk or because a
// snapshot is full, a watchdog runs: when an inline request takes longer than overdue, the watchdog releases reading
// for its worker and sends the replies that were held back.
const (
	quickRead  = 16 << 10               // bytes of a short READ: replies held back keep their memory
	quickWrite = 64 << 10               // bytes of a short WRITE
	quickTime  = 200 * time.Microsecond // what a quick request takes at most
	quickTrial = 64                     // requests
	quickBatch = 32                     // replies that are held back at most
	overdue    = 2 * time.Millisecond
)

// inlineState is the state of inline execution on one connection.
type inlineState struct {
	reads, writes, statuses atomic.Int32 // quick ones in a row, up to quickTrial

	waiting int // replies that are held back; only the reader uses it

	// mark is odd while a request is executed inline. Both the worker, when it is done, and the watchdog, when it is
	// overdue, make it even by compare and swap: the one that succeeds holds reading.
	mark    atomic.Uint64
	watched atomic.Bool // the timer runs
	timer   *time.Timer
	seen    uint64 // mark at the last run of the watchdog; only the watchdog uses it
}

// short reports whether requests like r may be executed inline at all.
func short(r wire.Request) bool {
	switch r.Command {
	case wire.CmdRead:
		return r.Flags&wire.FlagFUA == 0 && r.Length <= quickRead
	case wire.CmdWrite:
		return r.Flags&wire.FlagFUA == 0 && r.Length <= quickWrite
	case wire.CmdBlockStatus:
		return r.Flags&wire.FlagReqOne != 0
	}
	return false
}

// trial counts quick requests of the kind of r.
func (h *inlineState) trial(r wire.Request) *atomic.Int32 {
	switch r.Command {
	case wire.CmdRead:
		return &h.reads
	case wire.CmdBlockStatus:
		return &h.statuses
	}
	return &h.writes
}

// passed reports whether a request like r is likely to be quick.
func (h *inlineState) passed(r wire.Request) bool {
	return short(r) && h.trial(r).Load() >= quickTrial
}

// mayInline reports whether a request like r is to be executed inline: not when the server has more connections than
// processors. A worker that never blocks keeps its processor, and the other connections would get it only when the
// scheduler preempts the worker, after ten milliseconds.
func (c *conn) mayInline(r wire.Request) bool {
	return c.inline.passed(r) && c.server.connections.Load() <= c.server.processors
}

// took records how long a short request took.
//
// Two workers that record at the same time may lose one of two quick requests, or of a slow and a quick one the slow
// one; neither matters.
func (h *inlineState) took(r wire.Request, d time.Duration) {
	n := h.trial(r)
	switch v := n.Load(); {
	case d > quickTime:
		n.Store(0)
	case v < quickTrial:
		n.Store(v + 1)
	}
}

// executeInline executes a short request while holding reading, and reports whether the worker is still the reader.
func (c *conn) executeInline(t *task) (kept bool) {
	mark := c.armWatchdog()
	t.process()
	if !c.disarmWatchdog(mark) {
		c.out.send(t, true)
		return false
	}
	if c.inline.waiting < quickBatch && c.nextIsHere() {
		c.inline.waiting++
		c.out.add(t)
		return true
	}
	c.inline.waiting = 0
	mark = c.armWatchdog() // the client may not read the reply
	c.out.send(t, false)
	return c.disarmWatchdog(mark)
}

// nextIsHere reports whether the next request is in the buffer, whole, and will be executed inline: so nothing that
// happens before its reply is sent waits for the client, or for memory of held-back replies.
func (c *conn) nextIsHere() bool {
	n := c.r.Buffered()
	if n < wire.RequestSize {
		return false
	}
	head, _ := c.r.Peek(wire.RequestSize)
	r := wire.DecodeRequest(head)
	if r.Magic != wire.MagicRequest || !c.mayInline(r) {
		return false
	}
	return r.Command != wire.CmdWrite || n >= wire.RequestSize+int(r.Length)
}

// armWatchdog arms the watchdog until disarmWatchdog.
func (c *conn) armWatchdog() (mark uint64) {
	mark = c.inline.mark.Add(1)
	if !c.inline.watched.Load() {
		c.startWatchdog()
	}
	return mark
}

// disarmWatchdog reports false when the watchdog has released reading meanwhile.
func (c *conn) disarmWatchdog(mark uint64) bool { return c.inline.mark.CompareAndSwap(mark, mark+1) }

func (c *conn) startWatchdog() {
	if c.inline.watched.CompareAndSwap(false, true) {
		c.inline.timer.Reset(overdue)
	}
}

// watchdog checks whether the same request is executed inline as at its last run. It runs every overdue, and stops when
// nothing was executed inline since: idle connections cost nothing.
//
// The races considered: a worker that arms the watchdog while it decides to stop either finds watched false, and starts
// it again, or has changed mark before the watchdog checks a second time. And a worker that disarms while the watchdog
// releases reading: one of the two swaps fails.
func (c *conn) watchdog() {
	h := &c.inline
	mark := h.mark.Load()
	switch {
	case mark != h.seen:
		h.seen = mark
	case mark%2 == 1:
		if h.mark.CompareAndSwap(mark, mark+1) {
			h.waiting = 0
			c.all.Go(c.out.flush) // the late worker is counted in all, so all.Wait has not returned
			c.releaseReading()
		}
	default:
		h.watched.Store(false)
		if h.mark.Load() != mark {
			c.startWatchdog()
		}
		return
	}
	h.timer.Reset(overdue)
}
