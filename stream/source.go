package stream

import (
	"fmt"
	"iter"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/store"
)

// A Source is what can be sent: two devices, and where they may differ.
type Source struct {
	kind     Kind
	old, new block.Device // old is nil for a whole disk
	changed  func() iter.Seq2[diff.Extent, error]
}

// Between is what the view of one store has and that of another has not. Both are of one origin; a nil store stands for
// the origin itself. Nothing may write to the devices while the source is used, nor close them. Errors are those of
// diff.Between.
func Between(origin block.Device, old, new *store.Store) (*Source, error) {
	d, err := diff.Between(origin, old, new)
	if err != nil {
		return nil, err
	}
	was, is := d.Views()
	return &Source{Delta, was, is, func() iter.Seq2[diff.Extent, error] {
		return func(yield func(diff.Extent, error) bool) {
			for e := range d.Extents() {
				if !yield(e, nil) {
					return
				}
			}
		}
	}}, nil
}

// Of is what new has and old has not, of two devices of one size: they may differ where changed says so, by the lowest bit of
// the flags of extents, as an NBD server does in a context of changed blocks. It may stop early, but not before the first byte.
// Nothing may write to the devices while the source is used.
func Of(old, new block.Device, changed func(off, n int64) ([]block.Extent, error)) *Source {
	return &Source{Delta, old, new, func() iter.Seq2[diff.Extent, error] {
		return extentsOf(new.Size(), changed, func(e block.Extent) bool { return e.Flags&1 != 0 })
	}}
}

// extentsOf yields those of a disk's extents that are wanted.
func extentsOf(size int64, extents func(off, n int64) ([]block.Extent, error), wanted func(block.Extent) bool) iter.Seq2[diff.Extent, error] {
	return func(yield func(diff.Extent, error) bool) {
		for off := int64(0); off < size; {
			list, err := extents(off, size-off)
			if err == nil && len(list) == 0 {
				err = fmt.Errorf("no extents at byte %d", off)
			}
			if err != nil {
				yield(diff.Extent{}, err)
				return
			}
			for _, e := range list {
				if wanted(e) && !yield(diff.Extent{Off: off, Length: e.Length}, nil) {
					return
				}
				off += e.Length
			}
		}
	}
}

// Whole is a disk as it is. Nothing may write to it while the source is used.
func Whole(dev block.Device) *Source {
	return &Source{Disk, nil, dev, func() iter.Seq2[diff.Extent, error] {
		return extentsOf(dev.Size(), func(off, n int64) ([]block.Extent, error) { return block.Extents(dev, off, n) },
			func(e block.Extent) bool { return e.Flags&block.ReadsZero == 0 })
	}}
}

// Kind says what is sent.
func (s *Source) Kind() Kind { return s.kind }

// Size returns the size of the disk in bytes.
func (s *Source) Size() int64 { return s.new.Size() }
