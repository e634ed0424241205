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
// It forwards all that the device behind it can do. Its methods may be called concurrently.
type switchable struct {
	mu    sync.RWMutex // held for reading by each request, for writing by become
	dev   block.Device
	dirty atomic.Bool // written since the last Flush began
}

// become replaces the device behind by the one that with returns, while no request is under way. New
// requests wait meanwhile; when with fails, everything stays as it was.
func (s *switchable) become(with func() (block.Device, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	dev, err := with()
	if err == nil {
		s.dev = dev
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

func (s *switchable) ReadAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.dev.ReadAt(p, off)
}

// WriteAt marks the device dirty when the write has been done: marked earlier, the mark could be taken
// away by a Flush that does not cover the write.
func (s *switchable) WriteAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	defer s.dirty.Store(true)
	return s.dev.WriteAt(p, off)
}

func (s *switchable) WriteDurableAt(p []byte, off int64) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return block.WriteDurable(s.dev, p, off)
}

func (s *switchable) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	defer s.dirty.Store(true)
	return block.Zero(s.dev, off, n, flags)
}

func (s *switchable) Discard(off, n int64) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	defer s.dirty.Store(true)
	return block.Discard(s.dev, off, n)
}

func (s *switchable) Flush() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.dirty.Store(false)
	return s.dev.Flush()
}

func (s *switchable) Extents(off, n int64) ([]block.Extent, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return block.Extents(s.dev, off, n)
}

// Changed is the context dmsnap:changed: what lives in the COW device. Of an export that has become the
// origin nothing does.
func (s *switchable) Changed(off, n int64) ([]block.Extent, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if snap, ok := s.dev.(*snapshot.Snapshot); ok {
		return snap.Changed(off, n)
	}
	if err := block.CheckRange("extents", off, n, s.dev.Size()); err != nil {
		return nil, err
	}
	return []block.Extent{{Length: n}}, nil
}

func (s *switchable) Size() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.dev.Size()
}

func (s *switchable) BlockSize() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return block.BlockSize(s.dev)
}
