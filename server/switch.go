package server

import (
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A switchDevice is the device of a snapshot's export: the snapshot, and from the start of its live merge on the
// origin, which shows the same content at that moment. Clients see no difference.
//
// It passes on all that the device behind it can do. Its methods may be called concurrently.
type switchDevice struct {
	block.Forward
	behind switchedDevice
	dirty  atomic.Bool // written since the last Flush began
}

// switchedDevice is the block.Holder of a switchDevice: each call holds the lock for reading.
type switchedDevice struct {
	mu  sync.RWMutex // held for writing by replace
	dev block.Device
}

func (d *switchedDevice) Acquire() block.Device {
	d.mu.RLock()
	return d.dev
}

func (d *switchedDevice) Release() { d.mu.RUnlock() }

// newSwitchDevice returns an export's device over dev.
func newSwitchDevice(dev block.Device) *switchDevice {
	s := &switchDevice{behind: switchedDevice{dev: dev}}
	s.Forward = block.NewHeldForward(&s.behind)
	return s
}

// replace makes the device that with returns the underlying device of the export, while no request is in flight. New
// requests wait meanwhile. When with fails, everything stays as it was.
func (s *switchDevice) replace(with func() (block.Device, error)) error {
	s.behind.mu.Lock()
	defer s.behind.mu.Unlock()
	dev, err := with()
	if err == nil {
		s.behind.dev = dev
	}
	return err
}

// flushDirty makes durable what was written since the last Flush, if anything was.
func (s *switchDevice) flushDirty() error {
	if !s.dirty.Load() {
		return nil
	}
	return s.Flush()
}

// WriteAt marks the device dirty when the write has been done: a mark set before it could be cleared by a Flush that
// does not cover the write.
func (s *switchDevice) WriteAt(p []byte, off int64) (n int, err error) {
	defer s.dirty.Store(true)
	return s.Forward.WriteAt(p, off)
}

func (s *switchDevice) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	defer s.dirty.Store(true)
	return s.Forward.ZeroAt(off, n, flags)
}

func (s *switchDevice) Discard(off, n int64) error {
	defer s.dirty.Store(true)
	return s.Forward.Discard(off, n)
}

func (s *switchDevice) Flush() error {
	s.dirty.Store(false)
	return s.Forward.Flush()
}

// Changed is the context dmsnap:changed: what is in the COW device. Of an export that has become the origin
// nothing is.
func (s *switchDevice) Changed(off, n int64) ([]block.Extent, error) {
	dev := s.behind.Acquire()
	defer s.behind.Release()
	if snap, ok := dev.(*snapshot.Snapshot); ok {
		return snap.Changed(off, n)
	}
	if err := block.CheckRange("extents", off, n, dev.Size()); err != nil {
		return nil, err
	}
	return []block.Extent{{Length: n}}, nil
}
