package daemon

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// maxDelay bounds how long a rate delays one request, so that a node can be dropped and a daemon ends.
const maxDelay = 2 * time.Second

// Limits hold the rates of nodes' exports. A fleet's exports are the devices that Wrap returns. The zero value is ready. Its methods may be called concurrently.
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

	reads, writes, readBytes, writtenBytes bucket
}

func (n *limit) set(p Policy) {
	n.reads.set(p.ReadIOPS)
	n.writes.set(p.WriteIOPS)
	n.readBytes.set(p.ReadBytes)
	n.writtenBytes.set(p.WriteBytes)
}

// limitedDevice is the device of an export within limits.
type limitedDevice struct {
	block.Forward
	limit *limit
}

func (d *limitedDevice) read(n int64) { delay(d.limit.reads.take(1), d.limit.readBytes.take(n)) }

func (d *limitedDevice) write(n int64) { delay(d.limit.writes.take(1), d.limit.writtenBytes.take(n)) }

func (d *limitedDevice) ReadAt(p []byte, off int64) (int, error) {
	d.read(int64(len(p)))
	return d.Forward.ReadAt(p, off)
}

// ReadCached waits for the limits after the reads: only those that are done count.
func (d *limitedDevice) ReadCached(reads []block.Read) int {
	n := d.Forward.ReadCached(reads)
	for i := range reads {
		if reads[i].Done {
			d.read(int64(len(reads[i].P)))
		}
	}
	return n
}

func (d *limitedDevice) WriteAt(p []byte, off int64) (int, error) {
	d.write(int64(len(p)))
	return d.Forward.WriteAt(p, off)
}

func (d *limitedDevice) WriteDurableAt(p []byte, off int64) error {
	d.write(int64(len(p)))
	return d.Forward.WriteDurableAt(p, off)
}

func (d *limitedDevice) WriteLastAt(p []byte, off int64) error {
	d.write(int64(len(p)))
	return d.Forward.WriteLastAt(p, off)
}

func (d *limitedDevice) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	d.write(0) // zeros are holes
	return d.Forward.ZeroAt(off, n, flags)
}

func (d *limitedDevice) Discard(off, n int64) error {
	d.write(0)
	return d.Forward.Discard(off, n)
}

func delay(a, b time.Duration) {
	if wait := max(a, b); wait > 0 {
		time.Sleep(wait)
	}
}

// burst is how much of a rate may be used at once after a pause, as the time in which it comes in.
const burst = time.Second / 10

// A bucket is a rate: tokens a second, of which those of a burst are kept while nobody takes any. Requests pass it in the
// order in which they come: each waits until the tokens of those before it and its own have come in. A request may take more
// tokens than a burst. It is safe for concurrent use.
//
// No request waits longer than maxDelay: what is owed beyond that is forgiven, so that what was asked for long ago delays
// nothing. A client with requests of more than maxDelay in flight so gets more than the rate.
type bucket struct {
	rate atomic.Int64 // tokens a second; 0: no limit

	mu   sync.Mutex
	paid time.Time // when the tokens that were taken have come in
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
	if full := now.Add(-burst); b.paid.Before(full) {
		b.paid = full
	}
	// As a float64: the product of a large request and a second overflows.
	cost := min(float64(n)/float64(rate), (maxDelay + burst).Seconds())
	b.paid = b.paid.Add(time.Duration(cost * float64(time.Second)))
	if last := now.Add(maxDelay); b.paid.After(last) {
		b.paid = last
	}
	return max(b.paid.Sub(now), 0)
}

// set sets the rates of nodes, and forgets those of nodes that are gone.
func (l *Limits) set(rates map[string]Policy) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, n := range l.nodes {
		p, there := rates[name]
		if !there {
			// The race considered: a node that was made after the tree was looked at is not in it, and was not seen.
			if n.seen {
				delete(l.nodes, name)
			}
			continue
		}
		n.seen = true
		n.set(p)
	}
}
