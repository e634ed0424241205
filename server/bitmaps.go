package server

import (
	"errors"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
)

// bitmaps are the contexts of a snapshot's export that say where each of the other snapshots may differ from it.
func (s *Server) bitmaps(name string) map[string]nbd.ContextFunc {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]nbd.ContextFunc{}
	v := s.find(name)
	if v == nil || v.merge != nil {
		return all
	}
	for _, o := range s.snapshots {
		if o != v && o.merge == nil && o.dev.Size() == v.dev.Size() {
			all["qemu:dirty-bitmap:"+o.name] = differing(v.dev, o.dev)
		}
	}
	return all
}

// differing is the context of what one of two snapshots stores: elsewhere both show the origin. A write to the origin
// between the two looks is preserved in both, and only adds to what is reported.
//
// While one is merged that is not so: its export shows what the other one does not store yet.
func differing(a, b *switchDevice) nbd.ContextFunc {
	return func(off, n int64) (all []block.Extent, err error) {
		first, err := a.stored(off, n)
		if err != nil {
			return nil, err
		}
		second, err := b.stored(off, n)
		if err != nil {
			return nil, err
		}
		for len(first) > 0 && len(second) > 0 {
			x, y := &first[0], &second[0]
			k := min(x.Length, y.Length)
			all = block.AppendExtent(all, block.Extent{Length: k, Flags: x.Flags | y.Flags})
			if x.Length -= k; x.Length == 0 {
				first = first[1:]
			}
			if y.Length -= k; y.Length == 0 {
				second = second[1:]
			}
		}
		return all, nil
	}
}

// stored says what a snapshot stores. Of one whose merge has begun it is an error.
func (s *switchDevice) stored(off, n int64) ([]block.Extent, error) {
	dev := s.behind.Acquire()
	defer s.behind.Release()
	snap, ok := dev.(*snapshot.Snapshot)
	if !ok {
		return nil, errors.New("the snapshot is merged into the origin, and is compared with no other any more")
	}
	return snap.Changed(off, n)
}
