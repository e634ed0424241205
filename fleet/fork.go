package fleet

import (
	"context"
	"errors"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
)

// Fork makes a node over a disk, a checkpoint, or another node as it is now. The other node's top becomes an unnamed
// checkpoint then, unless nothing was written to it: then its parent is forked.
func (f *Fleet) Fork(ctx context.Context, q api.ForkRequest) (api.Element, error) {
	if err := checkName("name", q.Name); err != nil {
		return api.Element{}, err
	}
	release, err := f.acquire(ctx)
	if err != nil {
		return api.Element{}, err
	}
	n, err := f.fork(q)
	release()
	if err != nil {
		return api.Element{}, err
	}
	if q.Durable {
		if err := f.flushNode(n); err != nil {
			return api.Element{}, err
		}
	}
	return f.Element(q.Name)
}

// fork is Fork. ops is held.
func (f *Fleet) fork(q api.ForkRequest) (*node, error) {
	if err := f.free(q.Name); err != nil {
		return nil, err
	}
	f.mu.Lock()
	isNode := f.state.Nodes[q.From] != nil
	f.mu.Unlock()
	if isNode {
		return f.forkNode(q)
	}
	if err := f.prepareDisk(q.From); err != nil {
		return nil, err
	}
	b, err := f.baseOf(q.From)
	if err != nil {
		return nil, err
	}
	return f.forkBase(q, b)
}

// prepareDisk has what is put on a disk show the disk as it is now. Of other names it does nothing.
func (f *Fleet) prepareDisk(name string) error {
	f.mu.Lock()
	r, d := f.state.Disks[name], f.disks[name]
	f.mu.Unlock()
	switch {
	case r == nil || d.err != nil:
		return nil
	case r.Merging != "":
		return errMerging(name, r.Merging)
	}
	return f.nextGeneration(d)
}

// baseOf returns what lies on a disk or checkpoint.
func (f *Fleet) baseOf(name string) (base, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.state.checkpoint(name); r != nil {
		if err := f.busyLayer([]uint64{r.ID}); err != nil {
			return base{}, err
		}
		return f.baseAt(f.disks[r.Disk], r.ID)
	}
	if r := f.state.Disks[name]; r != nil {
		return f.baseAt(f.disks[name], r.Preserve)
	}
	return base{}, noSuchElement(name)
}

// sizeOf returns the size of a fork of something that has from bytes.
func sizeOf(q api.ForkRequest, from int64) (int64, error) {
	switch {
	case q.Size == 0:
		return from, nil
	case q.Size < from:
		return 0, refuse(api.CodeBadRequest, "size: %d bytes are less than the %d of %s", q.Size, from, q.From)
	case q.Size%ondisk.SectorSize != 0:
		return 0, refuse(api.CodeBadRequest, "size: %d bytes are no whole number of %d-byte sectors", q.Size, ondisk.SectorSize)
	}
	return q.Size, nil
}

// forkBase makes a node over a base.
func (f *Fleet) forkBase(q api.ForkRequest, b base) (*node, error) {
	size, err := sizeOf(q, b.size)
	if err != nil {
		return nil, err
	}
	n := &node{name: q.Name, disk: b.disk, dev: newNodeDevice(f, q.Name, size)}
	t, err := f.makeTop(n, b, size)
	if err != nil {
		return nil, err
	}
	c := f.newChange("fork")
	t.addTo(c)
	if err := f.recordTops(c, t); err != nil {
		return nil, errors.Join(err, t.discard(f))
	}
	return n, f.addNode(n, t, c, q.From)
}

// recordTops records a change that makes tops, which are found from now on.
func (f *Fleet) recordTops(c *change, tops ...newTop) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.append(c, false); err != nil {
		return err
	}
	for _, t := range tops {
		f.layers[t.layer.id] = t.layer
	}
	return nil
}

// addNode exports a node that was recorded.
func (f *Fleet) addNode(n *node, t newTop, c *change, from string) error {
	n.dev.view.Store(t.view)
	err := f.export(n)
	n.err = err // the name was checked, so this does not happen
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes[n.name] = n
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventForked, Name: n.name, Parent: from, Disk: n.disk.name})
	f.notice()
	return err
}

// forkNode forks a node that is in use.
func (f *Fleet) forkNode(q api.ForkRequest) (*node, error) {
	f.mu.Lock()
	n, _, err := f.findNode(q.From)
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	size, err := sizeOf(q, n.dev.size)
	if err != nil {
		return nil, err
	}
	child := &node{name: q.Name, disk: n.disk, dev: newNodeDevice(f, q.Name, size)}
	t := newTop{node: child}
	if t.layer, err = f.createLayer(n.disk, f.nextID(), size); err != nil {
		return nil, err
	}
	c := f.newChange("fork")
	if n.dev.view.Load().top.store.Len() == 0 {
		err = f.forkEmpty(c, n, &t, size)
	} else {
		err = errWritten
	}
	if errors.Is(err, errWritten) {
		err = f.forkSealed(c, n, &t, size)
	}
	if err != nil {
		return nil, errors.Join(err, t.discard(f))
	}
	return child, f.addNode(child, t, c, q.From)
}

// errWritten reports a top that is not empty any more.
var errWritten = errors.New("the node was written to")

// forkEmpty puts t beside the top of n, to which nothing was written.
func (f *Fleet) forkEmpty(c *change, n *node, t *newTop, size int64) error {
	n.dev.gate.Lock()
	defer n.dev.gate.Unlock()
	top := n.dev.view.Load().top
	if top.store.Len() > 0 {
		return errWritten
	}
	f.mu.Lock()
	b, err := f.baseAt(n.disk, f.state.Layers[top.id].Parent)
	f.mu.Unlock()
	if err != nil {
		return err
	}
	if err := t.attach(f, b, size); err != nil {
		return err
	}
	t.addTo(c)
	return f.recordTops(c, *t)
}

// addTo adds the records of a new node to a change.
func (t *newTop) addTo(c *change) {
	c.Layers = append(c.Layers, t.record)
	c.Nodes = append(c.Nodes, nodeRecord{Name: t.node.name, Top: t.layer.id, Created: c.Time})
}

// forkSealed seals the top of n and puts t on it.
func (f *Fleet) forkSealed(c *change, n *node, t *newTop, size int64) error {
	s, err := f.prepareSeal(n)
	if err != nil {
		return err
	}
	_, err = f.sealAll([]*seal{s}, c, "", func() ([]newTop, error) {
		if err := t.attach(f, s.base, size); err != nil {
			return nil, err
		}
		t.addTo(c)
		return []newTop{*t}, nil
	})
	return err
}
