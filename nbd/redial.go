package nbd

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A Redialer is an export as a [block.Device] that reconnects: when its connection is lost it connects again, within a
// time limit. Its methods may be called concurrently.
//
// After a lost connection:
//
//   - Reads and block status are requested again.
//   - A change in flight fails, since the server may or may not have executed it, and may still do so.
//   - Changes that were acknowledged and not flushed may be lost, when the server was: after it every Flush and durable
//     write fails, as after a failed Flush (see block.Device). To continue, open the export again.
//   - An export that has another size after it, or lacks an ability that it had, is refused permanently.
//
// With KeepChanges, changes are sent again instead.
type Redialer struct {
	dial  func(ctx context.Context) (*Client, error)
	bound time.Duration
	ctx   context.Context // ended by Close
	end   context.CancelFunc
	info  Info         // of the first connection
	name  string       // its identity
	kept  *keptChanges // nil without KeepChanges

	redialing sync.Mutex // one at a time

	mu          sync.Mutex
	keepTrying  bool
	failures    uint64 // attempts to connect that failed
	lastFailure error
	client      *Client
	changed     uint64 // changes that were acknowledged, and
	flushed     uint64 // those of them that a Flush covers
	failed      error  // of the first Flush that failed: all later ones do
	gone        error  // why it does not connect again
}

// redialPause is how long a Redialer waits between attempts to connect.
const redialPause = 100 * time.Millisecond

// NewRedialer connects with dial, at first and whenever the connection is lost. ctx bounds the first connecting; each
// later one is tried for bound, and then the device fails permanently; see KeepTrying.
func NewRedialer(ctx context.Context, bound time.Duration, dial func(ctx context.Context) (*Client, error)) (*Redialer, error) {
	c, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	r := &Redialer{dial: dial, bound: bound, client: c, info: c.Info(), name: c.Identity()}
	r.ctx, r.end = context.WithCancel(context.Background())
	return r, nil
}

// KeepTrying has the device not fail permanently, as long as nothing was written: when the bound is over, the requests that waited
// fail, and the next one tries to connect again. It is called before the first request.
func (r *Redialer) KeepTrying() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keepTrying = true
}

// current returns the connection, or why there is none any more.
func (r *Redialer) current() (*Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.client, r.gone
}

// lost reports whether err is due to the end of c's connection; a server also announces that (ESHUTDOWN).
func lost(c *Client, err error) bool {
	if answer := (*RemoteError)(nil); errors.As(err, &answer) {
		return answer.Errno == wire.ESHUTDOWN
	}
	return err != nil && c.closed() != nil
}

// again calls do, with another connection each time that one is lost.
func (r *Redialer) again(do func(c *Client) error) error {
	var first time.Time // when a connection was lost
	for {
		c, err := r.current()
		if err != nil {
			return err
		}
		if err = do(c); !lost(c, err) {
			return err
		}
		if first.IsZero() {
			first = time.Now()
		} else if time.Since(first) > r.bound { // it connects, and does no more
			return err
		}
		if err := r.redial(c, err); err != nil {
			return err
		}
	}
}

// change calls do, which changes data, once: when the connection is lost meanwhile the change may have been made, or
// may still be. A connection that was lost before is replaced first.
//
// With KeepChanges it is called until it is acknowledged. again then returns what repeats the change later, and needs that many
// bytes of memory.
func (r *Redialer) change(do func(c *Client) error, bytes int, again func() func(c *Client) error) error {
	if r.kept != nil {
		return r.changeKept(do, int64(bytes), again)
	}
	c, err := r.current()
	if err == nil && c.closed() != nil {
		if err = r.redial(c, c.closed()); err == nil {
			c, err = r.current()
		}
	}
	if err != nil {
		return err
	}
	if err := do(c); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changed++
	if r.client != c { // lost since it was acknowledged
		r.failUnflushed(c.closed())
	}
	return nil
}

// failUnflushed makes this Flush and later ones fail because of changes that were lost with a connection. mu is held.
func (r *Redialer) failUnflushed(cause error) {
	if r.failed == nil {
		r.failed = fmt.Errorf("the connection was lost with changes that had not been flushed: %w", cause)
	}
}

// redial replaces the lost connection, unless another call has.
func (r *Redialer) redial(old *Client, cause error) error {
	r.mu.Lock()
	failures := r.failures
	r.mu.Unlock()
	r.redialing.Lock()
	defer r.redialing.Unlock()
	if c, err := r.current(); err != nil || c != old {
		return err
	}
	if err := r.failedSince(failures); err != nil {
		return err
	}
	old.Close()
	ctx, cancel := context.WithTimeout(r.ctx, r.bound)
	defer cancel()
	c, err := r.connect(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gone != nil { // closed meanwhile
		if err == nil {
			c.Close()
		}
		return r.gone
	}
	if err != nil {
		err = fmt.Errorf("connection lost: %w; connecting again: %w", cause, err)
		r.failures, r.lastFailure = r.failures+1, err
		if !r.keepTrying || r.changed > 0 {
			r.gone = err
		}
		return err
	}
	r.client = c
	if r.kept == nil && r.changed > r.flushed {
		r.failUnflushed(cause)
	}
	return nil
}

// failedSince returns the error of an attempt to connect that failed since there were so many failures: who waited for it does not
// try again.
func (r *Redialer) failedSince(failures uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failures > failures {
		return r.lastFailure
	}
	return nil
}

// connect tries to connect until ctx ends.
func (r *Redialer) connect(ctx context.Context) (*Client, error) {
	for {
		c, err := r.dial(ctx)
		if err == nil {
			if err = r.sameExport(c.Info()); err != nil {
				c.Close()
				return nil, err
			}
			if err = r.repeatKept(c); err == nil {
				return c, nil
			}
			c.Close()
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(redialPause):
		}
	}
}

// repeatKept sends kept changes to a new server. An error means that its connection is lost too. What the server refuses fails later flushes.
func (r *Redialer) repeatKept(c *Client) error {
	if r.kept == nil {
		return nil
	}
	err := r.kept.repeat(c)
	if err == nil || lost(c, err) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = cmp.Or(r.failed, err)
	return nil
}

// sameExport refuses an export that differs from the one before.
func (r *Redialer) sameExport(now Info) error {
	was := r.info
	if now.Size != was.Size || now.MinBlock > was.MinBlock || now.ReadOnly != was.ReadOnly || was.CanFlush && !now.CanFlush {
		return fmt.Errorf("the export has changed: it had %d bytes, and has %d; read-only %v, now %v", was.Size, now.Size, was.ReadOnly, now.ReadOnly)
	}
	return nil
}

// Close ends the connection; see [Client.Close]. Later requests fail with fs.ErrClosed.
func (r *Redialer) Close() error {
	r.mu.Lock()
	r.gone = fs.ErrClosed
	c := r.client
	r.mu.Unlock()
	r.end()
	return c.Close()
}

// Info returns what the server reported at first.
func (r *Redialer) Info() Info { return r.info }

// Size returns the size of the export in bytes.
func (r *Redialer) Size() int64 { return r.info.Size }

// BlockSize is that of the Client.
func (r *Redialer) BlockSize() int { return max(block.SectorSize, int(r.info.MinBlock)) }

// Identity is that of the first Client.
func (r *Redialer) Identity() string { return r.name }

// ReadAt reads, and repeats it on a new connection when one is lost.
func (r *Redialer) ReadAt(p []byte, off int64) (n int, err error) {
	err = r.again(func(c *Client) (err error) {
		n, err = c.ReadAt(p, off)
		return err
	})
	return n, err
}

// Extents returns extents; like ReadAt it is repeated.
func (r *Redialer) Extents(off, n int64) (list []block.Extent, err error) {
	err = r.again(func(c *Client) (err error) {
		list, err = c.Extents(off, n)
		return err
	})
	return list, err
}

// BlockStatus requests the status of a range in a meta context; see [Client.BlockStatus].
func (r *Redialer) BlockStatus(context string, off, n int64) (list []block.Extent, err error) {
	err = r.again(func(c *Client) (err error) {
		list, err = c.BlockStatus(context, off, n)
		return err
	})
	return list, err
}

// WriteAt writes; see [Redialer] for what a lost connection means.
func (r *Redialer) WriteAt(p []byte, off int64) (n int, err error) {
	err = r.change(func(c *Client) (err error) {
		n, err = c.WriteAt(p, off)
		return err
	}, len(p), func() func(*Client) error { return writes(bytes.Clone(p), off) })
	return n, err
}

// writes returns what writes p at off.
func writes(p []byte, off int64) func(c *Client) error {
	return func(c *Client) error {
		_, err := c.WriteAt(p, off)
		return err
	}
}

// ZeroAt zeroes; see [Client.ZeroAt].
func (r *Redialer) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	do := func(c *Client) error { return c.ZeroAt(off, n, flags) }
	return r.change(do, 0, func() func(*Client) error { return do })
}

// Discard discards; see [Client.Discard].
func (r *Redialer) Discard(off, n int64) error {
	do := func(c *Client) error { return c.Discard(off, n) }
	return r.change(do, 0, func() func(*Client) error { return do })
}

// WriteDurableAt writes durably, unless a Flush has failed. A failure counts as a failed Flush.
func (r *Redialer) WriteDurableAt(p []byte, off int64) error {
	if err := block.CheckRange("write", off, int64(len(p)), r.Size()); err != nil {
		return err
	}
	return r.synced(func() error {
		return r.change(func(c *Client) error { return c.WriteDurableAt(p, off) }, len(p),
			func() func(*Client) error { return writes(bytes.Clone(p), off) }) // older ones are repeated before it
	})
}

// Flush makes durable every write that returned before. It fails once unflushed changes were lost with a connection.
func (r *Redialer) Flush() error {
	return r.synced(func() error {
		r.mu.Lock()
		changed := r.changed
		r.mu.Unlock()
		var kept uint64
		if r.kept != nil {
			kept = r.kept.newest()
		}
		err := r.again(func(c *Client) error {
			if err := r.failure(); err != nil { // with the connection before this one
				return err
			}
			return c.Flush()
		})
		if err == nil {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.flushed = max(r.flushed, changed)
			if r.kept != nil {
				r.kept.flushed(kept)
			}
		}
		return err
	})
}

// failure returns the first failure of a Flush.
func (r *Redialer) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

// synced calls do, which makes something durable, unless such a call failed before, and records its failure.
func (r *Redialer) synced(do func() error) error {
	if r.info.ReadOnly {
		return do() // nothing can be lost
	}
	if err := r.failure(); err != nil {
		return err
	}
	err := do()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed == nil {
		r.failed = err
	}
	return r.failed
}
