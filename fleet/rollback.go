package fleet

import (
	"context"
	"errors"
	"log/slog"

	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/server/api"
)

// Rollback makes a node show one of its checkpoints again: it gets a new top on it, and the old one is dropped, with the
// unnamed checkpoints whose last child that was. Later checkpoints with a name stay. It is refused while clients are
// connected, unless the request says to disconnect them: what they hold in memory does not fit the disk any more.
func (f *Fleet) Rollback(ctx context.Context, q api.RollbackRequest) (api.Element, error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return api.Element{}, err
	}
	n, err := f.rollback(ctx, q)
	release()
	if err != nil {
		return api.Element{}, err
	}
	if q.Durable {
		if err := f.flushNode(n); err != nil {
			return api.Element{}, err
		}
	}
	return f.Element(q.Node)
}

// rollback is Rollback. ops is held.
func (f *Fleet) rollback(ctx context.Context, q api.RollbackRequest) (*node, error) {
	n, b, size, err := f.rollbackTo(q)
	if err != nil {
		return nil, err
	}
	if c, _ := f.nbd.Counters(n.name); c.Connections > 0 && !q.Force {
		return nil, refuse(api.CodeInUse, "node %q is used by %s; force disconnects clients", n.name, text.Count(uint64(c.Connections), "client"))
	}
	t, err := f.makeTop(n, b, size)
	if err != nil {
		return nil, err
	}
	// The export ends, and begins again with another device: no client sees the content change, and what is left of an old
	// request changes nothing.
	if err := f.nbd.Remove(ctx, n.name); err != nil {
		f.log.Event(slog.LevelWarn, err.Error(), "requests are under way", err, slog.String("node", n.name))
	}
	old := n.dev
	if err := f.recordRollback(n, t); err != nil {
		return n, errors.Join(err, f.export(n), t.discard(f))
	}
	old.detach()
	return n, f.export(n)
}

// rollbackTo finds the node of a request, and what its new top lies on.
func (f *Fleet) rollbackTo(q api.RollbackRequest) (n *node, b base, size int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.state.Nodes[q.Node]
	if r == nil {
		_, _, err := f.findNode(q.Node)
		return nil, b, 0, err
	}
	n = f.nodes[q.Node]
	top := f.state.Layers[r.Top]
	to := f.state.checkpoint(q.Checkpoint)
	if to == nil { // the name of one of its own, without the node's
		to = f.state.checkpoint(q.Node + "@" + q.Checkpoint)
	}
	switch {
	case n.busy != "":
		return nil, b, 0, refuse(api.CodeInUse, "node %q: a %s is under way", q.Node, n.busy)
	case n.dev == nil:
		return nil, b, 0, refuse(api.CodeDiskFailed, "node %q can't be used: %v", q.Node, n.err)
	case to == nil:
		return nil, b, 0, refuse(api.CodeNoSuchCheckpoint, "there is no checkpoint %q", q.Checkpoint)
	}
	for _, l := range f.state.ancestors(top) {
		if l == to {
			b, err = f.baseAt(n.disk, to.ID)
			return n, b, top.Size, err
		}
	}
	return nil, b, 0, refuse(api.CodeNotAncestor, "%q is not a checkpoint that node %q lies on", q.Checkpoint, q.Node)
}

// recordRollback records that t is the top of n, and gives n a device with it.
func (f *Fleet) recordRollback(n *node, t newTop) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := *f.state.Nodes[n.name]
	dropped := f.state.Layers[r.Top]
	c := f.newChange("rollback")
	r.Top = t.layer.id
	c.Layers, c.Nodes = []layerRecord{t.record}, []nodeRecord{r}
	c.DropLayers = append([]uint64{dropped.ID}, f.state.orphansBut(dropped.Parent, t.record.Parent)...)
	if err := f.busyLayer(c.DropLayers); err != nil {
		return err
	}
	if err := f.dropLayers(c); err != nil {
		return err
	}
	f.layers[t.layer.id] = t.layer
	dev := newNodeDevice(f, n.name, n.dev.size)
	dev.view.Store(t.view)
	n.dev = dev
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventRolledBack, Name: n.name, Parent: f.state.Layers[t.record.Parent].title(), Disk: n.disk.name})
	f.notice()
	return nil
}
