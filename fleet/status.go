package fleet

import (
	"cmp"
	"errors"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
)

// Tree returns all elements, parents before children.
func (f *Fleet) Tree() api.Tree {
	t, layers := f.tree()
	for i, l := range layers {
		if l != nil {
			t.Elements[i].AllocatedBytes = l.allocated()
		}
	}
	return t
}

// A Version is that of a tree; versions are compared with ==.
type Version struct {
	seq, changes, failed uint64
	broken               bool
}

// Version is another one after the tree has changed, or what nodes hold, or they failed; what is read of them, and who is
// connected, has no influence. It takes much less time than Tree.
func (f *Fleet) Version() Version {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := Version{seq: f.state.Seq, broken: f.broken != nil}
	for _, n := range f.nodes { // the same ones as long as seq is the same
		if n.dev == nil {
			continue
		}
		v.changes += n.dev.changes.Load()
		if n.dev.failed.Load() != nil {
			v.failed++
		}
	}
	return v
}

// tree is Tree without the sizes of files, and the layer of each element.
func (f *Fleet) tree() (api.Tree, []*layer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := api.Tree{Server: api.ServerOfFleet, Elements: []api.Element{}}
	var layers []*layer
	add := func(e api.Element, l *layer) {
		t.Elements = append(t.Elements, e)
		layers = append(layers, l)
	}
	if f.broken != nil {
		t.Error = f.broken.Error()
	}
	for _, r := range sorted(f.state.Disks) {
		add(f.diskElement(r), nil)
	}
	depth := map[uint64]int{}
	for _, r := range f.state.bottomUp() {
		depth[r.ID] = depth[r.Parent]
		if !r.Preserve {
			depth[r.ID]++
		}
		if r.isCheckpoint() {
			add(f.layerElement(r, depth[r.ID]-1), f.layers[r.ID])
		}
	}
	for _, r := range sorted(f.state.Nodes) {
		add(f.nodeElement(r, depth[r.Top]-1), f.layers[r.Top])
	}
	return t, layers
}

// Element returns one element.
func (f *Fleet) Element(name string) (api.Element, error) {
	e, l, err := f.element(name)
	if l != nil {
		e.AllocatedBytes = l.allocated()
	}
	return e, err
}

func (f *Fleet) element(name string) (api.Element, *layer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.state.Nodes[name]; r != nil {
		return f.nodeElement(r, f.depth(f.state.Layers[r.Top])), f.layers[r.Top], nil
	}
	if r := f.state.checkpoint(name); r != nil {
		return f.layerElement(r, f.depth(r)), f.layers[r.ID], nil
	}
	if r := f.state.Disks[name]; r != nil {
		return f.diskElement(r), nil, nil
	}
	return api.Element{}, nil, noSuchElement(name)
}

// depth is the number of layers below one, without preserve layers. mu is held.
func (f *Fleet) depth(r *layerRecord) (n int) {
	for _, l := range f.state.ancestors(r) {
		if !l.Preserve {
			n++
		}
	}
	return n
}

func stateOf(err error) (api.ElementState, string) {
	if err != nil {
		return api.ElementFailed, describeError(err)
	}
	return api.ElementOK, ""
}

// diskElement describes a disk. mu is held.
func (f *Fleet) diskElement(r *diskRecord) api.Element {
	d := f.diskStatus(r)
	e := api.Element{Name: d.Name, Kind: api.KindDisk, Disk: d.Name, SizeBytes: d.SizeBytes, State: d.State, Error: d.Error,
		URI: d.URI, File: d.Source, Created: d.Created, Children: d.Children, Durable: true}
	if open := f.disks[r.Name]; open != nil {
		e.Activity = figures.Activity(open.observed.Load())
	}
	return e
}

// layerElement describes a checkpoint. mu is held.
func (f *Fleet) layerElement(r *layerRecord, depth int) api.Element {
	l := f.layers[r.ID]
	e := api.Element{Name: r.title(), Kind: api.KindCheckpoint, Parent: f.state.parentTitle(r), Disk: r.Disk, SizeBytes: r.Size,
		Unnamed: r.Name == "", Sealed: true, Children: f.state.kids[r.ID], File: l.path, Created: r.Created, Durable: r.Complete, Depth: depth}
	e.State, e.Error = stateOf(f.unusable(r))
	if l.stack != nil {
		g := api.Figures{Store: "P", State: api.StateOK, Valid: true, ChunkSectors: l.stack.Layout().ChunkSectors, Exceptions: l.stack.Len()}
		if l.file != nil {
			g.TotalSectors = uint64(l.file.Size()) / ondisk.SectorSize
		}
		e.Figures = &g
	}
	return e
}

// nodeElement describes a node. mu is held.
func (f *Fleet) nodeElement(r *nodeRecord, depth int) api.Element {
	n, top := f.nodes[r.Name], f.state.Layers[r.Top]
	l := f.layers[r.Top]
	e := api.Element{Name: r.Name, Kind: api.KindNode, Parent: f.state.parentTitle(top), Disk: top.Disk, SizeBytes: top.Size,
		File: l.path, Created: r.Created, Durable: top.Durable, Depth: depth}
	if n == nil { // it is being made
		e.State = api.ElementOK
		return e
	}
	e.State, e.Error = stateOf(n.err)
	if n.dev == nil {
		return e
	}
	e.URI = f.uri(r.Name)
	counters, _ := f.nbd.Counters(r.Name)
	e.Connections = counters.Connections
	v := n.dev.pin()
	if v == nil {
		return e
	}
	defer v.unpin()
	g := figures.Of(v.snap.Status())
	c := figures.Counters(v.snap.Counters(), n.mergeWaits.Histogram())
	e.Figures, e.Counters, e.Activity = &g, &c, figures.Activity(n.observed.Load())
	if g.Error != "" && e.Error == "" {
		e.State, e.Error = stateOf(errors.New(g.Error))
	}
	return e
}

// uri is the NBD URI of an export, "" before Start. mu is held.
func (f *Fleet) uri(name string) string {
	if f.uriBase == nil {
		return ""
	}
	return f.opts.NBD.URI(f.uriBase, name)
}

// Disk returns one disk.
func (f *Fleet) Disk(name string) (api.Disk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.state.Disks[name]
	if r == nil {
		return api.Disk{}, noSuchDisk(name)
	}
	return f.diskStatus(r), nil
}

// Disks returns all disks.
func (f *Fleet) Disks() api.Disks {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := api.Disks{Disks: []api.Disk{}}
	for _, r := range sorted(f.state.Disks) {
		all.Disks = append(all.Disks, f.diskStatus(r))
	}
	return all
}

// diskStatus describes a disk. mu is held.
func (f *Fleet) diskStatus(r *diskRecord) api.Disk {
	d := api.Disk{Name: r.Name, Source: r.Source, Format: r.Format, Raw: r.Raw, SizeBytes: r.Size, Writable: r.Writable,
		Created: r.Created, Policy: r.Policy}
	open := f.disks[r.Name]
	d.State, d.Error = stateOf(cmp.Or(open.err, open.exportErr))
	if open.exported != nil {
		d.URI = f.uri(r.Name)
	}
	if open.merge != nil {
		m := open.merge.state()
		d.Merge = &m
	}
	for _, l := range f.state.Layers {
		switch {
		case l.Disk != r.Name:
		case l.Preserve:
			d.PreserveBytes += f.layers[l.ID].allocated()
		case f.state.onDisk(l):
			d.Children++
		}
	}
	return d
}
