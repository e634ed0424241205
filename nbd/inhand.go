package nbd

import (
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Requests that take microseconds are carried out in hand: by the worker that has read them, which keeps the
// turn meanwhile. To pass the turn on means to wake another goroutine, mostly on another processor, and costs
// more than such a request does. While the next request has come already, replies wait for its reply, and leave
// with it in one system call.
//
// Which requests are quick is seen, not known: a short READ or WRITE, or a BLOCK_STATUS with REQ_ONE, may be carried
// out in hand when the last quickTrial of its kind were quick on this connection. And since any request can be held up,
// by a disk or because a snapshot is full, the turn is watched: when one is in hand for longer than overdue, the turn
// is taken from its worker and passed on, and the replies that wait leave.
const (
	quickRead  = 16 << 10               // bytes of a short READ: replies wait, and so does their memory
	quickWrite = 64 << 10               // bytes of a short WRITE
	quickTime  = 200 * time.Microsecond // what a quick request takes at most
	quickTrial = 64                     // requests
	quickBatch = 32                     // replies that wait for each other
	overdue    = 2 * time.Millisecond
)

// inHand watches the turn of one connection.
type inHand struct {
	reads, writes, statuses atomic.Int32 // quick ones in a row, up to quickTrial

	waiting int // replies that wait for the next one; whoever has the turn

	// mark is odd while a request is in hand. Both the worker, when it is done, and the watch, when it is
	// overdue, make it even by compare and swap: whoever does has the turn.
	mark    atomic.Uint64
	watched atomic.Bool // the timer runs
	timer   *time.Timer
	seen    uint64 // mark, when the watch last looked; the watch's own
}

// short reports whether r may ever be carried out in hand.
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
func (h *inHand) trial(r wire.Request) *atomic.Int32 {
	switch r.Command {
	case wire.CmdRead:
		return &h.reads
	case wire.CmdBlockStatus:
		return &h.statuses
	}
	return &h.writes
}

// passed reports whether a request like r is likely to be quick.
func (h *inHand) passed(r wire.Request) bool {
	return short(r) && h.trial(r).Load() >= quickTrial
}

// inHand reports whether a request like r is to be carried out in hand: not when the server has more connections
// than processors. A worker that never waits keeps its processor, and those whose requests wait in their sockets
// would get one only when the scheduler takes it away, after ten milliseconds.
func (c *conn) inHand(r wire.Request) bool {
	return c.hand.passed(r) && c.server.connections.Load() <= c.server.processors
}

// took notes how long a short request took.
//
// Two workers that note at the same time may lose one of two quick requests, or of a slow and a quick one the
// slow one; neither matters.
func (h *inHand) took(r wire.Request, d time.Duration) {
	n := h.trial(r)
	switch v := n.Load(); {
	case d > quickTime:
		n.Store(0)
	case v < quickTrial:
		n.Store(v + 1)
	}
}

// carryOutInHand carries out a short request with the turn in hand, and reports whether the turn is still there.
func (c *conn) carryOutInHand(t *task) (kept bool) {
	mark := c.lend()
	t.carryOut()
	if !c.reclaim(mark) {
		c.out.send(t, true)
		return false
	}
	if c.hand.waiting < quickBatch && c.nextIsHere() {
		c.hand.waiting++
		c.out.add(t)
		return true
	}
	c.hand.waiting = 0
	mark = c.lend() // the client may not take the reply
	c.out.send(t, false)
	return c.reclaim(mark)
}

// nextIsHere reports whether the next request has come, whole, and will be carried out in hand: so nothing
// that is read before its reply is sent waits for the client, or for memory that replies hold.
func (c *conn) nextIsHere() bool {
	n := c.r.Buffered()
	if n < wire.RequestSize {
		return false
	}
	head, _ := c.r.Peek(wire.RequestSize)
	r := wire.DecodeRequest(head)
	if r.Magic != wire.MagicRequest || !c.inHand(r) {
		return false
	}
	return r.Command != wire.CmdWrite || n >= wire.RequestSize+int(r.Length)
}

// lend has the turn watched until reclaim.
func (c *conn) lend() (mark uint64) {
	mark = c.hand.mark.Add(1)
	if !c.hand.watched.Load() {
		c.startWatch()
	}
	return mark
}

// reclaim ends lend. It reports false when the turn was taken away meanwhile.
func (c *conn) reclaim(mark uint64) bool { return c.hand.mark.CompareAndSwap(mark, mark+1) }

func (c *conn) startWatch() {
	if c.hand.watched.CompareAndSwap(false, true) {
		c.hand.timer.Reset(overdue)
	}
}

// watch looks whether one and the same request has been in hand since it last looked. It is called every
// overdue, and no more when nothing has been in hand since: idle connections cost nothing.
//
// The races considered: a worker that lends while the watch decides to end either finds watched false, and
// starts it again, or has changed mark before the watch looks a second time. And a worker that reclaims
// while the watch takes the turn: one of the two swaps fails.
func (c *conn) watch() {
	h := &c.hand
	mark := h.mark.Load()
	switch {
	case mark != h.seen:
		h.seen = mark
	case mark%2 == 1:
		if h.mark.CompareAndSwap(mark, mark+1) {
			h.waiting = 0
			c.all.Go(c.out.flush) // the worker that was late is among all, so nobody has stopped waiting
			c.passTurn()
		}
	default:
		h.watched.Store(false)
		if h.mark.Load() != mark {
			c.startWatch()
		}
		return
	}
	h.timer.Reset(overdue)
}
