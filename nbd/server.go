// Package nbd serves block devices over the network block device protocol, and is a client of it.
//
// A [Server] holds exports, each a [block.Device] under a name, and serves them on any number of
// listeners. Exports come and go while it serves. The protocol is that of the published document: fixed
// newstyle handshake, structured replies, block status with contexts; docs/nbd.md has a table of every
// feature.
//
// # Requests
//
// Requests of one connection run concurrently and are answered in any order. A connection has a few
// workers, as many as its load asks for. One of them at a time reads; when it has a request it lets the
// next one read and carries the request out itself, so that nothing is handed over, and a request that
// takes long (a read from disk, a flush, a write held back by a merge) holds up nobody behind it.
// Replies that meet leave in one system call.
//
// # Three kinds of fault
//
// What a client may not ask is refused in one place (validate) and the connection goes on. A peer that
// has lost step with the protocol is hung up on. What a device can't do becomes an error number in one
// switch (errno.go).
//
// # Bounds
//
// Per connection: 64 requests under way, 32 MiB a request, 64 MiB in all (a connection stops reading until
// its replies have left); 64 KiB an option and 4096 options; the handshake must end in time, and a peer
// that does not take its replies for a while is hung up on. See [Options] for connections.
package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sort"
	"sync"
	"time"
)

// Options are a Server's limits. The zero value is usable.
type Options struct {
	HandshakeTimeout time.Duration // for the whole handshake; 0: 10 s
	WriteTimeout     time.Duration // for a reply to be taken; 0: 30 s
	IdleTimeout      time.Duration // without a request; 0: none
	ShutdownTimeout  time.Duration // for requests under way when Serve is told to end; 0: 5 s
	MaxConnections   int           // more are closed at once; 0: no limit

	// Log is told what went wrong with a connection, in one line. It may be called concurrently.
	Log func(line string)
}

// A Server serves exports. Its methods may be called concurrently.
type Server struct {
	opts Options

	mu          sync.Mutex
	exports     map[string]*export
	defaultName string
	connections int
}

// NewServer returns a server without exports.
func NewServer(o Options) *Server {
	setDefault(&o.HandshakeTimeout, 10*time.Second)
	setDefault(&o.WriteTimeout, 30*time.Second)
	setDefault(&o.ShutdownTimeout, 5*time.Second)
	if o.Log == nil {
		o.Log = func(string) {}
	}
	return &Server{opts: o, exports: make(map[string]*export)}
}

func setDefault(d *time.Duration, to time.Duration) {
	if *d == 0 {
		*d = to
	}
}

// Names lists the exports in order.
func (s *Server) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.exports))
	for n := range s.exports {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// Serve accepts connections on l, which it closes, until ctx ends; then no request is taken any more,
// those under way are answered, and the connections closed: within ShutdownTimeout, as far as it is the
// peers who delay it; a device that doesn't come back is waited for. It returns nil when ctx ended, else
// the listener's error. Devices stay open and are not flushed: their owner does that afterwards.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	var all sync.WaitGroup
	defer all.Wait()
	for wait := time.Millisecond; ; {
		nc, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				nc.Close()
			}
			return nil
		case err != nil && temporary(err):
			// Out of descriptors, say: whoever is connected is served, and we try again soon.
			s.opts.Log(fmt.Sprintf("accept: %v", err))
			time.Sleep(wait)
			wait = min(2*wait, time.Second)
			continue
		case err != nil:
			return err
		}
		wait = time.Millisecond
		all.Go(func() {
			if err := s.ServeConn(ctx, nc); err != nil {
				s.opts.Log(fmt.Sprintf("%s: %v", peer(nc), err))
			}
		})
	}
}

func temporary(err error) bool {
	var ne net.Error
	return !errors.Is(err, net.ErrClosed) && errors.As(err, &ne)
}

func peer(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	return "client"
}

// admit counts a connection, false when there are too many.
func (s *Server) admit() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.opts.MaxConnections; m > 0 && s.connections >= m {
		return false
	}
	s.connections++
	return true
}

func (s *Server) dismiss() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.connections--
}

// ServeConn serves one connection to its end, and closes it. The error is nil when the client
// disconnected in an orderly way, or ctx ended.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	defer nc.Close()
	if !s.admit() {
		return errors.New("refused: too many connections")
	}
	defer s.dismiss()
	h := newHandshake(s, nc)
	nc.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Now()) })
	e, err := h.run()
	stop()
	if err != nil || e == nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	nc.SetDeadline(time.Time{})
	return newConn(s, nc, h, e).serve(ctx)
}
