package nbd

import (
	"github.com/dmsnap/dmsnap/internal/inline"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Requests that take microseconds are executed inline, by the reader goroutine. To hand over the reader role means to
// wake another goroutine, mostly on another processor, which costs more than such a request. While the next request is
// already in the buffer, replies are held back and sent together with its reply in one system call.
//
// Which requests are quick is measured: a short READ or WRITE, or a BLOCK_STATUS with REQ_ONE, is executed inline when
// the last ones of its kind were quick on this connection (package inline). When an inline request is overdue, the watchdog releases
// reading for its worker and sends the replies that were held back.
const (
	quickRead  = 16 << 10 // bytes of a short READ: replies held back keep their memory
	quickWrite = 64 << 10 // bytes of a short WRITE
	quickBatch = 32       // replies that are held back at most
)

// inlineState is the state of inline execution on one connection.
type inlineState struct {
	reads, writes, statuses inline.Trial

	// Only the reader uses:
	waiting  int // replies that are held back
	together inline.Together

	watchdog *inline.Watchdog
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
func (h *inlineState) trial(r wire.Request) *inline.Trial {
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
	return short(r) && h.trial(r).Passed()
}

// mayInline reports whether a request like r is to be executed inline: not when the server has more connections than
// processors. A worker that never blocks keeps its processor, and the other connections would get it only when the
// scheduler preempts the worker, after ten milliseconds.
func (c *conn) mayInline(r wire.Request) bool {
	return c.inline.passed(r) && c.server.connections.Load() <= c.server.processors
}

// executeInline executes a short request while holding reading, and reports whether the worker is still the reader.
func (c *conn) executeInline(t *task) (kept bool) {
	mark := c.inline.watchdog.Arm()
	t.process()
	if !c.inline.watchdog.Disarm(mark) {
		c.out.send(t, true)
		return false
	}
	if c.inline.waiting < quickBatch && c.nextIsHere() {
		c.inline.waiting++
		c.out.add(t)
		return true
	}
	c.inline.waiting = 0
	mark = c.inline.watchdog.Arm() // the client may not read the reply
	c.out.send(t, false)
	return c.inline.watchdog.Disarm(mark)
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

// overdue hands over the reader role of a worker whose inline request is overdue.
func (c *conn) overdue() {
	c.inline.waiting = 0
	c.all.Go(c.out.flush) // the late worker is counted in all, so all.Wait has not returned
	c.releaseReading()
}
