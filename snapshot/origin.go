// Package snapshot is the engine: device-mapper's targets snapshot, snapshot-origin and snapshot-merge as three devices
// (docs/spec/dm-snapshot.md §5, §6, §7).
//
//	origin := snapshot.NewOrigin(disk)
//	vm1, err := origin.Attach(cow, snapshot.Options{}) // loads the store, or creates one in an empty COW device
//	_, err = origin.WriteAt(p, off)                    // vm1 keeps showing the old data
//	merging, err := vm1.BeginMerge()                   // package merge drives it
//
// The three types:
//
//   - [Origin] is a disk with snapshots. Before a write changes it, the old data is copied to the COW device of each
//     snapshot.
//   - [Snapshot] shows the origin as it was when the snapshot was activated, plus the writes to the snapshot.
//   - [Merging] is an origin into which a snapshot is being merged, while both are in use.
//
// Origin and Snapshot are a [block.Device] with its optional abilities; requests to a Merging go to its Origin. All writes
// to the disk must go through the Origin: others are not noticed.
//
// # Guarantees
//
//   - An acknowledged origin write never changes what a valid persistent snapshot shows, also after a crash at any point:
//     the exception is durable before the write reaches the origin.
//   - A write to the origin is durable once a Flush that began after it returned. See [WriteBack].
//   - A write to a snapshot is durable once a Flush that began after it returned; with [SyncAlways] when it returns, as
//     in the kernel.
//   - An origin write does not fail because a snapshot failed: that snapshot becomes invalid, durably, before the write
//     continues (docs/spec/dm-snapshot.md §8.2, H5). See [ErrNoRoom] and [ErrUnmarked] for the exceptions.
//   - No request waits for space ([FullPause]): it fails with a block.RetryLater, and the caller waits.
package snapshot

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/writeback"
)

// Locks, in this order, each optional:
//
//  1. Snapshot.suspending, held by Suspend and Close; then Snapshot.life, held for reading by every request to the
//     snapshot, for writing while it is suspended, handed over or closed.
//  2. Origin.mu: held for reading by every write to the origin, by every request to it while a merge is active, and by
//     every merge step, once, at their beginning; for writing while the list of snapshots changes. So a snapshot that is
//     attached sees all later writes, of any size (docs/spec/dm-snapshot.md §8.2, H7). Requests to a snapshot never take
//     it, except discards that are passed down.
//  3. Those of the write-back device (package writeback); while it writes out, the stores' and the devices' locks below.
//  4. The gate of the merge, then that of one snapshot: owners exclude each other chunk by chunk. An origin write passes
//     the snapshots' gates one after the other and holds one at a time.
//  5. Snapshot.growing, then Snapshot.invalidating.
//  6. The store's locks, then the device's.
//
// TestLocksNeverMeet runs everything concurrently with everything.

// An Origin is a disk with snapshots. It is a block.Device; every method may be called concurrently. Everything else is
// passed on from the disk, for example its logical block size and identity. Its size is fixed while it is open:
// snapshots and a merge end where the origin ends.
type Origin struct {
	forward
	disk block.Device
	dev  *writeback.Device // over disk: what every other file of this package uses

	mu        sync.RWMutex
	snapshots []*Snapshot // largest chunk first (docs/spec/dm-snapshot.md §5.2), then in order of their loading

	// merging is set while a merge is active. Written with mu held for writing.
	merging atomic.Pointer[Merging]
	waiting *Merging // loaded, not yet resumed

	room room

	syncWaits  latency.Recorder
	writeBacks atomic.Uint64
}

// forward is block.Forward under an unexported name, so that users of the package can't reach the underlying device.
type forward = block.Forward

// An OriginOption changes how an origin is used.
type OriginOption func(*writeback.Options)

// WriteBack lets writes to the origin that are not FUA, and for which snapshots have to keep something, be acknowledged
// while their bytes are in memory: about limit bytes at most, and not much longer than delay. Many of them then share
// the flushes of the COW devices. Reads see them; Flush makes them durable, like all others. A process that is killed
// loses them, as a disk with a volatile cache does when its power fails. Without this option every write has been
// passed to the disk when it is acknowledged.
//
// After Origin.Flush, and after the last snapshot is closed without an error, no dirty bytes are left. See
// Origin.Finish.
func WriteBack(limit int64, delay time.Duration) OriginOption {
	return func(o *writeback.Options) { o.Limit, o.Delay = limit, delay }
}

// WriteBackNotify has notify called when writes to the origin that are in memory can't be written, with the reason, and
// with nil when they are written after that. notify must neither block nor call back.
func WriteBackNotify(notify func(err error)) OriginOption {
	return func(o *writeback.Options) { o.Notify = notify }
}

// NewOrigin returns dev as an origin without snapshots, which is dev itself (docs/spec/dm-snapshot.md §5.15). The
// caller keeps dev open as long as the origin is used.
func NewOrigin(dev block.Device, opts ...OriginOption) *Origin {
	o := &Origin{disk: dev}
	wb := writeback.Options{Barrier: o.barrier, Lock: o.mu.RLocker()}
	for _, opt := range opts {
		opt(&wb)
	}
	o.dev = writeback.New(dev, wb)
	o.forward = block.NewForward(o.dev)
	o.room.made()
	return o
}

// Device returns the underlying disk.
func (o *Origin) Device() block.Device { return o.disk }

// WriteBackStatus returns how many bytes of the origin are dirty, and whether the disk accepts writes.
func (o *Origin) WriteBackStatus() writeback.Status { return o.dev.Status() }

// ReadAt reads the origin, or while a merge is active the merged content. It waits for nothing but the devices
// (checklist 66).
func (o *Origin) ReadAt(p []byte, off int64) (int, error) {
	if m := o.enterMerging(); m != nil {
		defer o.mu.RUnlock()
		return m.readAt(p, off)
	}
	return o.dev.ReadAt(p, off)
}

// ReadCached reads what is in memory of the origin while no merge is active.
func (o *Origin) ReadCached(reads []block.Read) int {
	if o.merging.Load() != nil {
		return 0
	}
	return o.dev.ReadCached(reads)
}

// enterMerging returns the active merge, with mu held for reading so that neither it nor its COW device is closed
// meanwhile; or nil, with nothing held. Without a merge reads take no lock.
func (o *Origin) enterMerging() *Merging {
	if o.merging.Load() == nil {
		return nil
	}
	o.mu.RLock()
	m := o.merging.Load()
	if m == nil {
		o.mu.RUnlock()
	}
	return m
}

// WriteAt writes p after every snapshot has durably kept what it shows there. See WriteBack. When a long write fails,
// earlier parts of it may have been written.
func (o *Origin) WriteAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("write", off, int64(len(p)), o.Size()); err != nil {
		return 0, err
	}
	if err := o.change(payload{data: p}, off, int64(len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteDurableAt is WriteAt, durable when it returns.
func (o *Origin) WriteDurableAt(p []byte, off int64) error {
	if err := block.CheckRange("write", off, int64(len(p)), o.Size()); err != nil {
		return err
	}
	return o.change(payload{data: p, durable: true}, off, int64(len(p)))
}

// WriteLastAt is ErrUnsupported: no write may bypass the snapshots.
func (o *Origin) WriteLastAt(p []byte, off int64) error { return block.ErrUnsupported }

// ZeroAt makes a range read as zeros, after it was preserved like before a write.
func (o *Origin) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := block.CheckRange("zero", off, n, o.Size()); err != nil {
		return err
	}
	return o.change(payload{zero: flags}, off, n)
}

// Discard does nothing: the content would become undefined, snapshots would have to keep it first, and the target
// snapshot-origin takes no discards either (docs/spec/dm-snapshot.md §5.7).
func (o *Origin) Discard(off, n int64) error { return block.CheckRange("discard", off, n, o.Size()) }

// Refresh returns the size, which is fixed.
func (o *Origin) Refresh() (int64, error) { return o.Size(), nil }

// Grow refuses to make the origin longer: its size is fixed.
func (o *Origin) Grow(size int64) error {
	if now := o.Size(); size > now {
		return fmt.Errorf("grow an origin from %d to %d bytes: %w", now, size, block.ErrFixedSize)
	}
	return nil
}

// CanGrow is false.
func (o *Origin) CanGrow() bool { return false }

// change applies pl to n bytes at off.
func (o *Origin) change(pl payload, off, n int64) error {
	if n == 0 {
		return nil
	}
	return o.changing(func() error {
		if n <= lockedBytes {
			return o.changeNow(pl, off, n)
		}
		return o.changeLong(pl, off, n)
	})
}

// A request of more than lockedBytes is split, and Origin.mu is released between the parts, so that attaching a
// snapshot, which locks it for writing, waits for at most one part, and so do the requests behind it.
const (
	lockedBytes = 2 << 20
	// windowBytes is how much of a long request the snapshots preserve before one flush makes the exceptions durable
	// and the origin is changed.
	windowBytes = 8 << 20
)

// pieces calls do for the pieces of n bytes at off that are changed under one lock: at most lockedBytes, and cut
// at multiples of it.
func pieces(off, n int64, do func(off, n int64) error) error {
	for end := off + n; off < end; {
		k := min(end-off, lockedBytes-off%lockedBytes)
		if err := do(off, k); err != nil {
			return err
		}
		off += k
	}
	return nil
}

// changeLong is changeNow piece by piece. No lock is held between two pieces: a snapshot that is attached in the middle
// shows the change where it was made already, as after a write that completed before.
func (o *Origin) changeLong(pl payload, off, n int64) error {
	if pl.data == nil && pl.zero&block.OnlyFast != 0 { // all or nothing, and fast once everything is preserved
		if err := o.keepAhead(off, n); err != nil {
			return err
		}
		return o.changeNow(pl, off, n)
	}
	durable := pl.durable
	pl.durable = false
	for done := int64(0); done < n; {
		k := min(n-done, windowBytes)
		if err := o.keepAhead(off+done, k); err != nil {
			return err
		}
		if err := pieces(off+done, k, func(at, k int64) error {
			return o.changeNow(pl.part(at-off, k), at, k)
		}); err != nil {
			return err
		}
		done += k
	}
	if durable {
		return o.Flush()
	}
	return nil
}

// keepAhead makes the snapshots keep what they show of n bytes at off, with one flush at the end that no lock is held
// for but those of the snapshots. It is an optimisation: changeNow preserves what changed in between, and handles what
// failed here.
func (o *Origin) keepAhead(off, n int64) error {
	var dirty []*Snapshot
	if err := pieces(off, n, func(at, k int64) error {
		o.mu.RLock()
		defer o.mu.RUnlock()
		if o.merging.Load() != nil {
			return nil
		}
		more, err := o.keep(nil, at, k)
		for _, s := range more {
			if !slices.Contains(dirty, s) {
				dirty = append(dirty, s)
			}
		}
		return err
	}); err != nil {
		return err
	}
	var all sync.WaitGroup
	for _, s := range dirty {
		all.Go(func() {
			// changeNow makes the exceptions of a snapshot durable that is being closed or suspended.
			if !s.life.TryRLock() {
				return
			}
			defer s.life.RUnlock()
			if s.usable() == nil {
				s.store.Sync()
			}
		})
	}
	all.Wait()
	return nil
}

// changeNow applies pl unless a snapshot that is to be protected has no space. Doing it again does no harm.
func (o *Origin) changeNow(pl payload, off, n int64) error {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if m := o.merging.Load(); m != nil {
		return m.change(pl, off, n)
	}
	var few [4]*Snapshot
	dirty, err := o.keep(few[:0], off, n)
	if err != nil {
		return err
	}
	if o.writesBack(pl, off, n, len(dirty) > 0) {
		for _, s := range dirty {
			s.needed.Store(true)
		}
		o.writeBacks.Add(1)
		return o.dev.WriteBack(pl.data, off)
	}
	if err := o.syncForOrigin(dirty); err != nil {
		return err
	}
	return pl.put(o.dev, off, n)
}

// writesBack reports whether a write is to stay in memory: one that would have to wait for stores, or that overlaps
// what is there.
func (o *Origin) writesBack(pl payload, off, n int64, waits bool) bool {
	return pl.data != nil && !pl.durable && o.dev.CanWriteBack(off, n) && (waits || o.dev.Overlaps(off, n))
}

// barrier makes the exceptions durable that dirty bytes wait for, before they are written to the disk. A write that
// left dirty bytes had committed its exceptions before, and had set needed. o.mu is held.
func (o *Origin) barrier() error {
	var few [4]*Snapshot
	dirty := few[:0]
	for _, s := range o.snapshots {
		if s.active && s.store != nil && !s.invalid.Load() && s.needed.Swap(false) {
			dirty = append(dirty, s)
		}
	}
	err := o.syncForOrigin(dirty)
	if err != nil {
		for _, s := range dirty {
			s.needed.Store(true)
		}
	}
	return err
}

// Finish ends the use of the origin: it makes completed writes durable, like Flush, and discards dirty bytes of
// acknowledged writes that can't be written: then it fails with a *writeback.LostError that names them. Call it before
// the snapshots are closed: a snapshot whose store can't make the exceptions durable that the dirty bytes wait for
// becomes invalid, if it can be marked so and the disk accepts the bytes. Close a merge first, by Merging.Close. Only
// Flush may follow, which fails when bytes were discarded.
func (o *Origin) Finish() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.dev.WriteOut(); err != nil && !errors.As(err, new(*writeback.WriteError)) && o.dev.Reserve() == nil {
		for _, s := range o.snapshots {
			if s.active && s.needed.Load() && s.store != nil {
				s.settle()
			}
		}
	}
	lost := o.dev.Finish()
	for _, s := range o.snapshots {
		s.needed.Store(false)
	}
	if lost != nil {
		return errors.Join(lost, o.disk.Flush())
	}
	return o.dev.Flush()
}

// Flush makes completed writes durable. It goes to the origin device alone, while merging also to the COW device
// (docs/spec/dm-snapshot.md §5.7, §7.5). It fails while acknowledged writes can't be written, and permanently after a
// flush of the disk failed.
func (o *Origin) Flush() error {
	if m := o.enterMerging(); m != nil {
		defer o.mu.RUnlock()
		return m.flush()
	}
	return o.dev.Flush()
}

// Extents returns the holes of the origin.
func (o *Origin) Extents(off, n int64) ([]block.Extent, error) {
	if m := o.enterMerging(); m != nil {
		defer o.mu.RUnlock()
		return m.extents(off, n)
	}
	return o.dev.Extents(off, n)
}

// preserve makes every snapshot keep what it shows of n > 0 bytes at off, durably. o.mu is held for reading. Snapshots
// that can't are invalid when it returns. Where the policy is that the write fails or waits, it returns ErrNoRoom, or
// ErrUnmarked.
func (o *Origin) preserve(off, n int64) error {
	var few [4]*Snapshot
	dirty, err := o.keep(few[:0], off, n)
	if err != nil {
		return err
	}
	return o.syncForOrigin(dirty)
}

// keep is preserve without the durability: it appends to dirty the snapshots whose stores need a Sync before
// the origin may change. The copies are made for each snapshot in the order of the list.
func (o *Origin) keep(dirty []*Snapshot, off, n int64) ([]*Snapshot, error) {
	for _, s := range o.snapshots {
		if !s.active {
			continue
		}
		needsSync, err := s.preserve(off, n)
		if err != nil {
			return nil, err
		}
		if needsSync {
			dirty = append(dirty, s)
		}
	}
	return dirty, nil
}

// syncForOrigin makes the exceptions of snapshots durable, with one Sync for each store, concurrently; concurrent
// writes share them. It fails like preserve.
func (o *Origin) syncForOrigin(dirty []*Snapshot) error {
	if len(dirty) == 0 {
		return nil
	}
	begin := latency.Now()
	defer func() { o.syncWaits.Add(begin.Since()) }()
	if len(dirty) == 1 {
		return dirty[0].syncForOrigin()
	}
	errs := make([]error, len(dirty))
	var all sync.WaitGroup
	for i, s := range dirty {
		all.Go(func() { errs[i] = s.syncForOrigin() })
	}
	all.Wait()
	return errors.Join(errs...)
}

// insert puts s in the list: before the first one with a smaller chunk, after those of equal size
// (docs/spec/dm-snapshot.md §5.2). o.mu is held for writing.
func (o *Origin) insert(s *Snapshot) {
	i := slices.IndexFunc(o.snapshots, func(t *Snapshot) bool { return t.chunkSectors() < s.chunkSectors() })
	if i < 0 {
		i = len(o.snapshots)
	}
	o.snapshots = slices.Insert(o.snapshots, i, s)
}

// remove removes s from the list. o.mu is held for writing.
func (o *Origin) remove(s *Snapshot) {
	defer o.room.made() // nothing waits for s any more
	o.snapshots = slices.DeleteFunc(o.snapshots, func(t *Snapshot) bool { return t == s })
}

// Snapshots returns the snapshots in the order in which a write visits them.
func (o *Origin) Snapshots() []*Snapshot {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return slices.Clone(o.snapshots)
}

// Merging returns the active merge, or nil.
func (o *Origin) Merging() *Merging { return o.merging.Load() }

// checkCOW refuses a device that can't be the COW device of o.
func (o *Origin) checkCOW(cow block.Device) error {
	if block.Same(o.dev, cow) {
		return ErrSameDevice
	}
	if o.dev.Size()%block.SectorSize != 0 {
		return fmt.Errorf("origin of %d bytes is not a whole number of %d-byte sectors", o.dev.Size(), block.SectorSize)
	}
	return nil
}

// writeOut writes dirty bytes to the disk; origin writes continue meanwhile.
func (o *Origin) writeOut() error {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.dev.WriteOut()
}
