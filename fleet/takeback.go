package fleet

import (
	"context"
	"log/slog"

	"github.com/dmsnap/dmsnap/server/api"
)

// TakeBackMerge takes back a merge that failed: what the disk had when the merge began is written to it again. Then it can be
// forked and, if it is writable, is exported, and the node can be dropped. The node, and all else over the disk, keeps its
// content. A disk that was made longer stays so, with zeros at its end. After an error nothing but that is different: the call
// can be repeated, and so can the merge.
//
// A preserve layer was made when the merge began: it, and those after it, have all that the merge overwrote. After a crash the
// merge goes on, from what the disk has then: it writes wherever those layers have something.
func (f *Fleet) TakeBackMerge(ctx context.Context, name string) (api.Disk, error) {
	ctx, end, err := f.begin(ctx)
	if err != nil {
		return api.Disk{}, err
	}
	defer end()
	m, err := f.beginTakeBack(ctx, name)
	if err != nil {
		return api.Disk{}, err
	}
	if err := m.endTakeBack(ctx, m.restore(ctx)); err != nil {
		return api.Disk{}, err
	}
	return f.Disk(m.disk.name)
}

// beginTakeBack marks the node as busy. It need not be one that can be used.
func (f *Fleet) beginTakeBack(ctx context.Context, name string) (*treeMerge, error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	f.mu.Lock()
	n := f.nodes[name]
	var d *disk
	switch {
	case n == nil:
		err = refuse(api.CodeNoSuchNode, "there is no node %q", name)
	case f.state.Disks[n.disk.name].Merging != name:
		err = refuse(api.CodeNoMerge, "no merge of node %q into disk %q is incomplete", name, n.disk.name)
	case n.busy != "":
		err = refuse(api.CodeInUse, "node %q: a %s is under way", name, n.busy)
	case n.disk.err != nil:
		err = refuse(api.CodeDiskFailed, "disk %q can't be used: %v", n.disk.name, n.disk.err)
	default:
		d = n.disk
	}
	f.mu.Unlock()
	if err == nil {
		err = f.allowWrites(d)
	}
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n.busy = "merge"
	return &treeMerge{fleet: f, node: n, disk: d}, nil
}

// restore writes to the disk what it had when the merge began.
func (m *treeMerge) restore(ctx context.Context) error {
	f := m.fleet
	f.mu.Lock()
	base := f.state.Layers[f.state.Disks[m.disk.name].MergeBase]
	changed := f.layersOf(append([]*layerRecord{base}, f.state.ancestors(base)...))
	f.mu.Unlock()
	written := false
	for _, l := range changed {
		ranges := l.preserved()
		if err := m.copyRanges(ctx, changed[0].generation.ground, ranges); err != nil {
			return err
		}
		written = written || len(ranges) > 0
	}
	if !written {
		return nil
	}
	return m.disk.origin.Flush()
}

// endTakeBack records that the disk is what it was, unless failed says why it is not.
func (m *treeMerge) endTakeBack(ctx context.Context, failed error) error {
	f, d := m.fleet, m.disk
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		m.node.busy = ""
	}()
	if failed != nil {
		return failed
	}
	release, err := f.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := f.recordDisk(d, "take back", func(r *diskRecord) { r.Merging, r.MergeBase = "", 0 }); err != nil {
		return err
	}
	f.unmarkDisk(d)
	f.mu.Lock()
	d.merge = nil
	f.publish(api.Event{Seq: f.state.Seq, Kind: api.EventMergeTakenBack, Name: m.node.name, Disk: d.name})
	f.mu.Unlock()
	f.log.Event(slog.LevelInfo, "the merge of "+m.node.name+" was taken back", "merge taken back", nil, slog.String("disk", d.name))
	f.exportAgain(d)
	return nil
}
