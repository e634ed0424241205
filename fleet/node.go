package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
)

// A node is an open node.
type node struct {
	name string
	disk *disk
	err  error       // why it is not exported
	dev  *nodeDevice // nil: err

	observed atomic.Pointer[activity.Device] // what is exported; nil: it is not observed
	busy     string                          // the operation that uses it; Fleet.mu is held

	mergeWaits latency.Recorder // how long changes waited for its merges, each time
}

// snapshotOptions are those of the tops of nodes over a disk.
func (f *Fleet) snapshotOptions(name string, d *disk) snapshot.Options {
	o := snapshot.Options{FullPolicy: d.fullPolicy}
	o.Features.DiscardZeroesCOW = true // a client that trims a chunk expects its space back
	o.Notify = func(e snapshot.Event) { f.notify(d.name, name, e) }
	return o
}

// notify logs an event of the engine, and publishes it in the background: it is called inside requests.
func (f *Fleet) notify(disk, name string, e snapshot.Event) {
	level := slog.LevelInfo
	switch e.Kind {
	case snapshot.EventInvalid, snapshot.EventMergeFailed:
		level = slog.LevelError
	case snapshot.EventFull, snapshot.EventOverflow:
		level = slog.LevelWarn
	}
	text := e.Text
	if e.Err != nil {
		text = strings.TrimSuffix(text, ".") + ". Cause: " + strings.ReplaceAll(e.Err.Error(), "\n", "; ")
	}
	f.log.Event(level, name+": "+text, e.Text, e.Err, slog.String("disk", disk), slog.String("node", name), slog.String("kind", string(e.Kind)))
	event := api.Event{Kind: api.EventSnapshot, Name: name, Disk: disk, Text: e.Text}
	if e.Err != nil {
		event.Error = e.Err.Error()
	}
	go func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.publish(event)
	}()
}

// A base is where a new top is put: the chain below it, and the layers of that.
type base struct {
	disk   *disk
	parent uint64 // layer; 0: the disk
	chain  *stack.Chain
	layers []*layer // sealed ones, bottom-up, without preserve layers
	size   int64    // bytes
}

// baseAt returns what lies on a layer, or on the disk with parent 0. mu is held.
func (f *Fleet) baseAt(d *disk, parent uint64) (b base, err error) {
	b = base{disk: d, parent: parent, size: d.size}
	if d.err != nil {
		return b, refuse(api.CodeDiskFailed, "disk %q can't be used: %v", d.name, d.err)
	}
	r := f.state.Layers[parent]
	if r == nil {
		b.chain = d.chain
		return b, nil
	}
	b.size = r.Size
	l := f.layers[parent]
	if err := f.unusable(r); err != nil {
		return b, err
	}
	b.chain = l.chain
	for at := r; at != nil && !at.Preserve; at = f.state.Layers[at.Parent] {
		b.layers = append(b.layers, f.layers[at.ID])
	}
	for i, j := 0, len(b.layers)-1; i < j; i, j = i+1, j-1 {
		b.layers[i], b.layers[j] = b.layers[j], b.layers[i]
	}
	return b, nil
}

// unusable returns why a layer, or one below it, can't be used, or nil. mu is held.
func (f *Fleet) unusable(r *layerRecord) error {
	if d := f.disks[r.Disk]; d.err != nil {
		return refuse(api.CodeDiskFailed, "disk %q can't be used: %v", d.name, d.err)
	}
	for ; r != nil; r = f.state.Layers[r.Parent] {
		if l := f.layers[r.ID]; l.err != nil {
			return refuse(api.CodeDiskFailed, "layer %d, of %q, can't be used: %v", r.ID, f.titleOf(r), l.err)
		}
	}
	return nil
}

// newView attaches a top over a base, with size bytes.
func (f *Fleet) newView(name string, b base, top *layer, size int64) (*view, error) {
	var below block.Device = b.chain
	if size > b.chain.Size() {
		below = stack.New(b.chain, size)
	}
	v := &view{origin: snapshot.NewOrigin(below), chain: b.chain, top: top, below: b.layers, fetched: cowfile.IsFetched(b.disk.file)}
	opts := f.snapshotOptions(name, b.disk)
	var err error
	if top.store == nil { // it was there before the fleet was opened
		if v.snap, err = v.origin.Attach(top.device, opts); err == nil {
			top.store = v.snap.Store()
			top.device.layout = top.store.Layout()
			top.device.holes.Store(true)
		}
	} else {
		v.snap, err = v.origin.AttachStore(top.store, opts)
	}
	if err != nil {
		return nil, block.WithPath(top.path, err)
	}
	v.refs.Store(1)
	v.release = func(v *view) {
		f.unref(v.top)
		for _, l := range v.below {
			f.unref(l)
		}
	}
	top.refs.Add(1)
	for _, l := range b.layers {
		l.refs.Add(1)
	}
	return v, nil
}

// wrap returns what is exported of a device, observed if Options say so.
func (f *Fleet) wrap(name string, dev block.Device, observed *atomic.Pointer[activity.Device]) block.Device {
	if f.opts.Wrap != nil {
		dev = f.opts.Wrap(name, dev)
	}
	if !f.opts.Observe {
		return dev
	}
	o := activity.Observe(dev)
	observed.Store(o)
	return o
}

// export exports a node.
func (f *Fleet) export(n *node) error {
	dev := f.wrap(n.name, n.dev, &n.observed)
	sectors := f.opts.ChunkSectors
	if sectors == 0 {
		sectors = ondisk.DefaultChunkSectors
	}
	return f.nbd.Add(nbd.Export{Name: n.name, Description: "node " + n.name + " of disk " + n.disk.name, Device: dev,
		CanTrim: true, MultiConn: true, PreferredBlock: max(4096, min(sectors*ondisk.SectorSize, 64<<10)),
		Contexts: map[string]nbd.ContextFunc{"dmsnap:changed": n.dev.Changed}})
}

// findNode returns a node that can be changed. mu is held.
func (f *Fleet) findNode(name string) (*node, *nodeRecord, error) {
	r := f.state.Nodes[name]
	if r == nil {
		if strings.Contains(name, "@") && f.state.checkpoint(name) != nil {
			return nil, nil, refuse(api.CodeSealed, "%q is a checkpoint, which is never changed", name)
		}
		return nil, nil, refuse(api.CodeNoSuchNode, "there is no node %q", name)
	}
	n := f.nodes[name]
	switch {
	case n.err != nil:
		return nil, nil, refuse(api.CodeDiskFailed, "node %q can't be used: %v", name, n.err)
	case n.busy != "":
		return nil, nil, refuse(api.CodeInUse, "node %q: a %s is under way", name, n.busy)
	}
	return n, r, nil
}

// A newTop is a top that an operation makes for a node.
type newTop struct {
	node   *node
	layer  *layer
	view   *view
	record layerRecord
}

// makeTop makes the file of a node's new top and attaches it over a base. Nothing names it yet.
func (f *Fleet) makeTop(n *node, b base, size int64) (t newTop, err error) {
	t.node = n
	if t.layer, err = f.createLayer(b.disk, f.nextID(), size); err != nil {
		return t, err
	}
	if err := t.attach(f, b, size); err != nil {
		return t, errors.Join(err, f.discard(t.layer))
	}
	return t, nil
}

// attach attaches the top over a base.
func (t *newTop) attach(f *Fleet, b base, size int64) (err error) {
	if t.view, err = f.newView(t.node.name, b, t.layer, size); err != nil {
		return err
	}
	t.record = layerRecord{ID: t.layer.id, Parent: b.parent, Disk: b.disk.name, Node: t.node.name, Size: size, Created: f.opts.Now().UTC().Round(0)}
	return nil
}

// discard removes the top of an operation that failed.
func (t *newTop) discard(f *Fleet) error {
	if t.view != nil {
		for _, l := range t.view.below {
			f.unref(l)
		}
	}
	return f.discard(t.layer)
}

// Drop removes a node or a checkpoint, and its file. A checkpoint that others lie on is refused. Unnamed checkpoints whose
// last child it was go with it. The clients of a node are disconnected; when ctx ends, requests that are under way are
// waited for no longer.
func (f *Fleet) Drop(ctx context.Context, name string) error {
	release, err := f.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	gone, err := f.dropRecord(name)
	if err != nil || gone == nil {
		return err
	}
	if err := f.nbd.Remove(ctx, name); err != nil && gone.err == nil {
		f.log.Event(slog.LevelWarn, err.Error(), "requests are under way", err, slog.String("node", name))
	}
	if gone.dev != nil {
		gone.dev.detach()
	}
	return nil
}

// dropRecord records that a node or checkpoint is dropped. gone is the node.
func (f *Fleet) dropRecord(name string) (gone *node, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.newChange("drop")
	e := api.Event{Kind: api.EventDropped, Name: name}
	switch {
	case f.state.Nodes[name] != nil:
		r := f.state.Nodes[name]
		if gone = f.nodes[name]; gone.busy != "" {
			return nil, refuse(api.CodeInUse, "node %q: a %s is under way", name, gone.busy)
		}
		if f.state.Disks[gone.disk.name].Merging == name {
			return nil, refuse(api.CodeMerging, "node %q is not merged completely into disk %q: merge it, or take the merge back, first", name, gone.disk.name)
		}
		c.DropNodes = []string{name}
		c.DropLayers = append([]uint64{r.Top}, f.state.orphans(f.state.Layers[r.Top].Parent)...)
		e.Disk = gone.disk.name
	case f.state.checkpoint(name) != nil:
		r := f.state.checkpoint(name)
		if n := f.state.kids[r.ID]; n > 0 {
			return nil, refuse(api.CodeHasChildren, "checkpoint %q has children: %d", name, n)
		}
		c.DropLayers = append([]uint64{r.ID}, f.state.orphans(r.Parent)...)
		e.Disk = r.Disk
	case f.state.Disks[name] != nil:
		return nil, refuse(api.CodeBadRequest, "%q is a disk, which is removed, not dropped", name)
	default:
		return nil, noSuchElement(name)
	}
	if err := f.busyLayer(c.DropLayers); err != nil {
		return nil, err
	}
	if err := f.dropLayers(c); err != nil {
		return nil, err
	}
	if gone != nil {
		delete(f.nodes, name)
		f.accounts.forgetNode(gone.disk, name)
	}
	e.Seq = c.Seq
	f.publish(e)
	return gone, nil
}

// busyLayer refuses layers that an operation uses. mu is held.
func (f *Fleet) busyLayer(ids []uint64) error {
	for _, id := range ids {
		if l := f.layers[id]; l.busy != "" {
			return refuse(api.CodeInUse, "checkpoint %q: a %s is under way", f.state.Layers[id].title(), l.busy)
		}
	}
	return nil
}

// dropLayers records a change that drops layers, whose files are removed when nothing uses them any more. mu is held.
func (f *Fleet) dropLayers(c *change) error {
	adopted := map[uint64]bool{} // files that are not the fleet's own stay
	for _, id := range c.DropLayers {
		adopted[id] = f.state.Layers[id].File != ""
	}
	if err := f.append(c, true); err != nil {
		return err
	}
	for _, id := range c.DropLayers {
		l := f.layers[id]
		delete(f.layers, id)
		delete(f.unsettled, id)
		l.drop = !adopted[id]
		if f.accounts.remove(l) {
			f.retryPaused(l.disk)
		}
		f.unref(l)
	}
	return nil
}

func noSuchElement(name string) error {
	return refuse(api.CodeNoSuchElement, "there is no disk, node or checkpoint %q", name)
}

// describeError is for elements that can't be used.
func describeError(err error) string {
	if err == nil {
		return ""
	}
	return strings.ReplaceAll(fmt.Sprint(err), "\n", "; ")
}
