package source

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
)

// Bounds on a server that does not answer.
const (
	connectTimeout = 30 * time.Second // of the first connection
	replyTimeout   = 30 * time.Second // without a byte from the server while requests are in flight
)

// remoteConnections is the largest number of connections to an export that allows several.
const remoteConnections = 4

// An Export is an NBD export that is read. Where the server allows it, requests in flight at once use several connections; the
// further ones are made when they are needed.
type Export struct {
	block.Forward // the first connection
	dial          func(ctx context.Context) (*nbd.Redialer, error)
	inFlight      atomic.Int64
	next          atomic.Uint64

	mu    sync.Mutex
	conns []*nbd.Redialer
	most  int
}

// OpenExport opens the export of a URI. The meta contexts given can be asked for by BlockStatus: one that the server lacks is an
// error.
func OpenExport(uri string, o NBDOptions, contexts ...string) (*Export, error) {
	timeout := o.Timeout
	if timeout == 0 {
		timeout = replyTimeout
	}
	r := &Export{most: 1}
	var multi atomic.Bool // connections are replaced side by side
	r.dial = func(ctx context.Context) (*nbd.Redialer, error) {
		d, err := nbd.NewRedialer(ctx, o.Reconnect, func(ctx context.Context) (*nbd.Client, error) {
			c, err := nbd.DialTLS(ctx, uri, o.TLS, contexts...)
			if err == nil {
				c.SetTimeout(timeout)
				multi.Store(c.Info().MultiConn)
			}
			return c, err
		})
		if err == nil {
			d.KeepTrying()
		}
		return d, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), min(connectTimeout, timeout))
	defer cancel()
	first, err := r.dial(ctx)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("the server did not answer within %v: %w", min(connectTimeout, timeout), err)
		}
		return nil, err
	}
	for _, name := range contexts {
		if !slices.Contains(first.Info().Contexts, name) {
			first.Close()
			return nil, fmt.Errorf("the server has no meta context %q of this export", name)
		}
	}
	if multi.Load() {
		r.most = remoteConnections
	}
	r.Forward, r.conns = block.NewForward(first), []*nbd.Redialer{first}
	return r, nil
}

// conn returns the connection for a request, and the end of the request.
func (r *Export) conn() (*nbd.Redialer, func()) {
	n := r.inFlight.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if have := len(r.conns); have < r.most && n > int64(have) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if c, err := r.dial(ctx); err == nil && c.Size() == r.conns[0].Size() {
			r.conns = append(r.conns, c)
		} else {
			r.most = have // it allows no more
			if err == nil {
				c.Close()
			}
		}
	}
	c := r.conns[r.next.Add(1)%uint64(len(r.conns))]
	return c, func() { r.inFlight.Add(-1) }
}

// ReadAt reads by one of the connections.
func (r *Export) ReadAt(p []byte, off int64) (int, error) {
	c, end := r.conn()
	defer end()
	return c.ReadAt(p, off)
}

// BlockStatus asks for the status of a range in a meta context by one of the connections; see nbd.Client.BlockStatus.
func (r *Export) BlockStatus(context string, off, n int64) ([]block.Extent, error) {
	c, end := r.conn()
	defer end()
	return c.BlockStatus(context, off, n)
}

// Flush does nothing: nothing is written.
func (r *Export) Flush() error { return nil }

// WriteAt returns block.ErrReadOnly, as every change does; a range outside the disk is a *block.RangeError, too.
func (r *Export) WriteAt(p []byte, off int64) (int, error) {
	return 0, r.refuse("write", off, int64(len(p)))
}

// WriteDurableAt is refused like WriteAt.
func (r *Export) WriteDurableAt(p []byte, off int64) error {
	return r.refuse("write", off, int64(len(p)))
}

// WriteLastAt is refused like WriteAt.
func (r *Export) WriteLastAt(p []byte, off int64) error { return r.refuse("write", off, int64(len(p))) }

// ZeroAt is refused like WriteAt.
func (r *Export) ZeroAt(off, n int64, _ block.ZeroFlags) error { return r.refuse("zero", off, n) }

// Discard is refused like WriteAt.
func (r *Export) Discard(off, n int64) error { return r.refuse("discard", off, n) }

// Allocate is refused like WriteAt.
func (r *Export) Allocate(off, n int64) error { return r.refuse("allocate", off, n) }

// Grow is refused: block.ErrFixedSize.
func (r *Export) Grow(int64) error { return block.ErrFixedSize }

// CanGrow returns false.
func (r *Export) CanGrow() bool { return false }

func (r *Export) refuse(op string, off, n int64) error {
	return errors.Join(block.CheckRange(op, off, n, r.Size()), block.ErrReadOnly)
}

// Close closes the connections.
func (r *Export) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.most = 0
	var errs []error
	for _, c := range r.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
