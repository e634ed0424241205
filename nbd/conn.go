package nbd

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

const (
	maxInFlight = 64       // requests of one connection under way
	maxHeld     = 64 << 20 // bytes of payloads of one connection under way, replies included
)

// conn is a connection in its transmission.
//
// The workers take turns at reading (turn). Whoever has read a request passes the turn on before it
// carries the request out. A mutex does for that: one that is given up and soon asked for again mostly
// stays with the same goroutine, so a stream of quick requests is read and answered without a change of
// goroutine, and a slow one leaves the turn to the next.
type conn struct {
	server     *Server
	export     *export
	nc         net.Conn
	structured bool
	contexts   []metaContext

	turn    sync.Mutex // guards r, ended and err: whoever holds it reads
	r       *bufio.Reader
	ended   bool  // nobody reads any more
	err     error // why, nil in good order
	workers atomic.Int32
	idle    atomic.Int32 // workers that wait for their turn
	all     sync.WaitGroup

	out replies

	stopping atomic.Bool // no further request is taken

	mu   sync.Mutex
	room sync.Cond // of mu; held went down, or stopping was set
	held int64     // bytes of payloads under way
}

func newConn(s *Server, nc net.Conn, h *handshake, e *export) *conn {
	c := &conn{server: s, export: e, nc: nc, structured: h.structured, contexts: h.contexts, r: h.r}
	c.room.L = &c.mu
	c.out = replies{nc: nc, timeout: s.opts.WriteTimeout}
	return c
}

// serve answers requests until the client disconnects, loses step, or goes away; or ctx ends, or the
// export is removed: then what is under way is answered first.
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
			c.nc.Close() // a peer that takes no replies, or a device that doesn't answer
		case <-done:
		}
	})
	c.startWorker()
	c.all.Wait()
	close(done)
	watcher.Wait()
	c.turn.Lock()
	defer c.turn.Unlock()
	return c.err
}

// stop ends the reading, at once where it waits for the client. The mark goes before the deadline: a
// reader that sets a deadline of its own looks for the mark afterwards.
func (c *conn) stop() {
	c.mu.Lock()
	c.stopping.Store(true)
	c.room.Broadcast()
	c.mu.Unlock()
	c.nc.SetReadDeadline(time.Now())
}

func (c *conn) startWorker() {
	c.workers.Add(1)
	c.all.Go(func() {
		for c.work() {
		}
	})
}

// work reads one request and carries it out. It reports false when the worker is no longer needed.
func (c *conn) work() bool {
	c.idle.Add(1)
	c.turn.Lock()
	c.idle.Add(-1)
	if c.ended || c.stopping.Load() {
		c.turn.Unlock()
		return false
	}
	req, payload, err := c.read()
	if err != nil || req.Command == wire.CmdDisconnect {
		c.ended = true
		if err != nil && !c.stopping.Load() {
			c.err = err
		}
		c.turn.Unlock()
		return false
	}
	// Somebody must be there to read on while this worker is busy.
	if c.idle.Load() == 0 && c.workers.Load() < maxInFlight {
		c.startWorker()
	}
	c.turn.Unlock()
	c.carryOut(req, payload)
	return true
}

// read takes one request off the stream, with the payload of a WRITE. An error ends the connection: the
// stream has ended or is out of step.
func (c *conn) read() (wire.Request, *buffer, error) {
	if t := c.server.opts.IdleTimeout; t > 0 {
		c.nc.SetReadDeadline(time.Now().Add(t))
		if c.stopping.Load() { // stop's deadline may have come before ours
			return wire.Request{}, nil, net.ErrClosed
		}
	}
	head, err := c.r.Peek(wire.RequestSize)
	if err != nil {
		if len(head) == 0 && err == io.EOF {
			// Gone without a goodbye, as many clients do, but between two requests.
			return wire.Request{Command: wire.CmdDisconnect}, nil, nil
		}
		return wire.Request{}, nil, fmt.Errorf("read request: %w", err)
	}
	req := wire.DecodeRequest(head)
	c.r.Discard(wire.RequestSize)
	if req.Magic != wire.MagicRequest {
		return req, nil, fmt.Errorf("request magic is 0x%08x", req.Magic)
	}
	switch req.Command {
	case wire.CmdWrite:
		return c.readPayload(req)
	case wire.CmdRead:
		c.hold(min(int64(req.Length), wire.MaxPayload))
	}
	return req, nil, nil
}

// readPayload reads the data of a WRITE. What is too long or not wanted is skipped, so that the client
// can be told; what is absurd ends the connection.
func (c *conn) readPayload(req wire.Request) (wire.Request, *buffer, error) {
	if req.Length > wire.MaxPayload {
		if req.Length > 2*wire.MaxPayload {
			return req, nil, fmt.Errorf("write of %d bytes: more than %d", req.Length, wire.MaxPayload)
		}
		_, err := io.CopyN(io.Discard, c.r, int64(req.Length))
		return req, nil, err
	}
	c.hold(int64(req.Length))
	p := getBuffer(req.Length)
	if _, err := io.ReadFull(c.r, p.b); err != nil {
		p.free()
		c.letGo(int64(req.Length))
		return req, nil, fmt.Errorf("read %d bytes to write: %w", req.Length, err)
	}
	return req, p, nil
}

// hold waits until n more bytes may be under way. One request always may.
func (c *conn) hold(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.held > 0 && c.held+n > maxHeld && !c.stopping.Load() {
		c.room.Wait()
	}
	c.held += n
}

func (c *conn) letGo(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held -= n
	c.room.Broadcast()
}
