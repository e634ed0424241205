package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/internal/inline"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

const (
	maxInFlight = 64                  // requests of one connection in flight
	maxSkip     = 2 * wire.MaxPayload // bytes of a refused write that are skipped; more disconnects the client
	progress    = 1 << 20             // bytes that a peer has StallTimeout for, in either direction
	lastCall    = 100 * time.Millisecond
)

// conn is a connection in its transmission.
//
// One worker at a time is the reader: it holds reading. After a request it releases reading and executes the request,
// or it stays the reader and executes the request inline (inline.go).
type conn struct {
	server     *Server
	export     *export
	nc         net.Conn
	structured bool
	readOnly   bool // the client may only read
	contexts   []metaContext

	reading  sync.Mutex // guards r, deadline, ended and err; the worker that holds it is the reader
	r        *bufio.Reader
	deadline bool  // a deadline is set for reading
	ended    bool  // no more requests are read
	err      error // why, nil after an orderly end
	workers  atomic.Int32
	idle     atomic.Int32 // workers that wait to be the reader
	all      sync.WaitGroup
	underWay atomic.Int32 // tasks that were read and not answered yet

	inline  inlineState
	payload payloadBytes
	out     replies

	stopping  atomic.Bool   // requests are refused
	stopped   chan struct{} // closed when stopping is set
	over      chan struct{} // closed when ended is set: waiting requests give up
	waiting   atomic.Int32  // requests that wait for space
	abandoned atomic.Bool   // see isAbandoned
}

func newConn(s *Server, nc net.Conn, h *handshake, e *export) *conn {
	c := &conn{server: s, export: e, nc: nc, structured: h.structured, readOnly: h.readOnly, contexts: h.contexts, r: h.r, stopped: make(chan struct{}), over: make(chan struct{})}
	c.payload.init(c)
	c.out = replies{nc: nc, timeout: s.opts.StallTimeout}
	c.inline.watchdog = inline.NewWatchdog(c.overdue)
	return c
}

// serve answers requests until the client disconnects or violates the protocol, ctx ends, or the export is removed. In
// the last two cases requests in flight are answered first.
func (c *conn) serve(ctx context.Context) error {
	c.export.connections.Add(1)
	defer c.export.connections.Add(-1)
	done := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() {
		select {
		case <-ctx.Done():
		case <-c.export.gone:
		case <-done:
			return
		}
		c.stop()
		select {
		case <-time.After(c.server.opts.ShutdownTimeout):
			c.nc.Close() // a peer that reads no replies, or a device that does not return
		case <-done:
		}
	})
	c.startWorker()
	c.all.Wait()
	close(done)
	watcher.Wait()
	return c.err
}

// stop makes the connection refuse new requests and end soon: when requests in flight have been answered and the client
// has sent nothing for lastCall.
func (c *conn) stop() {
	c.stopping.Store(true)
	close(c.stopped)
	c.nc.SetReadDeadline(time.Now().Add(lastCall))
}

func (c *conn) startWorker() {
	c.workers.Add(1)
	c.all.Go(func() {
		for c.work() {
		}
	})
}

// work reads requests and executes them inline, until one is to be executed without holding reading, which it then
// does. It reports false when the worker is no longer needed.
func (c *conn) work() bool {
	c.idle.Add(1)
	c.reading.Lock()
	c.idle.Add(-1)
	if c.ended {
		c.reading.Unlock()
		return false
	}
	t, err := c.read()
	for t != nil && t.errno == 0 && c.mayInline(t.Request) {
		kept, more := false, true
		if t.Command == wire.CmdRead && c.mayReadTogether() {
			kept, more = c.readTogether(t)
		} else {
			kept = c.executeInline(t)
		}
		if !kept {
			return true
		}
		if t = nil; more {
			t, err = c.read()
		}
	}
	waiting := c.inline.waiting > 0
	c.inline.waiting = 0
	if t == nil {
		c.ended = true
		close(c.over)
		if !c.stopping.Load() {
			c.err = err
		}
		c.reading.Unlock()
	} else {
		c.releaseReading()
	}
	if waiting {
		c.out.flush() // the request that they waited for is not executed inline after all
	}
	if t == nil {
		return false
	}
	t.process()
	c.out.send(t, true)
	return true
}

// releaseReading ends the reader role of the worker. It starts another worker where none is idle.
func (c *conn) releaseReading() {
	if c.idle.Load() == 0 && c.workers.Load() < maxInFlight {
		c.startWorker()
	}
	c.reading.Unlock()
}

// read reads one request, with the payload of a WRITE. No task means that the connection ends: after NBD_CMD_DISC, or
// because the stream has ended or violates the protocol.
func (c *conn) read() (*task, error) {
	r, err := c.readHead()
	if err != nil || r.Command == wire.CmdDisconnect {
		return nil, err
	}
	t := newTask(c, r)
	if t.errno == 0 && (r.Command == wire.CmdRead || r.Command == wire.CmdWrite) {
		t.hold()
	}
	if r.Command == wire.CmdWrite {
		if t.errno == 0 {
			err = c.readFull(t.payload.b)
		} else {
			err = c.skip(r.Length)
		}
	}
	if err != nil {
		t.end()
		return nil, fmt.Errorf("read %d bytes to write: %w", r.Length, err)
	}
	if t.errno == 0 && c.waiting.Load() > 0 && c.isAbandoned() {
		t.errno, t.why = wire.ESHUTDOWN, goingAway // it was in the socket while all workers waited
	}
	return t, nil
}

// readHead reads the header of a request. EOF between two requests counts as NBD_CMD_DISC.
func (c *conn) readHead() (wire.Request, error) {
	if c.abandoned.Load() {
		return wire.Request{Command: wire.CmdDisconnect}, nil
	}
	c.await(c.server.opts.IdleTimeout)
	head, err := c.r.Peek(wire.RequestSize)
	for len(head) == 0 && errors.Is(err, os.ErrDeadlineExceeded) && c.underWay.Load() > 0 {
		// A client that waits for a reply is not idle, and must not be disconnected before it.
		c.await(max(c.server.opts.IdleTimeout, lastCall))
		head, err = c.r.Peek(wire.RequestSize)
	}
	if err != nil {
		if len(head) == 0 && err == io.EOF {
			return wire.Request{Command: wire.CmdDisconnect}, nil
		}
		return wire.Request{}, fmt.Errorf("read request: %w", err)
	}
	r := wire.DecodeRequest(head)
	c.r.Discard(wire.RequestSize)
	if r.Magic != wire.MagicRequest {
		return r, fmt.Errorf("request magic is 0x%08x", r.Magic)
	}
	return r, nil
}

// await sets the deadline of the next reading, none for 0.
//
// The race considered: stop sets stopping first and its deadline then, so every other call that sets a deadline checks
// stopping afterwards.
func (c *conn) await(d time.Duration) {
	if d == 0 && !c.deadline {
		return
	}
	if c.deadline = d > 0; c.deadline {
		c.nc.SetReadDeadline(time.Now().Add(d))
	} else {
		c.nc.SetReadDeadline(time.Time{})
	}
	if c.stopping.Load() {
		c.nc.SetReadDeadline(time.Now().Add(lastCall))
	}
}

// readFull fills p. A client that stops in the middle is disconnected after StallTimeout.
func (c *conn) readFull(p []byte) error {
	for len(p) > 0 {
		part := p[:min(len(p), progress)]
		if c.r.Buffered() < len(part) {
			c.await(c.server.opts.StallTimeout)
		}
		if _, err := io.ReadFull(c.r, part); err != nil {
			return err
		}
		p = p[len(part):]
	}
	return nil
}

// skip drops the payload of a refused write, so that an error reply can be sent.
func (c *conn) skip(n uint32) error {
	if n > maxSkip {
		return fmt.Errorf("more than %d", wire.MaxPayload)
	}
	for n > 0 {
		part := min(n, progress)
		if c.r.Buffered() < int(part) {
			c.await(c.server.opts.StallTimeout)
		}
		if _, err := c.r.Discard(int(part)); err != nil {
			return err
		}
		n -= part
	}
	return nil
}
