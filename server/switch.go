package server

import (
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
	behind *block.Switch
	dirty  atomic.Bool // written since the last Flush began

	changes atomic.Uint64 // requests that changed it
}

// newSwitchDevice returns an export's device over dev.
func newSwitchDevice(dev block.Device) *switchDevice {
	behind := block.NewSwitch(dev)
	return &switchDevice{Forward: block.NewHeldForward(behind), behind: behind}
}

// replace makes the device that with returns the underlying device of the export, while no request is in flight. New
// requests wait meanwhile. When with fails, everything stays as it was.
func (s *switchDevice) replace(with func() (block.Device, error)) error {
	return s.behind.Replace(with)
}

// flushDirty makes durable what was written since the last Flush, if anything was.
func (s *switchDevice) flushDirty() error {
	if !s.dirty.Load() {
		return nil
	}
	return s.Flush()
}

// changed marks the device dirty when a change has been done: a mark set before it could be cleared by a Flush that does not
// cover the change.
func (s *switchDevice) changed() {
	s.changes.Add(1)
	s.dirty.Store(true)
}

// WriteAt writes.
func (s *switchDevice) WriteAt(p []byte, off int64) (n int, err error) {
	defer s.changed()
	return s.Forward.WriteAt(p, off)
}

// WriteDurableAt writes durably.
func (s *switchDevice) WriteDurableAt(p []byte, off int64) error {
	defer s.changes.Add(1)
	return s.Forward.WriteDurableAt(p, off)
}

// WriteLastAt writes durably, whatever failed before.
func (s *switchDevice) WriteLastAt(p []byte, off int64) error {
	defer s.changes.Add(1)
	return s.Forward.WriteLastAt(p, off)
}

func (s *switchDevice) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	defer s.changed()
	return s.Forward.ZeroAt(off, n, flags)
}

func (s *switchDevice) Discard(off, n int64) error {
	defer s.changed()
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
