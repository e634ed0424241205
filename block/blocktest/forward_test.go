package blocktest_test

import (
	"reflect"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// swapped is a device whose underlying device may be replaced.
type swapped struct {
	block.Forward
	mu  sync.RWMutex
	dev block.Device
}

func newSwapped(dev block.Device) *swapped {
	s := &swapped{dev: dev}
	s.Forward = block.NewHeldForward(s)
	return s
}

func (s *swapped) Acquire() block.Device {
	s.mu.RLock()
	return s.dev
}

func (s *swapped) Release() { s.mu.RUnlock() }

func TestForwardPassesOn(t *testing.T) {
	for name, c := range map[string]struct {
		wrap    func(dev block.Device) block.Device
		changes []string
	}{
		"forward":  {wrap: func(dev block.Device) block.Device { return block.NewForward(dev) }},
		"held":     {wrap: func(dev block.Device) block.Device { return newSwapped(dev) }},
		"twice":    {wrap: func(dev block.Device) block.Device { return newSwapped(block.NewForward(dev)) }},
		"recorder": {wrap: func(dev block.Device) block.Device { return new(blocktest.Log).Record("A", dev) }, changes: []string{"ReadCached"}},
		"faulty":   {wrap: func(dev block.Device) block.Device { return blocktest.NewFaulty(dev, nil) }, changes: []string{"ReadCached"}},
		"page cache": {
			wrap:    func(dev block.Device) block.Device { return blocktest.NewPageCache(dev, nil).Open() },
			changes: []string{"ReadCached", "WriteAt", "WriteDurableAt", "WriteLastAt", "BeginFlush", "ZeroAt", "Discard", "Extents", "DropCache"},
		},
		"cache is kept": {wrap: block.KeepCache, changes: []string{"DropCache"}},
		"quota": {
			wrap:    func(dev block.Device) block.Device { return blocktest.NewQuota(dev, 1<<30, true) },
			changes: []string{"Allocate", "Discard"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device { return c.wrap(dev) }, c.changes...)
		})
	}
}

// While a call is under way the underlying device is not replaced.
func TestHeldForwardHolds(t *testing.T) {
	lower := blocktest.NewFaulty(block.NewMemory(4096), nil)
	s := newSwapped(lower)
	h := lower.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Flush })
	defer h.Release()
	done := make(chan error, 1)
	go func() { done <- s.Flush() }()
	<-h.Reached()
	if s.mu.TryLock() {
		t.Error("the device could have been replaced under a call")
	}
	h.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !s.mu.TryLock() {
		t.Error("the device is not released after a call")
	}
}

// RunForward refuses names that it does not check, so it must check each method of Forward.
func TestForwardIsCheckedWhole(t *testing.T) {
	var all []string
	for m := range reflect.TypeFor[block.Forward]().Methods() {
		all = append(all, m.Name)
	}
	blocktest.RunForward(t, nil, all...)
}
