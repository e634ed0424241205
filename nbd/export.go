package nbd

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// An Export is a device under a name.
type Export struct {
	Name        string // at most 4096 bytes of UTF-8 without NUL
	Description string // for people; may be empty
	Device      block.Device

	ReadOnly  bool // changes are refused with EPERM
	CanTrim   bool // TRIM is offered, and becomes block.Discard
	MultiConn bool // a flush on any connection covers the writes completed on all: true for a Device served as it is

	// PreferredBlock is the size in bytes, a power of two, that the server advertises as preferred; 0: 4096.
	PreferredBlock uint32

	// Contexts are meta contexts that BLOCK_STATUS offers besides base:allocation, by name. MoreContexts, unless it is nil,
	// returns further ones, of the moment: it is called in handshakes, concurrently. Names that are not legal are left out.
	Contexts     map[string]ContextFunc
	MoreContexts func() map[string]ContextFunc
}

// A ContextFunc returns the status of n > 0 bytes at off. Like block.Extents it may stop early, but not before the
// first byte.
type ContextFunc func(off, n int64) ([]block.Extent, error)

// baseAllocation is the context that every export has.
const baseAllocation = "base:allocation"

// Counters count the requests of an export since it was added.
type Counters struct {
	Connections  int64 `json:"connections"` // now
	InFlight     int64 `json:"in_flight"`   // requests, now
	Reads        int64 `json:"reads"`
	ReadBytes    int64 `json:"read_bytes"`
	Writes       int64 `json:"writes"` // and zeroes and trims
	WrittenBytes int64 `json:"written_bytes"`
	Flushes      int64 `json:"flushes"`
	Errors       int64 `json:"errors"`  // requests answered with one
	Waiting      int64 `json:"waiting"` // changes that wait for space in the device, now
}

// export is an Export while it is served.
type export struct {
	Export

	gone     chan struct{} // closed by Remove
	goneOnce sync.Once
	requests requestGroup // those that use the device

	connections, reads, readBytes, writes, writtenBytes, flushes, errors, waiting atomic.Int64

	readPayloads, writePayloads class

	logged [wire.CmdBlockStatus + 1]atomic.Bool // by command: a failure was logged
}

// failed logs a device's failure. The client gets only the number, since the text may name files of the server. Only
// the first failure of each command is logged, since a failed disk may return thousands a second.
func (e *export) failed(s *Server, r wire.Request, err error) {
	if errnoOf(err) == wire.ENOTSUP || e.logged[r.Command].Swap(true) {
		return
	}
	s.log.Event(slog.LevelError,
		fmt.Sprintf("export %q: %v of %d bytes at byte %d: %v", e.Name, r.Command, r.Length, r.Offset, err),
		"request failed", err, slog.String("export", e.Name), slog.String("command", r.Command.String()),
		slog.Uint64("offset", r.Offset), slog.Uint64("length", uint64(r.Length)))
}

// requestGroup counts requests in flight. After close it admits no more, and the caller can wait for the rest to end.
// (A sync.WaitGroup must not grow from zero while another goroutine waits.)
type requestGroup struct {
	mu     sync.Mutex
	n      int64
	closed bool
	empty  chan struct{} // made by close; closed when n is 0
}

// enter reports false after close.
func (g *requestGroup) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.n++
	return true
}

func (g *requestGroup) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n--
	if g.closed && g.n == 0 {
		close(g.empty)
	}
}

// close refuses further requests and returns a channel that closes when none is left.
func (g *requestGroup) close() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.closed = true
		g.empty = make(chan struct{})
		if g.n == 0 {
			close(g.empty)
		}
	}
	return g.empty
}

func (g *requestGroup) count() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

// flags are the transmission flags of the export. DF is about structured replies.
func (e *export) flags(structured, readOnly bool) uint16 {
	f := wire.HasFlags | wire.SendFlush | wire.SendFUA | wire.SendCache
	if structured {
		f |= wire.SendDF
	}
	if e.MultiConn {
		f |= wire.CanMultiConn
	}
	if e.ReadOnly || readOnly {
		return f | wire.ReadOnly
	}
	f |= wire.SendWriteZeroes | wire.SendFastZero
	if e.CanTrim {
		f |= wire.SendTrim
	}
	return f
}

func (e *export) blockSizes() wire.BlockSizes {
	s := wire.BlockSizes{Min: 1, Preferred: e.PreferredBlock, Max: wire.MaxPayload}
	if s.Preferred == 0 {
		s.Preferred = 4096
	}
	return s
}

// contexts returns all meta contexts that the export has now.
func (e *export) contexts() map[string]ContextFunc {
	all := map[string]ContextFunc{}
	if e.MoreContexts != nil {
		for name, f := range e.MoreContexts() {
			if validContext(name) {
				all[name] = f
			}
		}
	}
	maps.Copy(all, e.Contexts)
	all[baseAllocation] = e.allocation
	return all
}

// validContext reports whether a name can be that of a meta context of an export's own.
func validContext(name string) bool {
	return wire.ValidName(name) && strings.Contains(name, ":") && !strings.HasPrefix(name, "base:")
}

func (e *export) allocation(off, n int64) ([]block.Extent, error) {
	return block.Extents(e.Device, off, n)
}

// Add serves e from now on. A name that is in use or invalid is an error.
func (s *Server) Add(e Export) error {
	if e.Device == nil {
		panic("nbd: export without a device")
	}
	if !wire.ValidName(e.Name) {
		return fmt.Errorf("export name %q: more than %d bytes, or not UTF-8 without NUL", e.Name, wire.MaxName)
	}
	if !wire.ValidName(e.Description) {
		return fmt.Errorf("export %q: description of more than %d bytes, or not UTF-8 without NUL", e.Name, wire.MaxName)
	}
	for name := range e.Contexts {
		if !validContext(name) {
			return fmt.Errorf("export %q: meta context %q: want namespace:name, a namespace other than base", e.Name, name)
		}
	}
	if b := e.PreferredBlock; b&(b-1) != 0 || b > wire.MaxPayload {
		return fmt.Errorf("export %q: preferred block of %d bytes is no power of two up to %d", e.Name, b, wire.MaxPayload)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[e.Name] != nil {
		return fmt.Errorf("export name %q is taken", e.Name)
	}
	s.exports[e.Name] = &export{Export: e, gone: make(chan struct{})}
	return nil
}

// Remove ends the export name: new connections don't find it, requests under way are answered, later ones refused with
// ESHUTDOWN, and its connections closed. When it returns nil nothing uses the device any more. When ctx ends first the
// export is removed anyway, but requests may still be in flight.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.mu.Lock()
	e := s.exports[name]
	delete(s.exports, name)
	s.mu.Unlock()
	if e == nil {
		return fmt.Errorf("no export %q", name)
	}
	empty := e.requests.close()
	e.goneOnce.Do(func() { close(e.gone) })
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("export %q: requests still under way: %w", name, context.Cause(ctx))
	}
}

// SetDefault makes name the export that clients get for the empty name. An export that has the empty name takes
// precedence; SetDefault("") removes the default.
func (s *Server) SetDefault(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.defaultName = name
}

// find returns the export that a client asked for, or nil.
func (s *Server) find(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.exports[name]; e != nil || name != "" {
		return e
	}
	return s.exports[s.defaultName]
}

// Counters returns the counters of the export name, and whether it exists.
func (s *Server) Counters(name string) (Counters, bool) {
	s.mu.Lock()
	e := s.exports[name]
	s.mu.Unlock()
	if e == nil {
		return Counters{}, false
	}
	return Counters{
		Connections: e.connections.Load(), InFlight: e.requests.count(),
		Reads: e.reads.Load(), ReadBytes: e.readBytes.Load(),
		Writes: e.writes.Load(), WrittenBytes: e.writtenBytes.Load(),
		Flushes: e.flushes.Load(), Errors: e.errors.Load(), Waiting: e.waiting.Load(),
	}, true
}
