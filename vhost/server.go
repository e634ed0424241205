// Package vhost serves block devices to virtual machines as vhost-user-blk back-ends
// (docs/spec/vhost-user-blk.md).
//
//	s := vhost.NewServer("/run/disks", vhost.Options{})
//	err := s.Add(vhost.Export{Name: "vda", Device: dev}) // listens on /run/disks/vda.sock
//	...
//	err = s.Serve(ctx) // until ctx ends
//
// Each export has a unix socket and serves one front-end at a time; another one waits until the first has gone. Requests
// are executed concurrently and complete in any order. A FLUSH covers all writes that completed before it. Where the
// driver negotiated no write cache, or turned it off, each write is durable when it completes.
//
// # Guarantees
//
// Front-ends and guests are not trusted: addresses, lengths and indices are checked on private copies. A driver that
// breaks the rules loses its ring, a front-end its connection, also one that truncates the memory it shared.
// Memory is bounded: at most 16 requests of a session use the device at a time, with at most 1 MiB each, and beside them one
// quick request of each ring, with at most 64 KiB.
package vhost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/eventlog"
)

// maxQueues bounds Export.Queues.
const maxQueues = 64

// Options are the options of a Server. The zero value is usable.
type Options struct {
	// Log receives one line for each problem with a front-end, a guest or a device. It may be called concurrently.
	Log func(line string)

	// Logger, unless it is nil, receives the same as records with the attribute "export".
	Logger *slog.Logger
}

// An Export is a device under a name.
type Export struct {
	Name   string // of the socket, without ".sock"; not empty, without a slash
	Device block.Device

	ReadOnly bool   // changes fail, whatever the device can do
	Durable  bool   // each change is durable when the device's method returns
	CanTrim  bool   // DISCARD is offered, and becomes block.Discard
	ID       string // serial number, of which guests see 20 bytes; "": Name
	Queues   int    // virtqueues that are offered; 0: 4, at most 64
}

// export is an Export that is served.
type export struct {
	Export
	opts     *Options
	path     string
	socket   os.FileInfo // of path, as it was made
	listener *net.UnixListener

	writeback atomic.Bool  // the guest's write cache is on; kept over sessions, so that a reconnect weakens nothing
	announced atomic.Int64 // size in bytes that was last announced to a front-end; 0: none
	errors    atomic.Int64 // requests that failed

	done chan struct{} // closed when nothing is served any more

	mu      sync.Mutex
	closed  bool
	session *session
}

// A Server serves exports, each on a socket in one folder. Its methods may be called concurrently.
type Server struct {
	dir  string
	opts Options

	mu      sync.Mutex
	exports map[string]*export
}

// NewServer returns a server without exports, whose sockets will be in dir.
func NewServer(dir string, o Options) *Server {
	return &Server{dir: dir, opts: o, exports: map[string]*export{}}
}

// Add serves e from now on. The socket is accessible to its owner only. A socket that is left over from a server that
// ended is replaced; one that a server listens on is block.ErrInUse.
func (s *Server) Add(e Export) error {
	switch {
	case e.Name == "" || strings.ContainsAny(e.Name, "/\x00") || e.Device == nil || e.Queues < 0 || e.Queues > maxQueues:
		return fmt.Errorf("vhost: export %q is not possible", e.Name)
	}
	if e.Queues == 0 {
		e.Queues = 4
	}
	if e.ID == "" {
		e.ID = e.Name
	}
	if err := checkDevice(e.Device); err != nil {
		return fmt.Errorf("vhost: export %q: %w", e.Name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[e.Name] != nil {
		return fmt.Errorf("vhost: export %q exists", e.Name)
	}
	path := filepath.Join(s.dir, e.Name+".sock")
	l, socket, err := listen(path)
	if err != nil {
		return fmt.Errorf("vhost: %w", err)
	}
	x := &export{Export: e, opts: &s.opts, path: path, socket: socket, listener: l, done: make(chan struct{})}
	x.writeback.Store(true)
	s.exports[e.Name] = x
	go x.accept()
	return nil
}

// Names lists the exports in order.
func (s *Server) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.exports))
}

// Path returns the socket of an export, whether it exists or not.
func (s *Server) Path(name string) string { return filepath.Join(s.dir, name+".sock") }

// Remove ends the export name and disconnects its front-end; requests that use the device are completed, those that
// wait for space are abandoned. When it returns nil nothing uses the device any more.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.mu.Lock()
	x := s.exports[name]
	delete(s.exports, name)
	s.mu.Unlock()
	if x == nil {
		return fmt.Errorf("vhost: there is no export %q", name)
	}
	x.close()
	select {
	case <-x.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Serve waits until ctx ends. Then it removes all exports and flushes those that are not read-only; it returns the errors
// of that. Devices stay open. Exports are served before Serve is called.
func (s *Server) Serve(ctx context.Context) error {
	<-ctx.Done()
	s.mu.Lock()
	list := slices.Collect(maps.Values(s.exports))
	clear(s.exports)
	s.mu.Unlock()
	for _, x := range list {
		x.close()
	}
	var all error
	for _, x := range list {
		<-x.done
		if !x.ReadOnly {
			if err := x.Device.Flush(); err != nil {
				all = errors.Join(all, fmt.Errorf("vhost: flush %q: %w", x.Name, err))
			}
		}
	}
	return all
}

func (x *export) log(format string, args ...any) {
	if x.opts.Log == nil && x.opts.Logger == nil {
		return
	}
	text := fmt.Sprintf(format, args...)
	log := eventlog.Log{Line: x.opts.Log, Logger: x.opts.Logger}
	log.Event(slog.LevelWarn, fmt.Sprintf("vhost %q: %s", x.Name, text), text, nil, slog.String("export", x.Name))
}

// accept serves one front-end after the other.
func (x *export) accept() {
	defer close(x.done)
	for {
		c, err := x.listener.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				x.log("%v", err)
			}
			return
		}
		ses := newSession(x, c)
		x.mu.Lock()
		x.session = ses
		if x.closed {
			ses.fail(net.ErrClosed)
		}
		x.mu.Unlock()
		if err := ses.run(); err != nil {
			x.log("disconnected: %v", err)
		}
		x.mu.Lock()
		x.session = nil
		x.mu.Unlock()
	}
}

// close ends listening and the session.
func (x *export) close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.closed = true
	if now, err := os.Lstat(x.path); err == nil && os.SameFile(now, x.socket) { // not one of another server by now
		os.Remove(x.path)
	}
	x.listener.Close()
	if x.session != nil {
		x.session.fail(net.ErrClosed)
	}
}

// listen makes a socket that its owner alone can connect to: it gets its name when it is ready.
func listen(path string) (*net.UnixListener, os.FileInfo, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&os.ModeSocket == 0 {
			return nil, nil, fmt.Errorf("%s exists and is not a socket", path)
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, nil, fmt.Errorf("%s: %w", path, block.ErrInUse)
		}
	}
	private, err := os.MkdirTemp(filepath.Dir(path), ".vhost")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(private)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(private, "s"), Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false)
	own := filepath.Join(private, "s")
	socket, err := os.Lstat(own)
	if err = errors.Join(err, os.Chmod(own, 0o600), os.Rename(own, path)); err != nil {
		l.Close()
		return nil, nil, err
	}
	return l, socket, nil
}
