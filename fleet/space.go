package fleet

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// Space is how much of a file system the layers of a disk may use, and what a write does that needs more. The zero value
// limits nothing.
type Space struct {
	Disk int64 // bytes that all layers of the disk may use; 0: no limit
	Node int64 // bytes that the layers may use that are a node's own; 0: no limit
	Grow int64 // bytes by which the limit of a node grows when it is reached, while Disk allows it

	// Pause: writes that need more wait, also when the file system itself has no space; else they fail.
	Pause bool
}

// Limits of space bind where a store reserves space for new chunks (store.Reserve), which it does in steps of at least 64 KiB
// unless a limit is near: a step is added to what its layer uses before it is allocated, and what the layer uses is looked up
// afterwards. Writes to chunks that a layer has stored need no space and are not refused, but to chunks that were trimmed.
//
// Counted is what files use on the file system, from their creation until their record is dropped. What operations need
// themselves is counted and not refused: the first block of a layer, and the copy that a squash makes.

// accounts count what layers use. Fleet.state is changed with both Fleet.mu and mu held, so that either may be held to read
// it: mu is locked inside writes, below the locks of stores.
type accounts struct {
	mu     sync.Mutex
	layers map[uint64]*layer // open ones, recorded or not
}

// account is that of a disk. accounts.mu guards it.
type account struct {
	limited atomic.Bool // a limit is in force: layers are counted
	pause   atomic.Bool // Space.Pause

	space   Space
	used    int64            // by all layers
	grown   map[string]int64 // by which the limit of a node has grown
	refused bool             // a write, since writes that wait were last notified to try again
}

// usage is what a layer uses. accounts.mu guards it.
type usage struct {
	bytes   int64 // on the file system, as it was looked up last
	pending int64 // that are being allocated
}

// SetSpace sets the limits of a disk. They bind from now on: what is in use beyond them stays.
func (f *Fleet) SetSpace(disk string, s Space) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.disks[disk]
	if d == nil {
		return
	}
	if f.accounts.set(d, s) {
		f.retryPaused(d)
	}
}

// set is SetSpace; changed: the limits were others.
func (a *accounts) set(d *disk, s Space) (changed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if d.account.space == s {
		return false
	}
	was := d.account.limited.Load()
	d.account.space = s
	d.account.pause.Store(s.Pause)
	d.account.limited.Store(s.Disk > 0 || s.Node > 0)
	if !d.account.limited.Load() || was {
		return true
	}
	d.account.used = 0
	for _, l := range a.layers {
		if l.disk == d {
			l.usage.bytes = allocatedBytes(l.path)
			d.account.used += l.usage.bytes + l.usage.pending
		}
	}
	return true
}

// retryPaused has the writes to nodes of a disk that wait for space try again. mu of the fleet is held.
func (f *Fleet) retryPaused(d *disk) {
	for _, n := range f.nodes {
		if n.disk != d || n.dev == nil {
			continue
		}
		if v := n.dev.view.Load(); v != nil {
			v.origin.RetryPaused()
		}
	}
}

// fullPolicy is what writes to nodes of a disk do when there is no space.
func (d *disk) fullPolicy() snapshot.FullPolicy {
	if d.account.pause.Load() {
		return snapshot.FullPause
	}
	return snapshot.FullFail
}

// add counts the file of a layer that was made or opened.
func (a *accounts) add(l *layer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.layers == nil {
		a.layers = map[uint64]*layer{}
	}
	a.layers[l.id] = l
	if l.disk.account.limited.Load() {
		l.usage.bytes = allocatedBytes(l.path)
		l.disk.account.used += l.usage.bytes
	}
}

// remove ends the counting of a layer. waiting: writes wait, or were refused, for lack of space.
func (a *accounts) remove(l *layer) (waiting bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.layers[l.id] != l {
		return false
	}
	delete(a.layers, l.id)
	of := &l.disk.account
	if !of.limited.Load() {
		return false
	}
	of.used -= l.usage.bytes + l.usage.pending
	waiting, of.refused = of.refused, false
	return waiting
}

// forgetNode forgets how far the limit of a node has grown.
func (a *accounts) forgetNode(d *disk, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(d.account.grown, name)
}

// quotaError refuses space. It is syscall.ENOSPC.
type quotaError struct {
	what        string
	used, quota int64
}

func (e *quotaError) Error() string {
	return fmt.Sprintf("the layers of %s use %s, and their quota is %s", e.what, bytesize.Text(e.used), bytesize.Text(e.quota))
}

func (e *quotaError) Unwrap() error { return syscall.ENOSPC }

// charge adds n bytes to what a layer uses, which settle must follow, or returns a quotaError.
func (f *Fleet) charge(l *layer, n int64) error {
	a := &f.accounts
	a.mu.Lock()
	defer a.mu.Unlock()
	of := &l.disk.account
	if r := f.state.Layers[l.id]; r != nil {
		if err := f.withinLimits(of, r, n); err != nil {
			of.refused = true
			return err
		}
	}
	l.usage.pending += n
	of.used += n
	return nil
}

// withinLimits returns an error when a layer can't have n bytes more. accounts.mu is held.
func (f *Fleet) withinLimits(of *account, r *layerRecord, n int64) error {
	s := of.space
	if s.Disk > 0 && of.used+n > s.Disk {
		return &quotaError{"disk " + r.Disk, of.used, s.Disk}
	}
	if s.Node == 0 || r.Sealed || r.Preserve {
		return nil
	}
	used, quota := f.ownBytes(r), s.Node+of.grown[r.Node]
	more := used + n - quota
	if more > 0 && s.Grow > 0 && (s.Disk == 0 || of.used+s.Grow <= s.Disk) {
		if of.grown == nil {
			of.grown = map[string]int64{}
		}
		of.grown[r.Node] += (more + s.Grow - 1) / s.Grow * s.Grow
		return nil
	}
	if more > 0 {
		return &quotaError{"node " + r.Node, used, quota}
	}
	return nil
}

// ownBytes is what a node's top and the layers below use that no other node needs. accounts.mu is held.
func (f *Fleet) ownBytes(top *layerRecord) (n int64) {
	for r := top; r != nil && (r == top || r.isCheckpoint() && f.state.kids[r.ID] <= 1); r = f.state.Layers[r.Parent] {
		if l := f.accounts.layers[r.ID]; l != nil {
			n += l.usage.bytes + l.usage.pending
		}
	}
	return n
}

// settle replaces n bytes that were charged by what the layer uses.
func (a *accounts) settle(l *layer, n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := l.usage.bytes + l.usage.pending
	l.usage.pending -= n
	l.usage.bytes = allocatedBytes(l.path)
	if a.layers[l.id] == l {
		l.disk.account.used += l.usage.bytes + l.usage.pending - before
	}
}

// keep is settle where space was not allocated but will be used: n bytes count from now on.
func (a *accounts) keep(l *layer, n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l.usage.pending -= n
	l.usage.bytes += n
}

// A layerDevice is the file of a layer within the limits of its disk. Its methods may be called concurrently.
type layerDevice struct {
	block.Forward // a last write is the mark of the store, which limits never refuse
	fleet         *Fleet
	layer         *layer
	layout        ondisk.Layout

	// holes: chunks that are in the store may have no space, since they were trimmed.
	holes atomic.Bool
}

// newDevice returns the device of a layer's file. trimmed: the file was there before, and may have holes.
func (f *Fleet) newDevice(l *layer, file *block.File, layout ondisk.Layout, trimmed bool) *layerDevice {
	d := &layerDevice{Forward: block.NewForward(file), fleet: f, layer: l, layout: layout}
	d.holes.Store(trimmed)
	return d
}

func (d *layerDevice) limited() bool { return d.layer.disk.account.limited.Load() }

// Allocate reserves space, on a file system without that as far as limits are concerned.
func (d *layerDevice) Allocate(off, n int64) error {
	if !d.limited() {
		return ignoreNotFast(d.Forward.Allocate(off, n))
	}
	if err := d.fleet.charge(d.layer, n); err != nil {
		return err
	}
	err := d.Forward.Allocate(off, n)
	if errors.Is(err, block.ErrNotFast) {
		d.fleet.accounts.keep(d.layer, n)
		return nil
	}
	d.fleet.accounts.settle(d.layer, n)
	return err
}

// ignoreNotFast has a store go on asking for space where it can't be reserved: a limit may be set later.
func ignoreNotFast(err error) error {
	if errors.Is(err, block.ErrNotFast) {
		return nil
	}
	return err
}

// WriteAt writes; to a hole within the limits.
func (d *layerDevice) WriteAt(p []byte, off int64) (n int, err error) {
	if !d.holes.Load() || !d.limited() {
		return d.Forward.WriteAt(p, off)
	}
	err = d.fill(off, int64(len(p)), func() error {
		n, err = d.Forward.WriteAt(p, off)
		return err
	})
	return n, err
}

// WriteDurableAt is WriteAt, durable when it returns.
func (d *layerDevice) WriteDurableAt(p []byte, off int64) error {
	if !d.holes.Load() || !d.limited() {
		return d.Forward.WriteDurableAt(p, off)
	}
	return d.fill(off, int64(len(p)), func() error { return d.Forward.WriteDurableAt(p, off) })
}

// fill does a write that may need space for chunks that were trimmed. Writes of the store's own are never refused.
func (d *layerDevice) fill(off, n int64, write func() error) error {
	if !d.layout.IsData(ondisk.COWChunk(off / d.layout.ChunkBytes())) {
		return write()
	}
	if err := d.fleet.charge(d.layer, n); err != nil {
		if d.layer.file.HasSpace(off, n) {
			return write()
		}
		return err
	}
	defer d.fleet.accounts.settle(d.layer, n)
	return write()
}

// ZeroAt zeros; see [block.Zeroer].
func (d *layerDevice) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if flags&block.KeepAllocated != 0 {
		if !d.holes.Load() || !d.limited() {
			return d.Forward.ZeroAt(off, n, flags)
		}
		return d.fill(off, n, func() error { return d.Forward.ZeroAt(off, n, flags) })
	}
	return d.free(d.Forward.ZeroAt(off, n, flags))
}

// Discard gives back the space of a range.
func (d *layerDevice) Discard(off, n int64) error { return d.free(d.Forward.Discard(off, n)) }

// free counts what a layer uses after space was given back.
func (d *layerDevice) free(err error) error {
	if err != nil {
		return err
	}
	d.holes.Store(true)
	if d.limited() {
		d.fleet.accounts.settle(d.layer, 0)
	}
	return nil
}
