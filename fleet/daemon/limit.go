package daemon

import (
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// maxDelay bounds how long a rate delays one request, so that a node can be dropped and a daemon ends.
const maxDelay = 2 * time.Second

// Limits hold the limits of nodes' exports: rates, and quotas that are reached. A fleet's exports are the devices that Wrap
// returns. The zero value is ready. Its methods may be called concurrently.
type Limits struct {
	mu    sync.Mutex
	nodes map[string]*limit
}

// Wrap returns the device of a node's export: dev, within the limits of the node.
func (l *Limits) Wrap(node string, dev block.Device) block.Device {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nodes == nil {
		l.nodes = map[string]*limit{}
	}
	n := l.nodes[node]
	if n == nil {
		n = &limit{}
		l.nodes[node] = n
	}
	n.seen = false
	return &limitedDevice{Forward: block.NewForward(dev), limit: n}
}

// limit is what one node may do.
type limit struct {
	seen bool // in the tree since Wrap; guarded by Limits.mu

	full                                   atomic.Pointer[fullError] // nil: writes are allowed
	reads, writes, readBytes, writtenBytes bucket
}

func (n *limit) set(p Policy, full string) (changed bool) {
	n.reads.set(p.ReadIOPS)
	n.writes.set(p.WriteIOPS)
	n.readBytes.set(p.ReadBytes)
	n.writtenBytes.set(p.WriteBytes)
	old := n.full.Load()
	if full == "" {
		if old != nil {
			n.full.Store(nil)
			close(old.room)
		}
		return old != nil
	}
	if old != nil && old.why == full && old.wait == (p.OnFull == FullPause) {
		return false
	}
	n.full.Store(&fullError{why: full, wait: p.OnFull == FullPause, room: make(chan struct{})})
	if old != nil {
		close(old.room) // those that wait see the new one
	}
	return old == nil
}

// fullError refuses a write of a node whose quota is reached.
type fullError struct {
	why  string
	wait bool
	room chan struct{} // closed when it is worth trying again
}

func (e *fullError) Error() string { return "quota: " + e.why }
func (e *fullError) Unwrap() error { return syscall.ENOSPC }

// Retry makes it a block.RetryLater where the policy is to wait.
func (e *fullError) Retry() <-chan struct{} {
	if e.wait {
		return e.room
	}
	return nil
}

// limitedDevice is the device of an export within limits.
type limitedDevice struct {
	block.Forward
	limit *limit
}

func (d *limitedDevice) read(n int64) { delay(d.limit.reads.take(1), d.limit.readBytes.take(n)) }

func (d *limitedDevice) write(n int64) error {
	if full := d.limit.full.Load(); full != nil {
		return full
	}
	delay(d.limit.writes.take(1), d.limit.writtenBytes.take(n))
	return nil
}

func (d *limitedDevice) ReadAt(p []byte, off int64) (int, error) {
	d.read(int64(len(p)))
	return d.Forward.ReadAt(p, off)
}

func (d *limitedDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.write(int64(len(p))); err != nil {
		return 0, err
	}
	return d.Forward.WriteAt(p, off)
}

func (d *limitedDevice) WriteDurableAt(p []byte, off int64) error {
	if err := d.write(int64(len(p))); err != nil {
		return err
	}
	return d.Forward.WriteDurableAt(p, off)
}

func (d *limitedDevice) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := d.write(0); err != nil { // zeros are holes
		return err
	}
	return d.Forward.ZeroAt(off, n, flags)
}

func (d *limitedDevice) Discard(off, n int64) error {
	if err := d.write(0); err != nil {
		return err
	}
	return d.Forward.Discard(off, n)
}

func delay(a, b time.Duration) {
	if wait := min(max(a, b), maxDelay); wait > 0 {
		time.Sleep(wait)
	}
}

// A bucket is a rate: tokens a second, of which those of a tenth of a second may be used at once. It is safe for concurrent
// use.
type bucket struct {
	rate atomic.Int64 // tokens a second; 0: no limit

	mu   sync.Mutex
	free time.Time // when all tokens that were taken have been paid for
}

func (b *bucket) set(rate int64) { b.rate.Store(rate) }

// take takes n tokens and returns how long to wait for them.
func (b *bucket) take(n int64) time.Duration {
	rate := b.rate.Load()
	if rate == 0 || n == 0 {
		return 0
	}
	return b.takeAt(time.Now(), n, rate)
}

func (b *bucket) takeAt(now time.Time, n, rate int64) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if burst := now.Add(-time.Second / 10); b.free.Before(burst) {
		b.free = burst
	}
	b.free = b.free.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	return max(b.free.Sub(now), 0)
}

// set sets the limits of nodes, forgets those of nodes that are gone, and returns the nodes whose writes are refused from now
// on.
func (l *Limits) set(all map[string]nodeLimits) (full []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, n := range l.nodes {
		to, there := all[name]
		if !there {
			// The race considered: a node that was made after the tree was looked at is not in it, and was not seen.
			if n.seen {
				delete(l.nodes, name)
			}
			continue
		}
		n.seen = true
		if n.set(to.policy, to.full) && to.full != "" {
			full = append(full, name)
		}
	}
	return full
}
