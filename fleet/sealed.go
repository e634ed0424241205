package fleet

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
)

// What lies below the tops never changes, and clients read it by exports that are not listed:
//
//	NODE@NAME, NODE@~ID   a checkpoint
//	DISK@~ID              the disk as nodes have it beneath them: as the preserve layer ID keeps it; DISK@~0: it was never written
//
// Such an export has contexts that say what changed since what lies below it. A connection keeps the layers that it uses:
// whatever is dropped, forgotten or squashed meanwhile, it shows the same.

// A sealed is what a checkpoint shows, or a disk beneath nodes, with its layers in use until release.
type sealed struct {
	base
	record *layerRecord // of its uppermost layer; nil: a disk that was never written
	below  []below      // what it lies on, from the uppermost on
	used   []*layer
}

// A below is what lies below a checkpoint: another checkpoint, or the disk.
type below struct {
	name  string
	chain *stack.Chain
}

// pinSealed returns what an export that is not listed shows.
func (f *Fleet) pinSealed(export string) (*sealed, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, r := f.findSealed(export)
	if d == nil || f.closed {
		return nil, noSuchElement(export)
	}
	id := uint64(0)
	if r != nil {
		id = r.ID
	}
	b, err := f.baseAt(d, id)
	if err != nil {
		return nil, err
	}
	s := &sealed{base: b, record: r}
	for ; r != nil; r = f.state.Layers[r.Parent] {
		if r != s.record && !r.Preserve {
			s.below = append(s.below, below{r.title(), f.layers[r.ID].chain})
		}
		s.used = append(s.used, f.layers[r.ID])
	}
	if s.isCheckpoint() {
		s.below = append(s.below, below{d.name, nil})
	}
	for _, l := range s.used {
		l.refs.Add(1)
	}
	return s, nil
}

// isCheckpoint reports whether it is one, or else a disk.
func (s *sealed) isCheckpoint() bool { return s.record != nil && !s.record.Preserve }

// findSealed returns the disk of an export that is not listed, and its uppermost layer; no disk: there is no such export. mu is
// held.
func (f *Fleet) findSealed(export string) (*disk, *layerRecord) {
	if r := f.state.checkpoint(export); r != nil {
		return f.disks[r.Disk], r
	}
	name, number, _ := strings.Cut(export, "@~")
	id, err := strconv.ParseUint(number, 10, 64)
	if err != nil || strconv.FormatUint(id, 10) != number {
		return nil, nil
	}
	r := f.state.Layers[id]
	switch {
	case id == 0:
		if d := f.disks[name]; d != nil && f.state.Disks[name].Preserve == 0 {
			return d, nil
		}
	case r != nil && r.isCheckpoint() && r.Node == name, r != nil && r.Preserve && r.Disk == name:
		return f.disks[r.Disk], r
	}
	return nil, nil
}

// release gives up the layers.
func (s *sealed) release(f *Fleet) {
	for _, l := range s.used {
		f.unref(l)
	}
}

// settleSealed makes durable what a checkpoint shows: what a backup has of it must not be lost here, or the next one would
// lack that.
func (f *Fleet) settleSealed(s *sealed) error {
	var fresh []*layer
	for _, l := range s.layers {
		if !l.complete.Load() {
			fresh = append(fresh, l)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	for _, l := range fresh {
		if err := l.sync(); err != nil {
			return err
		}
	}
	if err := f.names.sync(); err != nil {
		return err
	}
	return f.markDurable(fresh, nil)
}

// openSealed is for nbd.Options.Open.
func (f *Fleet) openSealed(export string) (*nbd.Export, func()) {
	s, err := f.pinSealed(export)
	if err == nil {
		if err = f.settleSealed(s); err != nil {
			s.release(f)
		}
	}
	if err != nil {
		if a, refused := err.(*api.Error); !refused || a.Code != api.CodeNoSuchElement {
			f.logError(export, err)
		}
		return nil, nil
	}
	return s.export(), func() { s.release(f) }
}

// export is the export of one connection.
func (s *sealed) export() *nbd.Export {
	e := &nbd.Export{Device: s.chain, ReadOnly: true, MultiConn: true, Description: "disk " + s.disk.name + " as nodes have it beneath them"}
	if !s.isCheckpoint() {
		return e
	}
	e.Description = "checkpoint " + s.record.title() + " of disk " + s.disk.name
	e.Contexts = map[string]nbd.ContextFunc{"dmsnap:changed": changedSince(s.chain, s.below[0].chain)}
	for _, b := range s.below {
		e.Contexts["qemu:dirty-bitmap:"+b.name] = changedSince(s.chain, b.chain)
	}
	return e
}

// mostExtents bounds the pieces that one call of a context looks at.
const mostExtents = 64

// changedSince is the context of what the layers of upper above lower hold; nil is the disk.
func changedSince(upper, lower *stack.Chain) nbd.ContextFunc {
	return func(off, n int64) (all []block.Extent, err error) {
		if err := block.CheckRange("extents", off, n, upper.Size()); err != nil {
			return nil, err
		}
		for pieces := 0; n > 0 && pieces < mostExtents; pieces++ {
			follow, stored := upper.StoredAbove(lower, off, n)
			e := block.Extent{Length: follow}
			if stored {
				e.Flags = snapshot.InCOW
			}
			all = block.AppendExtent(all, e)
			off, n = off+follow, n-follow
		}
		return all, nil
	}
}

// DiskOf returns the disk of an export, also of one that is not listed; "" without one.
func (f *Fleet) DiskOf(export string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.nodes[export]; n != nil {
		return n.disk.name
	}
	if f.state.Disks[export] != nil {
		return export
	}
	if d, _ := f.findSealed(export); d != nil {
		return d.name
	}
	return ""
}

// Layers returns what a checkpoint, or a node below its top, is made of.
func (f *Fleet) Layers(name string) (api.Layers, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	top := f.state.checkpoint(name)
	if n := f.state.Nodes[name]; n != nil {
		top = f.state.Layers[f.state.Layers[n.Top].Parent]
		if top == nil || top.Preserve {
			l := f.state.Layers[n.Top]
			return f.listLayers(l.Disk, top), nil
		}
	}
	if top == nil {
		return api.Layers{}, noSuchElement(name)
	}
	return f.listLayers(top.Disk, top), f.unusable(top)
}

// listLayers lists layers from the disk to top. mu is held.
func (f *Fleet) listLayers(disk string, top *layerRecord) api.Layers {
	d := f.state.Disks[disk]
	bottom := api.Layer{Name: disk, Source: d.Source, SizeBytes: d.Size}
	var list []api.Layer
	id := uint64(0)
	for ; top != nil; top = f.state.Layers[top.Parent] {
		if top.Preserve {
			id, bottom.Source = top.ID, ""
			break
		}
		l := f.layers[top.ID]
		e := api.Layer{Name: top.title(), URI: f.uri(fmt.Sprintf("%s@~%d", top.Node, top.ID)), SizeBytes: top.Size}
		if l.stack != nil {
			e.ChunkSectors, e.Exceptions = l.stack.Layout().ChunkSectors, l.stack.Len()
		}
		list = append([]api.Layer{e}, list...)
	}
	bottom.URI = f.uri(fmt.Sprintf("%s@~%d", disk, id))
	return api.Layers{Disk: disk, Layers: append([]api.Layer{bottom}, list...)}
}

// Seal makes the top of a node an unnamed checkpoint, unless nothing was written to it: all that the node shows now is in
// its Layers then.
func (f *Fleet) Seal(ctx context.Context, name string) (api.Layers, error) {
	f.mu.Lock()
	n, _, err := f.findNode(name)
	f.mu.Unlock()
	if err != nil {
		return api.Layers{}, err
	}
	v := n.dev.pin()
	if v == nil {
		return api.Layers{}, refuse(api.CodeNoSuchNode, "there is no node %q", name)
	}
	written := v.top.store.Len() > 0
	v.unpin()
	if written {
		if _, _, err := f.checkpoint(ctx, api.CheckpointRequest{Nodes: []string{name}}); err != nil {
			return api.Layers{}, err
		}
	}
	return f.Layers(name)
}
