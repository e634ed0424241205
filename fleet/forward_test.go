package fleet

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// TestPassesOn: what wraps a disk passes on what the disk can do. A node has a COW device of its own, so that it passes on what
// reads.
func TestPassesOn(t *testing.T) {
	for name, c := range map[string]struct {
		wrap    func(t *testing.T, dev block.Device) block.Device
		changes []string
	}{
		"ground":      {wrap: func(_ *testing.T, dev block.Device) block.Device { return newGround(dev) }},
		"first bytes": {func(_ *testing.T, dev block.Device) block.Device { return prefix{block.NewForward(dev), dev.Size()} }, []string{"Refresh"}},
		"layer": {func(_ *testing.T, dev block.Device) block.Device {
			return &layerDevice{Forward: block.NewForward(dev), layer: &layer{disk: &disk{}}}
		}, []string{"Allocate"}},
		"node": {nodeOver, []string{"WriteAt", "WriteDurableAt", "WriteLastAt", "BeginFlush", "BeginRead", "ZeroAt", "Allocate", "Discard", "Flush",
			"DropCache", "Refresh", "Grow", "CanGrow", "Identity"}},
	} {
		t.Run(name, func(t *testing.T) { blocktest.RunForward(t, c.wrap, c.changes...) })
	}
}

// nodeOver returns the device of a node whose snapshot has dev as its origin.
func nodeOver(t *testing.T, dev block.Device) block.Device {
	snap, err := snapshot.NewOrigin(dev).Attach(block.NewMemory(1<<20), snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	v := &view{snap: snap, release: func(v *view) {
		if closed = true; v.snap.Close() != nil {
			t.Error("the snapshot can't be closed")
		}
	}}
	v.refs.Store(1)
	d := newNodeDevice(&Fleet{}, "node", dev.Size())
	d.view.Store(v)
	t.Cleanup(func() {
		if d.detach(); !closed {
			t.Error("a request still uses the view")
		}
	})
	return d
}

// TestNodeCountsChanges: a node has something to flush after each way to change it, but those that are durable when they return.
func TestNodeCountsChanges(t *testing.T) {
	p := blocktest.Pattern(4096, 2)
	for name, c := range map[string]struct {
		change func(dev block.Device) error
		dirty  bool
	}{
		"write":         {func(dev block.Device) error { _, err := dev.WriteAt(p, 0); return err }, true},
		"zero":          {func(dev block.Device) error { return block.Zero(dev, 0, 4096, 0) }, true},
		"discard":       {func(dev block.Device) error { return block.Discard(dev, 0, 4096) }, true},
		"durable write": {func(dev block.Device) error { return block.WriteDurable(dev, p, 0) }, false},
		"last write":    {func(dev block.Device) error { return block.WriteLast(dev, p, 0) }, false},
	} {
		dev := nodeOver(t, block.NewMemory(64<<10)).(*nodeDevice)
		dev.view.Load().clean.Store(true)
		if err := c.change(dev); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if dev.changes.Load() != 1 || dev.dirty() != c.dirty {
			t.Errorf("%s: %d changes, to be flushed: %v", name, dev.changes.Load(), dev.dirty())
		}
	}
}
