package writeback

import (
	"github.com/dmsnap/dmsnap/block"
)

// ReadAt reads the underlying device, overlaid with the dirty bytes. Bytes that were dirty when the read began may have
// been written and removed before the device was read: then it is read again.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if d.blocks.Load() == 0 {
		return d.dev.ReadAt(p, off)
	}
	d.mu.Lock()
	left := d.left
	d.mu.Unlock()
	for {
		n, err := d.dev.ReadAt(p, off)
		if err != nil {
			return n, err
		}
		d.mu.Lock()
		if d.left == left {
			d.lay(p, off)
			d.mu.Unlock()
			return n, nil
		}
		left = d.left
		d.mu.Unlock()
	}
}

// ReadCached reads the underlying device while nothing is dirty; else ReadAt has to.
func (d *Device) ReadCached(reads []block.Read) int {
	if d.blocks.Load() != 0 {
		return 0
	}
	return block.ReadCached(d.dev, reads)
}

// lay copies the dirty bytes in the range to p. d.mu is held.
func (d *Device) lay(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	end := off + int64(len(p))
	for at := off / blockSize; at <= (end-1)/blockSize; at++ {
		for _, b := range []*dirtyBlock{d.leaving[at], d.dirty[at]} { // the newer one last
			if b == nil {
				continue
			}
			b.runs(func(from, to int64) {
				start := at * blockSize
				from, to = max(from, off-start), min(to, end-start)
				if from < to {
					copy(p[start+from-off:], b.data[from:to])
				}
			})
		}
	}
}

// makeWay writes dirty bytes out before a change of n bytes at off that they overlap: they would replace it later.
func (d *Device) makeWay(op string, off, n int64) error {
	if d.blocks.Load() == 0 {
		return nil
	}
	if err := block.CheckRange(op, off, n, d.dev.Size()); err != nil || n == 0 {
		return err
	}
	if !d.Overlaps(off, n) {
		return nil
	}
	return d.WriteOut()
}

// WriteAt writes to the underlying device, after the dirty bytes that it overlaps.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.makeWay("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	return d.dev.WriteAt(p, off)
}

// WriteDurableAt writes durably to the underlying device, after the dirty bytes that it overlaps.
func (d *Device) WriteDurableAt(p []byte, off int64) error {
	if err := d.makeWay("write", off, int64(len(p))); err != nil {
		return err
	}
	return block.WriteDurable(d.dev, p, off)
}

// WriteLastAt is ErrUnsupported.
func (d *Device) WriteLastAt(p []byte, off int64) error { return block.ErrUnsupported }

// ZeroAt zeroes a range of the underlying device, after the dirty bytes in it were written.
func (d *Device) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := d.makeWay("zero", off, n); err != nil {
		return err
	}
	return d.forward.ZeroAt(off, n, flags)
}

// Discard discards a range of the underlying device, after the dirty bytes in it were written.
func (d *Device) Discard(off, n int64) error {
	if err := d.makeWay("discard", off, n); err != nil {
		return err
	}
	return d.forward.Discard(off, n)
}

// Extents returns the extents of the underlying device; dirty bytes are data. It writes nothing and waits for nothing.
func (d *Device) Extents(off, n int64) ([]block.Extent, error) {
	if d.blocks.Load() == 0 || n <= 0 {
		return d.forward.Extents(off, n)
	}
	if err := block.CheckRange("extents", off, n, d.dev.Size()); err != nil {
		return nil, err
	}
	d.mu.Lock()
	at, found := d.firstDirty(off/blockSize, (off+n-1)/blockSize)
	end := at
	for found && (d.dirty[end] != nil || d.leaving[end] != nil) {
		end++
	}
	d.mu.Unlock()
	switch {
	case !found:
		return d.forward.Extents(off, n)
	case at*blockSize > off:
		return d.forward.Extents(off, at*blockSize-off)
	}
	if end > (off+n-1)/blockSize { // the last block may end after the largest offset
		return []block.Extent{{Length: n}}, nil
	}
	return []block.Extent{{Length: end*blockSize - off}}, nil
}

// Flush makes durable all that was written before the call: it writes out, and flushes the underlying device. After a
// failed flush there, and after Finish discarded bytes, it fails permanently.
func (d *Device) Flush() error {
	if err := d.writeOutLocked(); err != nil {
		return err
	}
	if failed := d.failed.Load(); failed != nil {
		return *failed
	}
	if err := d.dev.Flush(); err != nil {
		d.failed.CompareAndSwap(nil, &err)
	}
	// A concurrent flush may have failed and have got the report of what this one is responsible for.
	if failed := d.failed.Load(); failed != nil {
		return *failed
	}
	return nil
}
