package fleet

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// TestPassesOn: what wraps a disk passes on what the disk can do.
func TestPassesOn(t *testing.T) {
	for name, c := range map[string]struct {
		wrap    func(dev block.Device) block.Device
		changes []string
	}{
		"ground":      {wrap: func(dev block.Device) block.Device { return newGround(dev) }},
		"first bytes": {func(dev block.Device) block.Device { return prefix{block.NewForward(dev), dev.Size()} }, []string{"Refresh"}},
		"layer": {func(dev block.Device) block.Device {
			return &layerDevice{Forward: block.NewForward(dev), layer: &layer{disk: &disk{}}}
		}, []string{"Allocate"}},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device { return c.wrap(dev) }, c.changes...)
		})
	}
}
