package fleet

import (
	"context"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
)

// A checkpoint is squashed with the layers below it that only it needs and that have no name:
//
//	before   disk ◄ named ◄ own ◄ own ◄ CHECKPOINT ◄ …
//	after    disk ◄ named ◄ copy, the CHECKPOINT   ◄ …
//
// Everything above shows the same through the copy: its chains are made anew, and the views of the nodes are replaced.

// beginSquashBelow marks what is used as busy, and makes the file of the copy. nil: there is nothing to squash.
func (f *Fleet) beginSquashBelow(ctx context.Context, name string) (*squash, error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	s := &squash{fleet: f}
	if err := s.findOwn(name); err != nil || len(s.own) == 1 {
		return nil, err
	}
	if s.copy, err = f.createLayer(s.lower.disk, f.nextID(), s.size); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.mark("squash")
	return s, nil
}

// findOwn finds the layers of a squash of a checkpoint. ops is held.
func (s *squash) findOwn(name string) (err error) {
	f := s.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.state.checkpoint(name)
	if r == nil {
		return refuse(api.CodeNoSuchCheckpoint, "there is no checkpoint %q", name)
	}
	s.own = append([]uint64{r.ID}, f.ownLayers(r)...)
	if err := f.unusable(r); err != nil {
		return err
	}
	if err := f.busyLayer(s.own); err != nil {
		return err
	}
	s.upper, s.size = f.layers[r.ID].chain, r.Size
	s.lower, err = f.baseAt(f.disks[r.Disk], f.state.Layers[s.own[len(s.own)-1]].Parent)
	return err
}

// above are what lies on a checkpoint: sealed layers, bottom-up, and nodes in the order of their names.
type above struct {
	sealed []layerRecord
	nodes  []*node
	tops   map[string]layerRecord // of nodes
}

// findAbove finds what lies on the checkpoint. It refuses what an operation uses, or can't be used.
func (s *squash) findAbove() (a above, err error) {
	f := s.fleet
	a.tops = map[string]layerRecord{}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range s.own[1:] {
		if f.state.kids[id] != 1 { // somebody rolled back to it meanwhile
			return a, refuse(api.CodeInUse, "checkpoint %q is in use by others now", f.state.Layers[id].title())
		}
	}
	on := map[uint64]bool{s.own[0]: true}
	for _, r := range f.state.bottomUp() {
		if on[r.Parent] {
			on[r.ID] = true
			if r.Sealed {
				a.sealed = append(a.sealed, *r)
			}
		}
	}
	for _, r := range sorted(f.state.Nodes) {
		top := f.state.Layers[r.Top]
		if !on[top.ID] {
			continue
		}
		n := f.nodes[r.Name]
		if n == nil || n.dev == nil || n.busy != "" {
			return a, refuse(api.CodeInUse, "node %q, which lies on it, is used by another operation or can't be used", r.Name)
		}
		a.nodes = append(a.nodes, n)
		a.tops[n.name] = *top
	}
	return a, nil
}

// finishBelow puts what lies on the checkpoint on the copy, and drops the layers.
func (s *squash) finishBelow(ctx context.Context) error {
	f := s.fleet
	release, err := f.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	a, err := s.findAbove()
	if err != nil {
		return err
	}
	fresh, err := f.freshLayers(a.sealed)
	if err != nil {
		return err
	}
	s.copy.durable.Store(true)
	s.copy.seal(s.lower.chain, s.size)
	for _, n := range a.nodes {
		n.dev.gate.Lock()
	}
	views, err := s.replaceBelow(a, fresh)
	for _, n := range a.nodes {
		n.dev.gate.Unlock()
	}
	for _, v := range views { // the old ones, or those that are not used after an error
		v.unpin()
	}
	f.notice()
	return err
}

// freshLayers returns layers of sealed stores, for other chains: the index of one alone is freed when it was merged, so that the
// store is read again.
func (f *Fleet) freshLayers(sealed []layerRecord) (map[uint64]*stack.Layer, error) {
	fresh := map[uint64]*stack.Layer{}
	for _, r := range sealed {
		f.mu.Lock()
		l := f.layers[r.ID]
		f.mu.Unlock()
		l.mu.Lock()
		st := l.store
		l.mu.Unlock()
		if st == nil {
			var err error
			if st, err = store.OpenToRead(l.file); err != nil {
				return nil, block.WithPath(l.path, err)
			}
		}
		fresh[r.ID] = stack.NewLayer(st)
	}
	return fresh, nil
}

// replaceChain puts a sealed layer into another chain.
func (l *layer) replaceChain(s *stack.Layer, chain *stack.Chain) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stack, l.chain = s, chain
	if l.store == nil {
		s.SetDurable()
	}
}

// replaceBelow records the squash and replaces the views. The gates of the nodes are held. The views that it returns are not
// used any more.
func (s *squash) replaceBelow(a above, fresh map[uint64]*stack.Layer) (unused []*view, err error) {
	f := s.fleet
	chains := map[uint64]*stack.Chain{s.own[0]: s.copy.chain}
	for _, r := range a.sealed {
		chains[r.ID] = chains[r.Parent].With(fresh[r.ID], r.Size)
	}
	var views []*view
	for _, n := range a.nodes {
		old, top := n.dev.view.Load(), a.tops[n.name]
		b := base{disk: n.disk, chain: chains[top.Parent], layers: s.withCopy(old.below)}
		v, err := f.newView(n.name, b, old.top, n.dev.size)
		if err != nil {
			return views, err
		}
		views = append(views, v)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	into := *f.state.Layers[s.own[0]]
	copied := into
	copied.ID, copied.File = s.copy.id, ""
	copied.Parent = f.state.Layers[s.own[len(s.own)-1]].Parent // a preserve layer may have come between
	copied.Durable, copied.Complete, copied.Exceptions = true, true, s.copy.store.Len()
	c := f.newChange("squash")
	c.Layers, c.DropLayers = []layerRecord{copied}, s.own
	for _, r := range f.state.bottomUp() {
		if r.Parent == into.ID {
			child := *r
			child.Parent = copied.ID
			c.Layers = append(c.Layers, child)
		}
	}
	for _, id := range s.own {
		f.layers[id].busy = ""
	}
	if err := f.dropLayers(c); err != nil {
		return views, err
	}
	s.result = copied.title()
	f.layers[s.copy.id] = s.copy
	s.copy.completed()
	for _, r := range a.sealed {
		f.layers[r.ID].replaceChain(fresh[r.ID], chains[r.ID])
	}
	for i, n := range a.nodes {
		unused = append(unused, n.dev.view.Swap(views[i]))
	}
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventSquashed, Name: copied.title(), Disk: copied.Disk})
	return unused, nil
}

// withCopy returns layers with the copy in the place of those that it replaces.
func (s *squash) withCopy(below []*layer) (list []*layer) {
	for _, l := range below {
		switch {
		case !slices.Contains(s.own, l.id):
			list = append(list, l)
		case l.id == s.own[0]:
			list = append(list, s.copy)
		}
	}
	return list
}

// Forget removes a checkpoint that others may lie on: then it loses its name, and its layer stays until it is squashed.
func (f *Fleet) Forget(ctx context.Context, name string) error {
	forgotten, err := f.forget(ctx, name)
	if err == nil && !forgotten {
		err = f.Drop(ctx, name)
	}
	return err
}

// forget takes the name of a checkpoint that has children.
func (f *Fleet) forget(ctx context.Context, name string) (done bool, err error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.state.checkpoint(name)
	switch {
	case r == nil:
		return false, refuse(api.CodeNoSuchCheckpoint, "there is no checkpoint %q", name)
	case f.state.kids[r.ID] == 0:
		return false, nil
	case r.Name == "":
		return true, nil
	}
	if err := f.busyLayer([]uint64{r.ID}); err != nil {
		return false, err
	}
	unnamed := *r
	unnamed.Name = ""
	c := f.newChange("forget")
	c.Layers = []layerRecord{unnamed}
	if err := f.append(c, true); err != nil {
		return false, err
	}
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventDropped, Name: name, Disk: r.Disk})
	return true, nil
}
