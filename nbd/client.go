package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A Client is an export of a server as a [block.Device], with the abilities to write durably, zero, discard, and report
// extents. Its methods may be called concurrently; each call is a request in flight.
//
// The server is not trusted: every length it sends is bounded, data can't land outside the buffer of the read it
// answers, and a server that violates the protocol is disconnected. All requests fail then, with the reason, as after any
// loss of the connection, and are block.ErrUnavailable. Requests are as long as the server accepts. They are not aligned
// to its block size.
type Client struct {
	nc       net.Conn
	info     Info
	identity string
	noZeroes bool
	// structured and ids (the contexts by their names) are the results of the handshake.
	structured bool
	ids        map[string]uint32

	sending sync.Mutex // requests are sent one at a time
	torn    bool       // a request was sent in part: nothing may follow it
	vectors net.Buffers
	head    [wire.RequestSize]byte

	mu     sync.Mutex
	calls  map[uint64]*call // under way, by cookie
	cookie uint64           // of the last call
	err    error            // why the connection ended
	stall  time.Duration    // how long the server may make no progress with the calls; 0: without bound
	ended  chan struct{}    // closed when no reply is read any more
}

// Info is what a server reports about an export.
type Info struct {
	Size        int64  // bytes
	Description string // for people; may be empty

	ReadOnly, CanFlush, CanFUA, CanTrim, CanZero, CanFastZero, CanCache, MultiConn bool

	// Minimum, preferred and maximum size of a request, in bytes.
	MinBlock, PreferredBlock, MaxBlock uint32

	Contexts []string // the meta contexts that Client.BlockStatus can ask for, sorted
}

// A RemoteError is an error reply of the server. It unwraps to the error that the number stands for: block.ErrReadOnly
// for EPERM, block.ErrNotFast for ENOTSUP, fs.ErrClosed for ESHUTDOWN, which is block.ErrUnavailable, too, else the
// syscall.Errno.
type RemoteError struct {
	Errno   wire.Errno
	Message string // from the server, may be empty
}

func (e *RemoteError) Error() string {
	s := "server: " + e.Unwrap().Error()
	if e.Message != "" {
		s += fmt.Sprintf(" (%q)", e.Message)
	}
	return s
}

// Is reports whether the server refused a request because it ends.
func (e *RemoteError) Is(target error) bool {
	return e.Errno == wire.ESHUTDOWN && target == block.ErrUnavailable
}

func (e *RemoteError) Unwrap() error {
	switch e.Errno {
	case wire.EPERM:
		return block.ErrReadOnly
	case wire.ENOTSUP:
		return block.ErrNotFast
	case wire.ESHUTDOWN:
		return fs.ErrClosed
	case wire.EIO, wire.ENOMEM, wire.EINVAL, wire.ENOSPC, wire.EOVERFLOW:
		return syscall.Errno(e.Errno) // the same numbers as Linux's
	}
	return syscall.EIO
}

// Dial connects to the export that an NBD URI names. ctx bounds connecting and the handshake, not later requests.
// Besides base:allocation the meta contexts given are asked for; it is no error if the server lacks some, see [Info].
func Dial(ctx context.Context, uri string, contexts ...string) (*Client, error) {
	return DialTLS(ctx, uri, nil, contexts...)
}

// DialTLS is Dial with a configuration for URIs that ask for TLS (nbds, nbds+unix): nil, or a ServerName
// that is missing, stand for the URI's host, verified by the system's authorities.
func DialTLS(ctx context.Context, uri string, config *tls.Config, contexts ...string) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	nc, err := new(net.Dialer).DialContext(ctx, u.Network, u.Address)
	if err != nil {
		return nil, err
	}
	identity := u.identity(nc)
	if !u.TLS {
		config = nil
	} else if config == nil || config.ServerName == "" {
		if config = config.Clone(); config == nil {
			config = new(tls.Config)
		}
		if config.ServerName = "localhost"; u.Network == "tcp" {
			config.ServerName, _, _ = net.SplitHostPort(u.Address)
		}
	}
	c, err := newClient(ctx, nc, u.Export, config, contexts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", uri, err)
	}
	c.identity = identity
	return c, nil
}

// identity names the export for comparison: by the address that nc is connected to, and by the device and inode of a
// socket that has a path.
func (u URI) identity(nc net.Conn) string {
	where := u.Address
	if u.Network == "tcp" {
		where = nc.RemoteAddr().String()
	} else if info, err := os.Stat(where); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			where = fmt.Sprintf("%d:%d", st.Dev, st.Ino)
		}
	}
	return fmt.Sprintf("NBD export %q at %s %q", u.Export, u.Network, where)
}

// NewClient connects to a server on nc, which it owns from then on, also when it returns an error; see [Dial].
func NewClient(ctx context.Context, nc net.Conn, export string, contexts ...string) (*Client, error) {
	return newClient(ctx, nc, export, nil, contexts)
}

func newClient(ctx context.Context, nc net.Conn, export string, config *tls.Config, contexts []string) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Now()) })
	c := &Client{nc: nc, ids: make(map[string]uint32), calls: make(map[uint64]*call), ended: make(chan struct{})}
	h := &clientHandshake{c: c, r: c.newReader(nc), tls: config}
	err := h.run(export, append([]string{baseAllocation}, contexts...))
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	c.info.Contexts = slices.Sorted(maps.Keys(c.ids))
	go c.receive(h.r)
	return c, nil
}

// Info returns what the server reported.
func (c *Client) Info() Info {
	i := c.info
	i.Contexts = slices.Clone(i.Contexts)
	return i
}

// Size returns the size of the export in bytes.
func (c *Client) Size() int64 { return c.info.Size }

// BlockSize returns the smallest request that the server takes, in bytes, as the logical block size: 512 where it
// accepts less or reports nothing.
func (c *Client) BlockSize() int { return max(block.SectorSize, int(c.info.MinBlock)) }

// Identity names the server's address and the export, so that two clients of one export are the same disk for
// block.Same. A client made by NewClient is the same as no other.
func (c *Client) Identity() string {
	if c.identity == "" {
		return fmt.Sprintf("NBD client %p", c)
	}
	return c.identity
}

// Close sends NBD_CMD_DISC and closes the connection. Requests in flight fail with fs.ErrClosed, as later ones do. It
// does not flush.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.err == nil {
		c.err = fs.ErrClosed
	}
	c.mu.Unlock()
	// A server that reads nothing must not block Close, nor a request that waits to be sent.
	c.nc.SetWriteDeadline(time.Now().Add(time.Second))
	c.send(wire.Request{Magic: wire.MagicRequest, Command: wire.CmdDisconnect}, nil) // an error does not matter
	err := c.nc.Close()
	<-c.ended
	if errors.Is(err, net.ErrClosed) { // already: by an earlier Close, or after a protocol violation
		return nil
	}
	return err
}

// each calls do for pieces of [off, off+n) that are at most most bytes long.
func each(off, n int64, most uint32, do func(off int64, n uint32) error) error {
	for n > 0 {
		m := min(n, int64(most))
		if err := do(off, uint32(m)); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// maxRange is the longest range of a command without a payload: whole blocks of any size.
const maxRange = 1 << 30

// ReadAt reads len(p) bytes at off; see [block.Device].
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), c.Size()); err != nil {
		return 0, err
	}
	done := 0
	err := each(off, int64(len(p)), c.info.MaxBlock, func(at int64, n uint32) error {
		err := c.do(wire.CmdRead, 0, at, n, nil, &call{into: p[done : done+int(n)]})
		if err == nil {
			done += int(n)
		}
		return err
	})
	return done, err
}

// WriteAt writes p at off; see [block.Device].
func (c *Client) WriteAt(p []byte, off int64) (int, error) { return c.write(p, off, 0) }

// WriteDurableAt writes p at off and returns when it is durable.
func (c *Client) WriteDurableAt(p []byte, off int64) error {
	if c.info.CanFUA {
		_, err := c.write(p, off, wire.FlagFUA)
		return err
	}
	if _, err := c.write(p, off, 0); err != nil {
		return err
	}
	return c.Flush()
}

func (c *Client) write(p []byte, off int64, flags wire.CommandFlags) (int, error) {
	if err := c.checkChange("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	err := each(off, int64(len(p)), c.info.MaxBlock, func(at int64, n uint32) error {
		err := c.do(wire.CmdWrite, flags, at, n, p[done:done+int(n)], new(call))
		if err == nil {
			done += int(n)
		}
		return err
	})
	return done, err
}

// checkChange comes before each command that changes data.
func (c *Client) checkChange(op string, off, n int64) error {
	if c.info.ReadOnly {
		return block.ErrReadOnly
	}
	return block.CheckRange(op, off, n, c.Size())
}

// Flush makes durable every write that returned before, on this connection and, where the server says
// MultiConn, on all. It fails for a server that offers no flush, unless the export is read-only.
func (c *Client) Flush() error {
	if !c.info.CanFlush {
		if c.info.ReadOnly {
			return nil
		}
		return fmt.Errorf("the server has no flush: %w", errors.ErrUnsupported)
	}
	return c.do(wire.CmdFlush, 0, 0, 0, nil, new(call))
}

// ZeroAt makes n bytes at off read as zeros; see [block.Zeroer]. It returns block.ErrNotFast where the server has no
// better way than a write of zeros.
func (c *Client) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := c.checkChange("zero", off, n); err != nil {
		return err
	}
	if !c.info.CanZero || flags&block.OnlyFast != 0 && !c.info.CanFastZero {
		return block.ErrNotFast
	}
	var f wire.CommandFlags
	if flags&block.KeepAllocated != 0 {
		f |= wire.FlagNoHole
	}
	if flags&block.OnlyFast != 0 {
		f |= wire.FlagFastZero
	}
	return each(off, n, maxRange, func(at int64, n uint32) error {
		return c.do(wire.CmdWriteZeroes, f, at, n, nil, new(call))
	})
}

// Discard declares that the content of n bytes at off is no longer needed. It does nothing with a server without the
// command.
func (c *Client) Discard(off, n int64) error {
	if err := c.checkChange("discard", off, n); err != nil {
		return err
	}
	if !c.info.CanTrim {
		return c.closed()
	}
	return each(off, n, maxRange, func(at int64, n uint32) error {
		return c.do(wire.CmdTrim, 0, at, n, nil, new(call))
	})
}

// Extents returns the extents; see [block.Extenter]. All is data where the server does not report them.
func (c *Client) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, c.Size()); err != nil {
		return nil, err
	}
	if _, ok := c.ids[baseAllocation]; !ok {
		return []block.Extent{{Length: n}}, c.closed()
	}
	list, err := c.BlockStatus(baseAllocation, off, n)
	for i := range list {
		list[i].Flags &= block.Hole | block.ReadsZero // other flags are undefined
	}
	return list, err
}

// BlockStatus requests the status of n > 0 bytes at off in a meta context. The extents may end before the range does,
// but not before its first byte. Their flags have the meaning that the context gives them.
func (c *Client) BlockStatus(context string, off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, c.Size()); err != nil {
		return nil, err
	}
	id, ok := c.ids[context]
	if !ok {
		return nil, fmt.Errorf("meta context %q was not negotiated: %w", context, errors.ErrUnsupported)
	}
	got := &call{want: id, status: true}
	if err := c.do(wire.CmdBlockStatus, 0, off, uint32(min(n, maxRange)), nil, got); err != nil {
		return nil, err
	}
	return got.extents, nil
}

// closed returns the reason when the connection has ended.
func (c *Client) closed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
