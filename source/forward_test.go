package source

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// TestPassesOn: a disk passes on what the device below it can do.
func TestPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device { return &Disk{Forward: block.NewForward(dev)} })
}
