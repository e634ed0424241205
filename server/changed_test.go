package server

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestChangingConformance(t *testing.T) {
	blocktest.Run(t, func(*testing.T) block.Device {
		return &changing{block.NewForward(block.NewMemory(1 << 20)), func(int64, int64) {}}
	})
}

func TestChangingPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(t *testing.T, dev block.Device) block.Device {
		return &changing{block.NewForward(dev), func(int64, int64) {}}
	})
}
