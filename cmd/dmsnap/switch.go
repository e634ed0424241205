package main

import (
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A switchable is the device of a snapshot's export: the snapshot, and from the beginning of its live merge
// on the origin, which shows the same content at that moment. Clients notice nothing.
//
// It passes on all that the device behind it can do. Its methods may be called concurrently.
type switchable struct {
	block.Forward
	behind switchedDevice
	dirty  atomic.Bool // written since the last Flush began
}

// switchedDevice is the block.Holder of a switchable: each call holds the lock for reading.
type switchedDevice struct {
	mu  sync.RWMutex // held for writing by become
	dev block.Device
}

func (d *switchedDevice) Acquire() block.Device {
	d.mu.RLock()
	return d.dev
}

func (d *switchedDevice) Release() { d.mu.RUnlock() }

// newSwitchable returns an export's device with dev behind it.
func newSwitchable(dev block.Device) *switchable {
	s := &switchable{behind: switchedDevice{dev: dev}}
	s.Forward = block.NewHeldForward(&s.behind)
	return s
}

// become replaces the device behind by the one that with returns, while no request is under way. New
// requests wait meanwhile; when with fails, everything stays as it was.
func (s *switchable) become(with func() (block.Device, error)) error {
	s.behind.mu.Lock()
	defer s.behind.mu.Unlock()
	dev, err := with()
	if err == nil {
		s.behind.dev = dev
	}
	return err
}

// flushDirty makes durable what was written since the last Flush, if anything was.
func (s *switchable) flushDirty() error {
	if !s.dirty.Load() {
		return nil
	}
	return s.Flush()
}

// WriteAt marks the device dirty when the write has been done: marked earlier, the mark could be taken
// away by a Flush that does not cover the write.
func (s *switchable) WriteAt(p []byte, off int64) (int, error) {
	defer s.dirty.Store(true)
	return s.Forward.WriteAt(p, off)
}

func (s *switchable) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	defer s.dirty.Store(true)
	return s.Forward.ZeroAt(off, n, flags)
}

func (s *switchable) Discard(off, n int64) error {
	defer s.dirty.Store(true)
	return s.Forward.Discard(off, n)
}

func (s *switchable) Flush() error {
	s.dirty.Store(false)
	return s.Forward.Flush()
}

// Changed is the context dmsnap:changed: what lives in the COW device. Of an export that has become the
// origin nothing does.
func (s *switchable) Changed(off, n int64) ([]block.Extent, error) {
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
