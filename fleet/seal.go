package fleet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// A seal replaces the top of a node by a new one, and makes the old one a checkpoint.
//
//	prepareSeal   makes the file of the new top; clients continue
//	sealAll       with no change to any of the nodes in flight: seals the tops, attaches the new ones over them, records it,
//	              and replaces the views
type seal struct {
	fleet *Fleet
	node  *node
	top   newTop // the new one
	old   *layer
	base  base // what the new top lies on: the old one
	view  *view
}

// prepareSeal makes the file of a new top for a node. ops is held.
func (f *Fleet) prepareSeal(n *node) (*seal, error) {
	l, err := f.createLayer(n.disk, f.nextID(), n.dev.size)
	if err != nil {
		return nil, err
	}
	return &seal{fleet: f, node: n, top: newTop{node: n, layer: l}}, nil
}

// sealAll seals the tops of nodes in one moment, and records them in c as checkpoints of a name. also adds to c what is to be
// recorded with it, and returns its tops. pause is how long changes to the nodes waited at most. After an error nothing has changed,
// and the new tops are removed. ops is held.
func (f *Fleet) sealAll(all []*seal, c *change, name string, also func() ([]newTop, error)) (pause time.Duration, err error) {
	slices.SortFunc(all, func(a, b *seal) int { return strings.Compare(a.node.name, b.node.name) })
	var gates []*changeGate
	for _, s := range all {
		gates = append(gates, &s.node.dev.gate)
	}
	closed, waited := lockGates(gates)
	err = f.sealLocked(all, c, name, also)
	for _, g := range gates {
		g.Unlock()
	}
	pause = max(waited, time.Since(closed))
	for _, s := range all {
		if err == nil {
			s.view.origin.RetryPaused() // writes that wait for space are made in the new top
			s.view.unpin()
		} else {
			err = errors.Join(err, s.top.discard(f))
		}
	}
	f.notice()
	return pause, err
}

// sealLocked is sealAll with the gates of the nodes held.
func (f *Fleet) sealLocked(all []*seal, c *change, name string, also func() ([]newTop, error)) (err error) {
	applied := 0
	defer func() {
		if err != nil {
			for _, s := range all[:applied] {
				s.old.unseal()
			}
		}
	}()
	var tops []newTop
	for _, s := range all {
		if err := s.apply(c, name); err != nil {
			return fmt.Errorf("node %q: %w", s.node.name, err)
		}
		applied++
		if err := s.top.attach(f, s.base, s.node.dev.size); err != nil {
			return fmt.Errorf("node %q: %w", s.node.name, err)
		}
		c.Layers = append(c.Layers, s.top.record)
		tops = append(tops, s.top)
	}
	if also != nil {
		more, err := also()
		if err != nil {
			return err
		}
		tops = append(tops, more...)
	}
	if err := f.recordTops(c, tops...); err != nil {
		return err
	}
	for _, s := range all {
		s.view = s.node.dev.view.Swap(s.top.view)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range all {
		f.unsettled[s.old.id] = s.old
	}
	return nil
}

// apply seals the top of the node, and adds its record to c. The gate of the node is held.
func (s *seal) apply(c *change, name string) error {
	f, v := s.fleet, s.node.dev.view.Load()
	s.old = v.top
	if err := v.top.store.Err(); err != nil {
		return refuse(api.CodeInvalid, "its layer %s can't be sealed: %v", v.top.path, err)
	}
	f.mu.Lock()
	r := *f.state.Layers[v.top.id]
	n := *f.state.Nodes[s.node.name]
	f.mu.Unlock()
	v.top.seal(v.chain, r.Size)
	r.Sealed, r.Name, r.Created = true, name, c.Time
	r.Complete = v.top.durable.Load() && !s.node.dev.dirty() // all that it holds is durable
	r.Exceptions = v.top.store.Len()
	n.Top = s.top.layer.id
	c.Layers = append(c.Layers, r)
	c.Nodes = append(c.Nodes, n)
	s.base = base{disk: s.node.disk, parent: r.ID, chain: v.top.chain, layers: append(slices.Clip(v.below), v.top), size: r.Size}
	return nil
}

// unseal reverts seal for a layer whose seal was not recorded.
func (l *layer) unseal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stack, l.chain = nil, nil
}

// Checkpoint seals the tops of nodes at one moment, each as NODE@NAME, and the nodes go on in new tops.
func (f *Fleet) Checkpoint(ctx context.Context, q api.CheckpointRequest) (api.Checkpoints, error) {
	if err := checkName("name", q.Name); err != nil {
		return api.Checkpoints{}, err
	}
	if len(q.Nodes) == 0 {
		return api.Checkpoints{}, refuse(api.CodeBadRequest, "nodes: at least one is required")
	}
	nodes, pause, err := f.checkpoint(ctx, q)
	if err != nil {
		return api.Checkpoints{}, err
	}
	reply := api.Checkpoints{PauseSeconds: pause.Seconds()}
	for i, n := range nodes {
		if q.Durable {
			if err := f.flushNode(n); err != nil {
				return reply, err
			}
		}
		e, err := f.Element(q.Nodes[i] + "@" + q.Name)
		if err != nil {
			return reply, err // dropped already
		}
		reply.Checkpoints = append(reply.Checkpoints, e)
	}
	return reply, nil
}

// checkpoint is Checkpoint without what is to be durable; without a name it makes unnamed checkpoints. ops is not held.
func (f *Fleet) checkpoint(ctx context.Context, q api.CheckpointRequest) (nodes []*node, pause time.Duration, err error) {
	if f.opts.Freeze != nil {
		return f.checkpointFrozen(ctx, q)
	}
	return f.checkpointNow(ctx, q)
}

// frozenMost is how long a checkpoint waits for other operations while the programs that use its nodes are frozen.
const frozenMost = 10 * time.Second

// checkpointFrozen is checkpointNow between the two calls of Options.Freeze. They may take long, so that no lock is held: other
// operations go on, and what they changed is checked afterwards.
func (f *Fleet) checkpointFrozen(ctx context.Context, q api.CheckpointRequest) (nodes []*node, pause time.Duration, err error) {
	thawed, err := f.beginFreeze(q)
	if err != nil {
		return nil, 0, err
	}
	defer thawed()
	defer func() {
		// Always, and whatever became of the context: programs wait.
		if thaw := f.opts.Freeze(context.WithoutCancel(ctx), true, q.Nodes); thaw != nil {
			f.logError("thaw", thaw)
		}
	}()
	if err := f.opts.Freeze(ctx, false, q.Nodes); err != nil {
		return nil, 0, refuse(api.CodeFreezeFailed, "%v", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, frozenMost, refuse(api.CodeFreezeFailed, "other operations took longer than %v", frozenMost))
	defer cancel()
	return f.checkpointNow(ctx, q)
}

// beginFreeze refuses a checkpoint that is not possible, or of nodes that are frozen already: the end of one freeze would be
// that of the other. thawed is called when the nodes are used again.
func (f *Fleet) beginFreeze(q api.CheckpointRequest) (thawed func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.checkpointNodes(q); err != nil {
		return nil, err
	}
	for _, name := range q.Nodes {
		if f.frozen[name] {
			return nil, refuse(api.CodeInUse, "node %q: a checkpoint is under way", name)
		}
	}
	for _, name := range q.Nodes {
		f.frozen[name] = true
	}
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, name := range q.Nodes {
			delete(f.frozen, name)
		}
	}, nil
}

// checkpointNow is checkpoint without freezing.
func (f *Fleet) checkpointNow(ctx context.Context, q api.CheckpointRequest) (nodes []*node, pause time.Duration, err error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer release()
	f.mu.Lock()
	nodes, err = f.checkpointNodes(q)
	f.mu.Unlock()
	if err != nil {
		return nil, 0, err
	}
	var all []*seal
	for _, n := range nodes {
		s, err := f.prepareSeal(n)
		if err != nil {
			for _, s := range all {
				err = errors.Join(err, s.top.discard(f))
			}
			return nil, 0, err
		}
		all = append(all, s)
	}
	c := f.newChange("checkpoint")
	if pause, err = f.sealAll(all, c, q.Name, nil); err != nil {
		return nil, 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range nodes {
		parent := f.state.parentTitle(f.state.Layers[f.state.Nodes[n.name].Top])
		f.publish(api.Event{Seq: c.Seq, Kind: api.EventCheckpointed, Name: n.name, Parent: parent, Disk: n.disk.name})
	}
	return nodes, pause, nil
}

// checkpointNodes finds the nodes of a request. mu is held.
func (f *Fleet) checkpointNodes(q api.CheckpointRequest) (nodes []*node, err error) {
	for i, name := range q.Nodes {
		if slices.Contains(q.Nodes[:i], name) {
			return nil, refuse(api.CodeBadRequest, "nodes: %q is twice in them", name)
		}
		n, _, err := f.findNode(name)
		if err != nil {
			return nil, err
		}
		if title := name + "@" + q.Name; f.state.checkpoint(title) != nil {
			return nil, refuse(api.CodeNameTaken, "there is a checkpoint %q already", title)
		}
		nodes = append(nodes, n)
	}
	return nodes, nil
}
