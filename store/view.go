package store

import (
	"fmt"
	"math"

	"github.com/dmsnap/dmsnap/block"
)

// A View is what a snapshot shows: the chunks of a store over an origin, without an engine. It is a device that can only
// be read.
//
// Nothing may write to either device, or add exceptions to the store, while a View is read: it synchronises nothing.
// Reads may be concurrent. Chunks may be smaller than the blocks of the devices, as nothing is written.
type View struct {
	origin block.Device
	store  *Store
	size   int64
}

var _ block.Device = (*View)(nil)

// NewView returns the view of s over origin. Without a store (nil) it shows the origin itself. Without an origin (nil)
// it shows only what is stored, on a disk of the largest possible size.
//
// Errors: that of a store which is marked invalid or failed, since exceptions are missing then; ErrOriginTooSmall.
func NewView(origin block.Device, s *Store) (*View, error) {
	v := &View{origin, s, math.MaxInt64}
	if origin != nil {
		v.size = origin.Size()
	}
	if s == nil {
		return v, nil
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if err := s.CheckOrigin(v.size); err != nil {
		return nil, err
	}
	return v, nil
}

// Size is that of the origin in bytes.
func (v *View) Size() int64 { return v.size }

// Store returns the store, or nil.
func (v *View) Store() *Store { return v.store }

// Place returns the device that holds the byte at off of the disk, at which byte, and how many of the next n ≥ 1 bytes
// follow it there. stored: it is the COW device.
func (v *View) Place(off, n int64) (dev block.Device, at, follow int64, stored bool) {
	if v.store == nil {
		return v.origin, off, n, false
	}
	l := v.store.layout
	first, last := l.OriginChunkAt(off), l.OriginChunkAt(off+n-1)
	new, count, stored := v.store.LookupRun(first, uint64(last-first)+1)
	start, end := l.OriginRange(first, count, off+n)
	if !stored {
		return v.origin, off, end - off, false
	}
	return v.store.dev, l.COWOffset(new) + off - start, end - off, true
}

// ReadAt reads what the snapshot shows. An error names the byte of the disk.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), v.size); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		dev, at, n, stored := v.Place(off, int64(len(p)-done))
		if dev == nil {
			return done, fmt.Errorf("read %d bytes of the disk at byte %d: they are not stored, and there is no origin", n, off)
		}
		if _, err := dev.ReadAt(p[done:done+int(n)], at); err != nil {
			where := "the origin"
			if stored {
				where = fmt.Sprintf("byte %d of the COW device", at)
			}
			return done, block.NewReadError(off, n, where, err)
		}
		done, off = done+int(n), off+n
	}
	return done, nil
}

// BeginRead begins to read a range from the devices that hold it; see [block.EarlyReader].
func (v *View) BeginRead(off, n int64) {
	if block.CheckRange("read", off, n, v.size) != nil {
		return
	}
	for pieces := 0; n > 0 && pieces < viewPieces; pieces++ {
		dev, at, follow, _ := v.Place(off, n)
		if dev != nil {
			block.BeginRead(dev, at, follow)
		}
		off, n = off+follow, n-follow
	}
}

// viewPieces bounds the pieces that one call of Extents or BeginRead looks at.
const viewPieces = 64

// Extents reports the holes of the devices that hold each piece; see [block.Extenter].
func (v *View) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, v.size); err != nil {
		return nil, err
	}
	var all []block.Extent
	for pieces := 0; n > 0 && pieces < viewPieces; pieces++ {
		dev, at, follow, _ := v.Place(off, n)
		known := []block.Extent{{Length: follow}} // without an origin: reading it is an error
		if dev != nil {
			var err error
			if known, err = block.Extents(dev, at, follow); err != nil {
				return nil, err
			}
		}
		for _, e := range known {
			all = block.AppendExtent(all, e)
			off, n = off+e.Length, n-e.Length
		}
	}
	return all, nil
}

// WriteAt returns block.ErrReadOnly.
func (v *View) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// Flush does nothing: there is nothing to make durable.
func (v *View) Flush() error { return nil }
