package fleet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
)

// A merge writes what a node shows into its disk, while both are used:
//
//  1. The disk is not exported any more, and made longer where the node is. It gets a preserve layer: everything over it keeps
//     showing what it does, the node included, and what the disk has now can be written back (takeBack). That the disk is
//     going to be a mixture is recorded, durably.
//  2. What the layers of the node hold, and what preserve layers below it do, is copied. The node's top is sealed first;
//     what is written meanwhile is in the next one, and is copied in the next pass.
//  3. When little is left, changes to the node wait: it is copied, and the disk is flushed. The node is put on the next
//     generation of the disk, which is what it shows, and its own layers go. The disk is exported again.
//
// After a crash the copying begins again: it is the same content.
type treeMerge struct {
	fleet  *Fleet
	node   *node
	disk   *disk
	merged *stack.Chain // what was copied by the passes so far

	copied, total atomic.Int64
	status        api.TreeMerge // but the counters; Fleet.mu is held
	paused        chan struct{} // closed when it goes on; nil: it is not paused; Fleet.mu is held
	finishing     bool          // changes to the node wait: there is no pause any more
}

// mergePasses bounds the passes, and mergeRest is how many exceptions may be left for the last one, during which changes to
// the node wait.
const (
	mergePasses = 8
	mergeRest   = 256
)

// Merge begins to write what a node shows into its disk, and returns at once. Disk has the progress. Everything else over
// the disk keeps its content. Afterwards the node lies directly on the disk. A merge that failed is begun again by another
// call, or taken back by TakeBackMerge; until one of them is complete the disk can't be forked, and the node not be dropped.
//
// A disk that is shorter than the node is made longer, if it is an image in a file of its own. The export of a writable disk
// ends while it is a mixture; a merge into one that has clients is refused, because its content would change beneath them.
func (f *Fleet) Merge(ctx context.Context, name string) (api.TreeMerge, error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return api.TreeMerge{}, err
	}
	defer release()
	m, err := f.beginMerge(ctx, name)
	if err != nil {
		return api.TreeMerge{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.publish(api.Event{Seq: f.state.Seq, Kind: api.EventMergeStarted, Name: name, Disk: m.disk.name})
	return m.state(), nil
}

// beginMerge prepares a merge and starts it in the background. ops is held.
func (f *Fleet) beginMerge(ctx context.Context, name string) (*treeMerge, error) {
	f.mu.Lock()
	n, r, err := f.findNode(name)
	if err == nil {
		err = f.canMerge(n, f.state.Layers[r.Top])
	}
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	d := n.disk
	m := &treeMerge{fleet: f, node: n, disk: d, status: api.TreeMerge{Node: name, Disk: d.name, State: api.MergeRunning}}
	if err := m.prepare(ctx); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, errClosed
	}
	n.busy = "merge"
	d.merge = m
	f.background.Go(func() { m.run(f.life) })
	return m, nil
}

// prepare makes the disk one that is merged into, and records that, durably. After an error the disk is what it was, but that
// it may be longer. ops is held.
func (m *treeMerge) prepare(ctx context.Context) (err error) {
	f, d := m.fleet, m.disk
	if exported := d.exported != nil; exported {
		f.endExport(ctx, d)
		defer func() {
			if err != nil {
				err = errors.Join(err, f.exportDisk(d))
			}
		}()
	}
	if err := f.allowWrites(d); err != nil {
		return err
	}
	f.mu.Lock()
	again := f.state.Disks[d.name].Merging != ""
	f.mu.Unlock()
	if again {
		return f.mark(d)
	}
	if size := m.node.dev.size; size > d.size {
		err = f.growDisk(d, size)
	} else {
		err = f.nextGeneration(d) // the newest preserve layer keeps what the disk has now
	}
	if err != nil {
		return err
	}
	if err := f.mark(d); err != nil {
		return err
	}
	if err := f.recordDisk(d, "merge", func(r *diskRecord) { r.Merging, r.MergeBase = m.node.name, d.preserve.id }); err != nil {
		f.unmarkDisk(d)
		return err
	}
	return nil
}

// mergeMark is the side file of a merge into a disk, by which other programs know that it is a mixture, also when no daemon runs.
func (f *Fleet) mergeMark(r *diskRecord) merge.DaemonMerge {
	sum := sha256.Sum256(fmt.Appendf(nil, "merge into disk %s of %d", r.Name, r.Created.UnixNano()))
	return merge.DaemonMerge{Dir: f.dir, ID: [16]byte(sum[:16])}
}

// hasSideFile reports whether a side file may be beside what is named: not for a part of a disk, or an export.
func hasSideFile(source string) bool {
	_, err := os.Stat(source)
	return err == nil
}

// mark marks a disk as a mixture before anything is copied into it. Where that is not possible, a block device for one, the journal alone
// shows it.
func (f *Fleet) mark(d *disk) error {
	f.mu.Lock()
	r := *f.state.Disks[d.name]
	f.mu.Unlock()
	if !hasSideFile(r.Source) {
		return nil
	}
	err := f.mergeMark(&r).Begin(r.Source)
	if errors.Is(err, merge.ErrNoSideFile) {
		const what = "if the daemon ends before this merge is complete, only its state shows that the disk is a mixture"
		f.log.Event(slog.LevelWarn, fmt.Sprintf("%s: %v: %s", r.Name, err, what), what, err, slog.String("disk", r.Name))
		return nil
	}
	return err
}

// unmarkDisk is unmark of an open disk.
func (f *Fleet) unmarkDisk(d *disk) {
	f.mu.Lock()
	r := *f.state.Disks[d.name]
	f.mu.Unlock()
	f.unmark(&r)
}

// unmark removes the mark of a disk that is no mixture.
func (f *Fleet) unmark(r *diskRecord) {
	if !hasSideFile(r.Source) {
		return
	}
	if err := f.mergeMark(r).End(r.Source); err != nil {
		f.logError("disk "+r.Name+" is no mixture, and its mark can't be removed", err)
	}
}

// canMerge refuses a merge that is not possible. mu is held.
func (f *Fleet) canMerge(n *node, top *layerRecord) error {
	d := f.state.Disks[n.disk.name]
	switch c, _ := f.nbd.Counters(d.Name); {
	case d.Merging != "" && d.Merging != n.name:
		return refuse(api.CodeAlreadyMerging, "node %q is being merged into disk %q", d.Merging, d.Name)
	case f.disks[d.Name].exported != nil && c.Connections > 0:
		return refuse(api.CodeInUse, "disk %q is used by %s, beneath which its content would change", d.Name, text.Count(uint64(c.Connections), "client"))
	case top.Size < d.Size:
		return refuse(api.CodeBadRequest, "node %q has %d bytes, and disk %q has %d, and is not made shorter", n.name, top.Size, d.Name, d.Size)
	}
	return nil
}

// state is the merge for the API. mu is held.
func (m *treeMerge) state() api.TreeMerge {
	s := m.status
	s.CopiedBytes, s.TotalBytes = m.copied.Load(), m.total.Load()
	return s
}

// run is the merge, from the first pass to the end.
func (m *treeMerge) run(ctx context.Context) {
	err := m.passes(ctx)
	if err == nil {
		err = m.finish(ctx)
	}
	f := m.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	m.node.busy, m.paused = "", nil
	switch {
	case err == nil:
		m.status.State = api.MergeDone
		f.publish(api.Event{Seq: f.state.Seq, Kind: api.EventMerged, Name: m.node.name, Disk: m.disk.name})
	case ctx.Err() != nil:
		m.status.State = api.MergeStopped // the next start continues
	default:
		m.status.State, m.status.Error = api.MergeFailed, describeError(err)
		f.publish(api.Event{Kind: api.EventMergeFailed, Name: m.node.name, Disk: m.disk.name, Error: m.status.Error})
	}
}

// passes copies until little is left.
func (m *treeMerge) passes(ctx context.Context) error {
	for range mergePasses {
		done, err := m.pass(ctx)
		if done || err != nil {
			return err
		}
	}
	return nil
}

// pass seals the node's top, and copies what was sealed since the last pass. done: little was left.
func (m *treeMerge) pass(ctx context.Context) (done bool, err error) {
	if err := m.proceed(ctx); err != nil {
		return false, err
	}
	before := m.merged
	chain, left, err := m.sealTop(ctx)
	if err != nil {
		return false, err
	}
	if before == nil {
		if err := m.copyPreserved(ctx, stack.New(chain, m.disk.size)); err != nil {
			return false, err
		}
	}
	var ranges []block.Range
	for r := range chain.StoredSince(before, 0, chain.Size()) {
		ranges = append(ranges, r)
	}
	if err := m.copyRanges(ctx, chain, ranges); err != nil {
		return false, err
	}
	m.merged = chain
	return left <= mergeRest, nil
}

// sealTop seals the top of the node, unless nothing was written to it, and returns the chain of all that is sealed.
func (m *treeMerge) sealTop(ctx context.Context) (chain *stack.Chain, left uint64, err error) {
	f := m.fleet
	release, err := f.acquire(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer release()
	if left = m.node.dev.view.Load().top.store.Len(); left > 0 {
		pause, err := f.sealUnnamed(m.node, "merge pass")
		if err != nil {
			return nil, 0, err
		}
		m.node.mergeWaits.Add(pause)
	}
	return m.node.dev.view.Load().chain, left, nil
}

// copyPreserved copies the ranges that preserve layers below the node hold: there the disk differs from what the node shows.
func (m *treeMerge) copyPreserved(ctx context.Context, dev block.Device) error {
	f := m.fleet
	f.mu.Lock()
	top := f.state.Layers[f.state.Nodes[m.node.name].Top]
	generations := f.layersOf(slices.DeleteFunc(f.state.ancestors(top), func(r *layerRecord) bool { return !r.Preserve }))
	f.mu.Unlock()
	for _, l := range generations {
		if err := m.copyRanges(ctx, dev, l.preserved()); err != nil {
			return err
		}
	}
	return nil
}

// layersOf returns the layers of records. mu is held.
func (f *Fleet) layersOf(records []*layerRecord) (list []*layer) {
	for _, r := range records {
		list = append(list, f.layers[r.ID])
	}
	return list
}

// preserved returns the ranges that a preserve layer holds, or it and later ones.
func (l *layer) preserved() (ranges []block.Range) {
	if g := l.generation; g.sealed != nil {
		for r := range g.sealed.StoredSince(nil, 0, g.sealed.Size()) {
			ranges = append(ranges, r)
		}
		return ranges
	}
	return storedRanges(l.store, l.chain.Size())
}

// storedRanges returns the ranges of a disk of size bytes that a store holds.
func storedRanges(st *store.Store, size int64) (ranges []block.Range) {
	layout := st.Layout()
	for r := range st.Exceptions() {
		from, to := layout.OriginRange(r.Old, r.Count, size)
		ranges = append(ranges, block.Range{Off: from, Length: to - from})
	}
	return ranges
}

// mergeAtOnce is how much is written to the disk at once, in bytes.
const mergeAtOnce = 4 << 20

// copyRanges copies what dev shows of ranges into the disk.
func (m *treeMerge) copyRanges(ctx context.Context, dev block.Device, ranges []block.Range) error {
	for _, r := range ranges {
		m.total.Add(r.Length)
	}
	for _, r := range ranges {
		for off, end := r.Off, r.Off+r.Length; off < end; {
			if err := m.mayCopy(ctx); err != nil {
				return err
			}
			n := min(end-off, mergeAtOnce)
			if err := block.Copy(m.disk.origin, off, dev, off, n, block.LongHoles, nil); err != nil {
				return fmt.Errorf("merge %d bytes at byte %d: %w", n, off, err)
			}
			m.copied.Add(n)
			off += n
		}
	}
	return nil
}

// mayCopy waits while the merge is paused, unless changes to the node wait for it. It returns the cause of ctx when that has ended.
func (m *treeMerge) mayCopy(ctx context.Context) error {
	if m.finishing {
		return context.Cause(ctx)
	}
	return m.proceed(ctx)
}

// finish copies the rest while changes to the node wait, and puts the node on the next generation of the disk.
func (m *treeMerge) finish(ctx context.Context) error {
	f := m.fleet
	if err := m.proceed(ctx); err != nil {
		return err
	}
	m.finishing = true
	release, err := f.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	dev := m.node.dev
	closed, waited := lockGates([]*changeGate{&dev.gate})
	old, err := m.finishLocked(ctx)
	dev.gate.Unlock()
	m.node.mergeWaits.Add(max(waited, time.Since(closed)))
	if old != nil {
		old.origin.RetryPaused()
		old.unpin()
		f.unmarkDisk(m.disk)
		f.notice()
		f.exportAgain(m.disk)
	}
	return err
}

// exportAgain exports a writable disk that is not a mixture any more. ops is held.
func (f *Fleet) exportAgain(d *disk) {
	f.mu.Lock()
	writable := f.state.Disks[d.name].Writable
	f.mu.Unlock()
	if !writable || d.exported != nil {
		return
	}
	if err := f.exportDisk(d); err != nil {
		f.logError("disk "+d.name+" is not exported", err)
	}
}

func (m *treeMerge) finishLocked(ctx context.Context) (old *view, err error) {
	f, d := m.fleet, m.disk
	v := m.node.dev.view.Load()
	if err := m.copyRanges(ctx, v.snap, storedRanges(v.top.store, d.size)); err != nil {
		return nil, err
	}
	if err := d.origin.Flush(); err != nil {
		return nil, err
	}
	if err := f.nextGeneration(d); err != nil {
		return nil, err
	}
	f.mu.Lock()
	b, err := f.baseAt(d, d.preserve.id)
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	t, err := f.makeTop(m.node, b, d.size)
	if err != nil {
		return nil, err
	}
	if err := m.record(t); err != nil {
		return nil, errors.Join(err, t.discard(f))
	}
	return m.node.dev.view.Swap(t.view), nil
}

// record records that the merge is complete.
func (m *treeMerge) record(t newTop) error {
	f := m.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	r := *f.state.Nodes[m.node.name]
	dropped := f.state.Layers[r.Top]
	r.Top = t.layer.id
	rec := *f.state.Disks[m.disk.name]
	rec.Merging, rec.MergeBase = "", 0
	c := f.newChange("merged")
	c.Disks, c.Layers, c.Nodes = []diskRecord{rec}, []layerRecord{t.record}, []nodeRecord{r}
	c.DropLayers = append([]uint64{dropped.ID}, f.state.orphansBut(dropped.Parent, t.record.Parent)...)
	if err := f.dropLayers(c); err != nil {
		return err
	}
	f.layers[t.layer.id] = t.layer
	return nil
}

// resumeMerges continues the merges that the last process did not complete.
func (f *Fleet) resumeMerges() {
	for _, r := range sorted(f.state.Disks) {
		if r.Merging == "" {
			continue
		}
		if _, err := f.beginMerge(f.life, r.Merging); err != nil {
			f.logError("merge of "+r.Merging, err)
			d := f.disks[r.Name]
			d.merge = &treeMerge{status: api.TreeMerge{Node: r.Merging, Disk: r.Name, State: api.MergeFailed, Error: describeError(err)}}
		}
	}
}
