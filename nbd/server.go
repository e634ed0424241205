// Package nbd has a server and a client of the network block device protocol.
//
//	s := nbd.NewServer(nbd.Options{})
//	err := s.Add(nbd.Export{Name: "disk", Device: dev})
//	err = s.Serve(ctx, listener) // until ctx ends
//
//	c, err := nbd.Dial(ctx, "nbd://localhost/disk") // c is a block.Device
//
// A [Server] holds exports, each a [block.Device] under a name, and serves them on any number of listeners. Exports are
// added and removed while it serves. The protocol is that of the published document: fixed newstyle handshake, structured
// replies, block status with contexts; docs/nbd.md has a table of every feature.
//
// # Guarantees
//
//   - A change is acknowledged after the device returned; a flush covers every write acknowledged before it.
//   - Requests of one connection run concurrently and are answered in any order. A slow request delays no other.
//   - A change whose error is a [block.RetryLater] waits in the server, and is not executed any more when its connection
//     ends.
//   - An illegal request is answered with an error and the connection continues. A peer that violates the protocol is
//     disconnected.
//   - Memory is bounded whatever a peer sends: requests, bytes and options of a connection, bytes of all, and time without
//     progress. docs/nbd.md has the numbers, [Options] those that can be chosen.
package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/internal/eventlog"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Options are a Server's limits. The zero value is usable.
type Options struct {
	HandshakeTimeout time.Duration // for the whole handshake; 0: 10 s
	StallTimeout     time.Duration // for a peer to take or send the next MiB in the middle of a message; 0: 30 s
	IdleTimeout      time.Duration // for a client to send a request when none is in flight; 0: none
	ShutdownTimeout  time.Duration // for requests in flight when Serve is to end; 0: 5 s
	MaxConnections   int           // more are closed at once; 0: no limit

	// MaxPayloads is how many bytes of payloads longer than 64 KiB may be in flight, of all connections together. Those
	// that don't fit wait. None gets all: the reads of an export, and its writes, take at most half, one connection at
	// most a quarter, and less when others have much. 0: 1 GiB; at least 128 MiB, four times the longest payload.
	MaxPayloads int64

	// TLS, if not nil, is the configuration for OptStartTLS: at least a certificate. With ClientAuth and ClientCAs
	// clients' certificates are verified; the names of ClientCAs are not sent. A certificate that expired is logged by
	// NewServer. With RequireTLS a client that does not start TLS gets nothing, not even the names of exports; without,
	// TLS is optional. PlainUnix exempts clients on unix sockets from RequireTLS.
	TLS        *tls.Config
	RequireTLS bool
	PlainUnix  bool

	// Authorize, unless it is nil, says what a client may do with the export of a name, before the client learns whether
	// there is one. It is called in handshakes, concurrently; a connection keeps what it was given.
	Authorize func(c ClientInfo, export string) Access

	// Open, unless it is nil, returns an export that was not added, for one connection: nil where there is none of the name.
	// close is called when the connection does not use it any more. Open is called in handshakes, concurrently, for clients
	// that Authorize gave a right to the name. Such exports are not listed.
	Open func(export string) (e *Export, close func())

	// Log is called with each failure of a connection or a device, in one line. It may be called concurrently.
	Log func(line string)

	// Logger, unless it is nil, receives the same events as records with attributes: peer, export, command, offset,
	// length, error.
	Logger *slog.Logger
}

// A Server serves exports. Its methods may be called concurrently.
type Server struct {
	opts     Options
	log      eventlog.Log
	tls      atomic.Pointer[tls.Config] // Options.TLS as connections use it
	payloads budget                     // see Options.MaxPayloads

	processors int64 // that goroutines run on

	mu          sync.Mutex
	exports     map[string]*export
	defaultName string
	connections atomic.Int64 // grows with mu held
}

// NewServer returns a server without exports.
func NewServer(o Options) *Server {
	setDefault(&o.HandshakeTimeout, 10*time.Second)
	setDefault(&o.StallTimeout, 30*time.Second)
	setDefault(&o.ShutdownTimeout, 5*time.Second)
	if o.MaxPayloads == 0 {
		o.MaxPayloads = 1 << 30
	}
	log := eventlog.Log{Line: o.Log, Logger: o.Logger}
	s := &Server{processors: int64(runtime.GOMAXPROCS(0)), opts: o, log: log,
		exports: make(map[string]*export), payloads: budget{total: max(o.MaxPayloads, leastPayloads)}}
	s.warnOfCertificates(o.TLS)
	s.tls.Store(withoutAuthorityNames(o.TLS))
	return s
}

// leastPayloads is the least MaxPayloads: the longest payload always fits into the share of a connection of an idle
// server.
const leastPayloads = 4 * wire.MaxPayload

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

// Serve accepts connections on l, which it closes, until ctx ends. Then it accepts no more, answers the requests in
// flight, refuses later ones with ESHUTDOWN, closes the connections, and flushes the device of each export that is not
// read-only: within ShutdownTimeout, as far as peers delay it; a device that does not return is waited for. Devices
// stay open.
//
// It returns the errors of the flushes when ctx ended, else the listener's error.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if err := s.accept(ctx, l); err != nil {
		return err
	}
	return s.flush()
}

// accept serves the connections of l until ctx ends, or the listener fails.
func (s *Server) accept(ctx context.Context, l net.Listener) error {
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
			// For example no descriptor is left: connected clients are served, and accept is tried again soon.
			s.log.Event(slog.LevelWarn, fmt.Sprintf("accept: %v", err), "accept failed", err)
			time.Sleep(wait)
			wait = min(2*wait, time.Second)
			continue
		case err != nil:
			return err
		}
		wait = time.Millisecond
		all.Go(func() {
			if err := s.ServeConn(ctx, nc); err != nil {
				from := peer(nc)
				s.log.Event(slog.LevelWarn, fmt.Sprintf("%s: %v", from, err), "connection failed", err, slog.String("peer", from))
			}
		})
	}
}

// flush flushes the exports that are not read-only. The caller of Remove handles one that is being removed.
func (s *Server) flush() error {
	var errs []error
	for _, name := range s.Names() {
		e := s.find(name)
		if e == nil || e.ReadOnly || !e.requests.enter() {
			continue
		}
		if err := e.Device.Flush(); err != nil {
			errs = append(errs, fmt.Errorf("export %q: flush: %w", name, err))
		}
		e.requests.leave()
	}
	return errors.Join(errs...)
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
	if m := s.opts.MaxConnections; m > 0 && s.connections.Load() >= int64(m) {
		return false
	}
	s.connections.Add(1)
	return true
}

func (s *Server) dismiss() { s.connections.Add(-1) }

// ServeConn serves one connection to its end, and closes it. The error is nil when the client
// disconnected in an orderly way, or ctx ended.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	defer nc.Close()
	if !s.admit() {
		return errors.New("refused: too many connections")
	}
	defer s.dismiss()
	if s.opts.RequireTLS && s.opts.TLS == nil {
		panic("nbd: TLS is required and there is no certificate")
	}
	h := newHandshake(ctx, s, nc)
	h.setDeadline(time.Now().Add(s.opts.HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Now()) })
	defer h.closeOpened()
	e, err := h.run()
	stop()
	if err != nil || e == nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	nc.SetDeadline(time.Time{})
	return newConn(s, h.nc, h, e).serve(ctx)
}
