package fleet

import (
	"cmp"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"

	"github.com/dmsnap/dmsnap/server/api"
)

// openAll opens what the state names: disks, layers side by side, then the chains bottom-up, then the nodes. What can't be
// opened is kept with the reason. Nothing else uses the fleet yet.
func (f *Fleet) openAll() {
	for _, r := range sorted(f.state.Disks) {
		d := f.openDisk(r)
		f.disks[r.Name] = d
		if d.err != nil {
			f.logError("disk "+r.Name, d.err)
		}
	}
	f.openLayers()
	f.buildChains()
	for _, r := range sorted(f.state.Disks) {
		if d := f.disks[r.Name]; r.Writable && d.err == nil {
			if err := f.openWritable(d, r.Merging); err != nil {
				d.exportErr = err
				f.logError("disk "+r.Name+" is not exported", err)
			}
		}
	}
	for _, r := range sorted(f.state.Nodes) {
		n := f.openNode(r)
		f.nodes[r.Name] = n
		if n.err != nil {
			f.logError("node "+r.Name, n.err)
		}
	}
}

func (f *Fleet) logError(what string, err error) {
	f.log.Event(slog.LevelError, fmt.Sprintf("%s: %v", what, err), what, err)
}

// openLayers opens the files of all layers.
func (f *Fleet) openLayers() {
	var mu sync.Mutex
	var all sync.WaitGroup
	work := make(chan *layerRecord)
	for range 2 * runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for r := range work {
				l := f.openLayer(f.disks[r.Disk], r)
				mu.Lock()
				f.layers[r.ID] = l
				mu.Unlock()
			}
		})
	}
	for _, r := range f.state.Layers {
		work <- r
	}
	close(work)
	all.Wait()
}

// buildChains makes the chain of each sealed layer, parents before children.
func (f *Fleet) buildChains() {
	for _, r := range f.state.bottomUp() {
		l, d := f.layers[r.ID], f.disks[r.Disk]
		if r.Preserve && l.err == nil && d.err == nil {
			l.err = f.openGeneration(d, r, l)
		}
		if !r.Sealed || l.err != nil || r.Preserve {
			continue
		}
		b, err := f.baseAt(d, r.Parent)
		if err != nil {
			continue // the layers over it are refused by unusable
		}
		l.seal(b.chain, r.Size)
		if r.Complete {
			l.completed()
			continue
		}
		f.unsettled[l.id] = l
		if lost := l.stack.Len() < r.Exceptions; lost {
			text := fmt.Sprintf("checkpoint %s was not durable when the last process ended: it has what had been flushed", r.title())
			f.log.Event(slog.LevelWarn, text, "checkpoint not complete", nil, slog.String("checkpoint", r.title()))
		}
	}
}

// bottomUp returns the layers, parents before children.
func (s *state) bottomUp() []*layerRecord {
	depth := make(map[uint64]int, len(s.Layers))
	var of func(id uint64) int
	of = func(id uint64) int {
		l := s.Layers[id]
		if l == nil {
			return 0
		}
		if depth[id] == 0 {
			depth[id] = of(l.Parent) + 1
		}
		return depth[id]
	}
	list := sorted(s.Layers)
	slices.SortStableFunc(list, func(a, b *layerRecord) int { return cmp.Compare(of(a.ID), of(b.ID)) })
	return list
}

// openNode attaches the top of a node, and exports it.
func (f *Fleet) openNode(r *nodeRecord) *node {
	top := f.state.Layers[r.Top]
	n := &node{name: r.Name, disk: f.disks[top.Disk]}
	if n.err = f.unusable(top); n.err != nil {
		return n
	}
	b, err := f.baseAt(n.disk, top.Parent)
	if err == nil {
		err = f.attachNode(n, b, top)
	}
	n.err = err
	return n
}

func (f *Fleet) attachNode(n *node, b base, top *layerRecord) error {
	v, err := f.newView(n.name, b, f.layers[top.ID], top.Size)
	if err != nil {
		return err
	}
	if err := v.snap.CheckOrigin(); err != nil {
		v.unpin()
		return refuse(api.CodeOriginTooSmall, "%v", err)
	}
	dev := newNodeDevice(f, n.name, top.Size)
	dev.view.Store(v)
	n.dev = dev
	return f.export(n)
}
