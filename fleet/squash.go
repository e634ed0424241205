package fleet

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
)

// A squash copies the layers that are a node's own into one:
//
//	before   disk ◄ named ◄ own ◄ own ◄ top
//	after    disk ◄ named ◄ copy       ◄ top
//
// The node is served meanwhile: what is written goes to its top, which the squash seals at its beginning, if something was
// written to it.
type squash struct {
	fleet *Fleet
	node  *node    // nil: a checkpoint is squashed
	own   []uint64 // layers, from the uppermost to the lowest
	lower base     // what they lie on
	upper *stack.Chain
	copy  *layer
	size  int64

	result string // the name of a checkpoint that was squashed: it is another one without a name
}

// copyAtOnce is how much a squash writes at once, in bytes.
const copyAtOnce = 1 << 20

// Squash copies the layers that no other node needs and that have no name into one: those of a node, or those below a
// checkpoint into its layer. When ctx ends before that is done nothing has changed but that the node's top was sealed.
func (f *Fleet) Squash(ctx context.Context, q api.SquashRequest) (api.Element, error) {
	ctx, end, err := f.begin(ctx)
	if err != nil {
		return api.Element{}, err
	}
	defer end()
	begin, finish := f.beginSquash, (*squash).finish
	if strings.Contains(q.Node, "@") {
		begin, finish = f.beginSquashBelow, (*squash).finishBelow
	}
	s, err := begin(ctx, q.Node)
	if err != nil {
		return api.Element{}, err
	}
	if s != nil {
		if err = s.fill(ctx); err == nil {
			err = finish(s, ctx)
		}
		if err != nil {
			return api.Element{}, errors.Join(err, s.abandon())
		}
		if s.result != "" {
			return f.Element(s.result)
		}
	}
	return f.Element(q.Node)
}

// ownLayers returns the layers below a top that only it needs and that have no name, from the uppermost to the lowest. mu is
// held.
func (f *Fleet) ownLayers(top *layerRecord) (own []uint64) {
	for r := f.state.Layers[top.Parent]; r != nil && r.isCheckpoint() && r.Name == "" && f.state.kids[r.ID] == 1; r = f.state.Layers[r.Parent] {
		own = append(own, r.ID)
	}
	return own
}

// beginSquash seals the top, marks what is used as busy, and makes the file of the copy. nil: there is nothing to squash.
func (f *Fleet) beginSquash(ctx context.Context, name string) (*squash, error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	f.mu.Lock()
	n, r, err := f.findNode(name)
	if err != nil {
		f.mu.Unlock()
		return nil, err
	}
	own := f.ownLayers(f.state.Layers[r.Top])
	written := f.layers[r.Top].store.Len() > 0
	f.mu.Unlock()
	if len(own) == 0 || len(own) == 1 && !written {
		return nil, nil
	}
	if written {
		if _, err := f.sealUnnamed(n, "squash"); err != nil {
			return nil, err
		}
	}
	s := &squash{fleet: f, node: n, size: n.dev.size}
	if err := s.prepare(); err != nil {
		return nil, err
	}
	return s, nil
}

// sealUnnamed makes the top of a node an unnamed checkpoint. pause is as of sealAll. ops is held.
func (f *Fleet) sealUnnamed(n *node, op string) (pause time.Duration, err error) {
	s, err := f.prepareSeal(n)
	if err != nil {
		return 0, err
	}
	return f.sealAll([]*seal{s}, f.newChange(op), "", nil)
}

func (s *squash) prepare() (err error) {
	f := s.fleet
	if s.copy, err = f.createLayer(s.node.disk, f.nextID(), s.size); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.own = f.ownLayers(f.state.Layers[f.state.Nodes[s.node.name].Top])
	lowest := f.state.Layers[s.own[len(s.own)-1]]
	if s.lower, err = f.baseAt(s.node.disk, lowest.Parent); err != nil {
		return errors.Join(err, f.discard(s.copy))
	}
	s.upper = f.layers[s.own[0]].chain
	s.mark("squash")
	return nil
}

// mark marks what the squash uses as busy. mu is held.
func (s *squash) mark(what string) {
	if s.node != nil {
		s.node.busy = what
	}
	for _, id := range s.own {
		s.fleet.layers[id].busy = what
	}
}

// fill copies what the layers hold, and makes it durable.
func (s *squash) fill(ctx context.Context) error {
	l := s.copy.store.Layout()
	filler := store.NewFiller(s.copy.store, copyAtOnce)
	next := ondisk.OriginChunk(0) // chunks below are copied
	for r := range s.upper.StoredSince(s.lower.chain, 0, s.upper.Size()) {
		first, last := max(next, l.OriginChunkAt(r.Off)), l.OriginChunkAt(r.Off+r.Length-1)
		for first <= last {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(uint64(last-first)+1, uint64(max(1, copyAtOnce/l.ChunkBytes())))
			if err := filler.Add(first, n, s.read); err != nil {
				return err
			}
			first += ondisk.OriginChunk(n)
		}
		next = max(next, last+1)
	}
	err := filler.Flush()
	if err == nil {
		err = s.copy.sync()
	}
	if err == nil {
		err = s.fleet.names.sync()
	}
	return err
}

// read reads the content of chunks, of which the last may end behind the disk.
func (s *squash) read(p []byte, off int64) error { return readChunks(s.upper, p, off) }

// readChunks fills p with the bytes at off, and with zeros where the device has ended.
func readChunks(dev *stack.Chain, p []byte, off int64) error {
	n := max(0, min(int64(len(p)), dev.Size()-off))
	clear(p[n:])
	_, err := dev.ReadAt(p[:n], off)
	return err
}

// finish puts the top on the copy, and drops the layers.
func (s *squash) finish(ctx context.Context) error {
	f := s.fleet
	release, err := f.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	c := f.newChange("squash")
	copied := layerRecord{ID: s.copy.id, Disk: s.node.disk.name, Node: s.node.name, Size: s.upper.Size(), Created: c.Time,
		Sealed: true, Durable: true, Complete: true, Exceptions: s.copy.store.Len()}
	s.copy.durable.Store(true)
	s.copy.seal(s.lower.chain, s.upper.Size())
	s.node.dev.gate.Lock()
	old, err := s.replace(c, copied)
	s.node.dev.gate.Unlock()
	if err != nil {
		return err
	}
	old.unpin()
	f.notice()
	return nil
}

// replace records the squash and replaces the view. The gate is held.
func (s *squash) replace(c *change, copied layerRecord) (old *view, err error) {
	f := s.fleet
	b := base{disk: s.node.disk, parent: s.copy.id, chain: s.copy.chain, layers: append(append([]*layer(nil), s.lower.layers...), s.copy), size: copied.Size}
	old = s.node.dev.view.Load()
	v, err := f.newView(s.node.name, b, old.top, s.size)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	copied.Parent = f.state.Layers[s.own[len(s.own)-1]].Parent // a preserve layer may have come between
	top := *f.state.Layers[old.top.id]
	top.Parent = s.copy.id
	c.Layers = []layerRecord{copied, top}
	c.DropLayers = s.own
	for _, id := range s.own {
		f.layers[id].busy = ""
	}
	if err := f.dropLayers(c); err != nil {
		v.unpin()
		return nil, err
	}
	s.node.busy = ""
	f.layers[s.copy.id] = s.copy
	s.copy.completed()
	s.node.dev.view.Store(v)
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventSquashed, Name: s.node.name, Disk: s.node.disk.name})
	return old, nil
}

// abandon ends a squash that failed.
func (s *squash) abandon() error {
	s.fleet.mu.Lock()
	if s.node != nil {
		s.node.busy = ""
	}
	for _, id := range s.own {
		if l := s.fleet.layers[id]; l != nil {
			l.busy = ""
		}
	}
	s.fleet.mu.Unlock()
	return s.fleet.discard(s.copy)
}
