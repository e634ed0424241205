package server

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestSwitchDevicePassesOn(t *testing.T) {
	blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device { return newSwitchDevice(dev) })
	t.Run("after a switch", func(t *testing.T) {
		blocktest.RunForward(t, func(t *testing.T, dev block.Device) block.Device {
			s := newSwitchDevice(block.NewMemory(1 << 20))
			if err := s.replace(func() (block.Device, error) { return dev, nil }); err != nil {
				t.Fatal(err)
			}
			return s
		})
	})
}

// What is written by a fallback has to be flushed as well.
func TestSwitchDeviceIsDirtyAfterFallbacks(t *testing.T) {
	for name, change := range map[string]func(dev block.Device) error{
		"write":   func(dev block.Device) error { _, err := dev.WriteAt([]byte("x"), 0); return err },
		"zero":    func(dev block.Device) error { return block.Zero(dev, 0, 512, 0) },
		"discard": func(dev block.Device) error { return block.Discard(dev, 0, 512) },
	} {
		s := newSwitchDevice(blocktest.Plain(block.NewMemory(1 << 20)))
		if err := change(s); err != nil || !s.dirty.Load() {
			t.Errorf("%s: %v, dirty %v", name, err, s.dirty.Load())
		}
		if err := s.flushDirty(); err != nil || s.dirty.Load() {
			t.Errorf("%s, flushed: %v, dirty %v", name, err, s.dirty.Load())
		}
	}
}
