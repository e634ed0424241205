package stack

import (
	"fmt"
	"iter"

	"github.com/dmsnap/dmsnap/block"
)

// A place is what holds some bytes of a chain.
type place struct {
	dev    block.Device // nil: nothing, they are zeros
	at     int64        // byte of dev
	follow int64        // bytes
	part   *part        // of the layer; nil: it is the base, or nothing
}

// find returns the place of the byte at off and of as many of the n ≥ 1 bytes from it on as follow there. All are inside c.
func (c *Chain) find(off, n int64) place {
	for _, s := range *c.index.Load() {
		p, at, follow := s.find(off, n)
		if n = follow; p == nil {
			continue
		}
		if off >= p.size { // the rest of the last chunk, of a layer that is shorter
			return place{follow: n}
		}
		return place{p.layer.cow, at, min(n, p.size-off), p}
	}
	if off >= c.baseSize {
		return place{follow: n}
	}
	return place{dev: c.base, at: off, follow: min(n, c.baseSize-off)}
}

// Place returns the device that holds the byte at off, at which byte, and how many of the next n ≥ 1 bytes follow it there.
// stored: it is the COW device of a layer. No device (nil): they are zeros. The range is inside c.
//
// A caller that reads the device itself does not notice that a layer's store lost data (see Layer.SetDurable).
func (c *Chain) Place(off, n int64) (dev block.Device, at, follow int64, stored bool) {
	p := c.find(off, n)
	return p.dev, p.at, p.follow, p.part != nil
}

// ReadAt reads what the topmost layers hold. An error names the byte of the disk.
func (c *Chain) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), c.size); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		at := c.find(off, int64(len(p)-done))
		to := p[done : done+int(at.follow)]
		if at.dev == nil {
			clear(to)
		} else if err := at.read(to); err != nil {
			return done, block.NewReadError(off, at.follow, at.String(), err)
		}
		done, off = done+int(at.follow), off+at.follow
	}
	return done, nil
}

// read fills p from the device.
func (p *place) read(to []byte) error {
	if _, err := p.dev.ReadAt(to, p.at); err != nil || p.part == nil {
		return err
	}
	return p.part.layer.check(p.at, int64(len(to)))
}

// String is for errors.
func (p place) String() string {
	if p.part == nil {
		return "the base"
	}
	return fmt.Sprintf("byte %d of layer %d", p.at, p.part.depth+1)
}

// BeginRead begins to read a range from the disks.
func (c *Chain) BeginRead(off, n int64) {
	if block.CheckRange("read", off, n, c.size) != nil {
		return
	}
	for pieces := 0; n > 0 && pieces < mostPieces; pieces++ {
		p := c.find(off, n)
		if p.dev != nil {
			block.BeginRead(p.dev, p.at, p.follow)
		}
		off, n = off+p.follow, n-p.follow
	}
}

// mostPieces bounds the pieces that one call of Extents or BeginRead looks at.
const mostPieces = 64

// Extents reports the holes of the devices that hold each piece; see [block.Extenter]. What nothing holds is a hole.
func (c *Chain) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, c.size); err != nil {
		return nil, err
	}
	var all []block.Extent
	for pieces := 0; n > 0 && pieces < mostPieces; pieces++ {
		p := c.find(off, n)
		known := []block.Extent{{Length: p.follow, Flags: block.Hole | block.ReadsZero}}
		if p.dev != nil {
			var err error
			if known, err = block.Extents(p.dev, p.at, p.follow); err != nil {
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

// StoredSince yields the ranges of the n bytes at off that the layers above lower hold, in ascending order, joined where
// they are adjacent. Everything else in the range shows what lower shows, or zeros where lower has ended. c was made of
// lower by With; nil is the base. What lies outside of c is ignored.
func (c *Chain) StoredSince(lower *Chain, off, n int64) iter.Seq[block.Range] {
	depth := 0
	if lower != nil {
		depth = len(lower.layers)
	}
	return func(yield func(block.Range) bool) {
		var last block.Range
		end := min(off+n, c.size)
		for at := max(off, 0); at < end; {
			follow, stored := c.storedAbove(depth, at, end-at)
			if stored && last.Length > 0 && last.Off+last.Length == at {
				last.Length += follow
			} else if stored {
				if last.Length > 0 && !yield(last) {
					return
				}
				last = block.Range{Off: at, Length: follow}
			}
			at += follow
		}
		if last.Length > 0 {
			yield(last)
		}
	}
}

// StoredAbove reports whether a layer of c above lower holds the byte at off, and for how many of the n ≥ 1 bytes from it on the
// answer is the same at least. c was made of lower by With; nil is the base. The range is inside c.
func (c *Chain) StoredAbove(lower *Chain, off, n int64) (follow int64, stored bool) {
	depth := 0
	if lower != nil {
		depth = len(lower.layers)
	}
	return c.storedAbove(depth, off, n)
}

// storedAbove reports whether a layer from depth on holds the byte at off, and for how many of the n ≥ 1 bytes from it on
// the answer is the same.
func (c *Chain) storedAbove(depth int, off, n int64) (follow int64, stored bool) {
	for _, s := range *c.index.Load() {
		if s.top() < depth {
			break
		}
		p, _, k := s.find(off, n)
		n = k
		switch {
		case p == nil:
		case p.depth < depth || off >= p.size: // no newer one of the segment has it, and the other segments are below
			return n, false
		default:
			return min(n, p.size-off), true
		}
	}
	return n, false
}
