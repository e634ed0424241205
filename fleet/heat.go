package fleet

import (
	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
)

// HeatMap returns what of a disk is in an element's own layer, and where its export was written, in at most 512 parts. Of a
// disk nothing is in a layer.
func (f *Fleet) HeatMap(name string, parts int) (api.HeatMap, error) {
	size, changed, observed, err := f.ownLayer(name)
	if err != nil {
		return api.HeatMap{}, err
	}
	return figures.HeatMap(name, size, parts, changed, observed)
}

// ownLayer returns the size of an element, what its own layer holds of it, and its observed export, if it has one.
func (f *Fleet) ownLayer(name string) (size int64, changed func(off, n int64) ([]block.Extent, error), o *activity.Device, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.nodes[name]; n != nil {
		if n.dev == nil {
			return 0, nil, nil, refuse(api.CodeDiskFailed, "node %q can't be used: %v", name, n.err)
		}
		return n.dev.Size(), n.dev.Changed, n.observed.Load(), nil
	}
	if r := f.state.checkpoint(name); r != nil {
		b, err := f.baseAt(f.disks[r.Disk], r.ID)
		if err != nil {
			return 0, nil, nil, err
		}
		below, err := f.baseAt(f.disks[r.Disk], r.Parent)
		if err != nil {
			return 0, nil, nil, err
		}
		return r.Size, storedIn(b.chain, below.chain), nil, nil
	}
	if d := f.disks[name]; d != nil {
		return d.size, figures.Nothing, d.observed.Load(), nil
	}
	return 0, nil, nil, noSuchElement(name)
}

// storedIn returns the map of what the layers of a chain above another hold.
func storedIn(c, lower *stack.Chain) func(off, n int64) ([]block.Extent, error) {
	return func(off, n int64) (list []block.Extent, err error) {
		const most = 64 // extents that one call returns
		at := off
		for r := range c.StoredSince(lower, off, n) {
			if r.Off > at {
				list = append(list, block.Extent{Length: r.Off - at})
			}
			list = append(list, block.Extent{Length: r.Length, Flags: snapshot.InCOW})
			at = r.Off + r.Length
			if len(list) >= most {
				return list, nil
			}
		}
		if at < off+n {
			list = append(list, block.Extent{Length: off + n - at})
		}
		return list, nil
	}
}
