package fleet

import (
	"io/fs"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
)

// A view is what a node shows at one time: its top, attached over the sealed layers below. It is replaced as a whole. What
// began to read or flush it goes on; its layers stay open until that ends.
type view struct {
	refs    atomic.Int64 // of the device, and of requests
	snap    *snapshot.Snapshot
	origin  *snapshot.Origin
	chain   *stack.Chain // below the top
	top     *layer
	below   []*layer // the sealed ones, bottom-up, without preserve layers
	fetched bool     // the base is one that is fetched from a server
	clean   atomic.Bool
	release func(*view) // called once, when nothing uses it any more
}

// pin keeps the view in use until unpin, false when it is not used any more.
func (v *view) pin() bool {
	for n := v.refs.Load(); n > 0; n = v.refs.Load() {
		if v.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false
}

func (v *view) unpin() {
	if v.refs.Add(-1) == 0 {
		v.release(v)
	}
}

// A nodeDevice is the device of a node's export. Its methods may be called concurrently.
type nodeDevice struct {
	block.Forward
	fleet *Fleet
	name  string
	size  int64

	gate changeGate
	view atomic.Pointer[view] // written with gate held for writing; nil: the node is dropped

	// changes counts those that are done; flushed is how many of them a flush covered.
	changes, flushed atomic.Uint64
	failed           atomic.Pointer[error] // of a flush: every later one fails
}

// gated is the block.Holder of a nodeDevice.
type gated struct{ d *nodeDevice }

func (g gated) Acquire() block.Device {
	g.d.gate.RLock()
	if v := g.d.view.Load(); v != nil {
		return v.snap
	}
	return gone{g.d.size}
}

func (g gated) Release() { g.d.gate.RUnlock() }

func newNodeDevice(f *Fleet, name string, size int64) *nodeDevice {
	d := &nodeDevice{fleet: f, name: name, size: size}
	d.Forward = block.NewHeldForward(gated{d})
	return d
}

// pin returns the view of now, kept in use until its unpin; nil when the node was dropped.
func (d *nodeDevice) pin() *view {
	for {
		v := d.view.Load()
		if v == nil || v.pin() {
			return v
		}
	}
}

// detach ends the use of the device: requests fail from now on.
func (d *nodeDevice) detach() {
	d.gate.Lock()
	v := d.view.Swap(nil)
	d.gate.Unlock()
	if v != nil {
		v.unpin()
	}
}

// Size is in bytes.
func (d *nodeDevice) Size() int64 { return d.size }

// ReadAt reads what the node shows. It waits for no operation.
func (d *nodeDevice) ReadAt(p []byte, off int64) (int, error) {
	v := d.pin()
	if v == nil {
		return 0, fs.ErrClosed
	}
	defer v.unpin()
	return v.snap.ReadAt(p, off)
}

// ReadCached reads what is in memory of what the node shows.
func (d *nodeDevice) ReadCached(reads []block.Read) int {
	v := d.pin()
	if v == nil {
		return 0
	}
	defer v.unpin()
	return v.snap.ReadCached(reads)
}

// Extents are those of the snapshot.
func (d *nodeDevice) Extents(off, n int64) ([]block.Extent, error) {
	v := d.pin()
	if v == nil {
		return nil, fs.ErrClosed
	}
	defer v.unpin()
	return v.snap.Extents(off, n)
}

// change does a change to the snapshot, which is durable when it returns if it was asked to be.
func (d *nodeDevice) change(durable bool, do func(*snapshot.Snapshot) error) error {
	err := d.changeNow(do)
	if err == nil && (durable || d.fleet.opts.Sync == snapshot.SyncAlways) {
		err = d.Flush()
	}
	return err
}

func (d *nodeDevice) changeNow(do func(*snapshot.Snapshot) error) error {
	d.gate.RLock()
	defer d.gate.RUnlock()
	v := d.view.Load()
	if v == nil {
		return fs.ErrClosed
	}
	err := do(v.snap)
	d.changes.Add(1)
	if d.fleet.idle.Load() {
		d.fleet.notice()
	}
	return err
}

// fetch is Snapshot.Fetch, before a change is in flight.
func (d *nodeDevice) fetch(off, n int64) error {
	v := d.pin()
	if v == nil {
		return fs.ErrClosed
	}
	defer v.unpin()
	if !v.fetched {
		return nil
	}
	return v.snap.Fetch(off, n)
}

// WriteAt writes to the node's top.
func (d *nodeDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.fetch(off, int64(len(p))); err != nil {
		return 0, err
	}
	if err := d.change(false, writeOf(p, off)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteDurableAt is WriteAt, durable when it returns.
func (d *nodeDevice) WriteDurableAt(p []byte, off int64) error {
	if err := d.fetch(off, int64(len(p))); err != nil {
		return err
	}
	return d.change(true, writeOf(p, off))
}

// WriteLastAt is ErrUnsupported: a flush of a node covers more than its top.
func (d *nodeDevice) WriteLastAt([]byte, int64) error { return block.ErrUnsupported }

func writeOf(p []byte, off int64) func(*snapshot.Snapshot) error {
	return func(s *snapshot.Snapshot) error {
		_, err := s.WriteAt(p, off)
		return err
	}
}

// ZeroAt makes a range read as zeros.
func (d *nodeDevice) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := d.fetch(off, n); err != nil {
		return err
	}
	return d.change(false, func(s *snapshot.Snapshot) error { return s.ZeroAt(off, n, flags) })
}

// Discard frees what the node's top holds of a range.
func (d *nodeDevice) Discard(off, n int64) error {
	return d.change(false, func(s *snapshot.Snapshot) error { return s.Discard(off, n) })
}

// Flush makes durable every change that was acknowledged before: first what the layers below hold, bottom-up, then the state
// that names them, and the top. A node that was not changed since its last flush does no I/O.
//
// The race considered: a checkpoint seals the top while it is flushed. What was acknowledged before the flush is in the view
// that was pinned, and the seal adds nothing to its layers.
func (d *nodeDevice) Flush() error {
	if failed := d.failed.Load(); failed != nil {
		return *failed
	}
	changes := d.changes.Load()
	v := d.pin()
	if v == nil {
		return fs.ErrClosed
	}
	defer v.unpin()
	if v.clean.Load() && d.flushed.Load() >= changes {
		return nil
	}
	var err error
	if v.clean.Load() {
		err = v.snap.Flush()
	} else {
		err = d.fleet.settle(v)
	}
	if err != nil {
		d.failed.CompareAndSwap(nil, &err)
		return err
	}
	for {
		n := d.flushed.Load()
		if n >= changes || d.flushed.CompareAndSwap(n, changes) {
			return nil
		}
	}
}

// dirty reports whether there are changes that no flush covered, or layers that are not durable.
func (d *nodeDevice) dirty() bool {
	v := d.view.Load()
	return v != nil && (!v.clean.Load() || d.flushed.Load() < d.changes.Load())
}

// Changed is the context dmsnap:changed: what is in the node's top.
func (d *nodeDevice) Changed(off, n int64) ([]block.Extent, error) {
	v := d.pin()
	if v == nil {
		return nil, fs.ErrClosed
	}
	defer v.unpin()
	return v.snap.Changed(off, n)
}

// gone is the device of a node that was dropped.
type gone struct{ size int64 }

func (gone) ReadAt([]byte, int64) (int, error)  { return 0, fs.ErrClosed }
func (gone) WriteAt([]byte, int64) (int, error) { return 0, fs.ErrClosed }
func (gone) Flush() error                       { return fs.ErrClosed }
func (g gone) Size() int64                      { return g.size }
