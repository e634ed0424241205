package qcow2

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
)

// A Disk is a virtual disk of an image: its present content, or an internal snapshot. It is a block.Device that can only
// be read.
type Disk struct {
	image *Image
	l1    table
	size  int64
	name  string // of the snapshot, for the identity
}

var _ interface {
	block.Device
	block.Extenter
	block.Identifier
	block.BlockSizer
	block.Zeroer
	block.Discarder
	block.DurableWriter
	block.Allocator
} = (*Disk)(nil)

// Size returns the size of the disk in bytes, a multiple of 512.
func (d *Disk) Size() int64 { return d.size }

// BlockSize returns 512.
func (d *Disk) BlockSize() int { return block.SectorSize }

// Identity names the disk by the identity of the image's file: it is another disk than the file's bytes.
func (d *Disk) Identity() string {
	id := block.Identity(d.image.file)
	if id == "" {
		return ""
	}
	return fmt.Sprintf("qcow2 %s snapshot %q", id, d.name)
}

// ReadAt reads from the disk. An *ondisk.CorruptError names what is damaged, and the byte of the disk; what was read
// before it is good.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		pc, err := d.place(off+int64(done), int64(len(p)-done))
		if err == nil {
			err = d.read(p[done:][:pc.n], pc, off+int64(done))
		}
		if err != nil {
			return done, err
		}
		done += int(pc.n)
	}
	return done, nil
}

// read fills p with the content of a piece, which begins at byte off of the disk.
func (d *Disk) read(p []byte, pc piece, off int64) error {
	switch pc.kind {
	case zeros:
		clear(p)
	case unallocated:
		if d.image.backing == nil {
			clear(p)
			return nil
		}
		return readPadded(d.image.backing, p, off, "the backing file")
	case data:
		return readPadded(d.image.content, p, pc.host, "the image")
	case compressed:
		b, err := d.image.cluster(pc.entry, off)
		if err != nil {
			return err
		}
		copy(p, b[pc.in:])
	}
	return nil
}

// readPadded reads from dev; what is behind its end reads as zeros.
func readPadded(dev block.Device, p []byte, off int64, what string) error {
	n := max(0, min(int64(len(p)), dev.Size()-off))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	if _, err := dev.ReadAt(p[:n], off); err != nil {
		return fmt.Errorf("%d bytes at byte %d of %s: %w", n, off, what, err)
	}
	return nil
}

// Bounds on what one call of Extents does.
const (
	extentPieces = 256
)

// Extents reports where the disk is known to be zeros and where the image has no space for it; see block.Extenter.
func (d *Disk) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, d.size); err != nil {
		return nil, err
	}
	var all []block.Extent
	add := func(n int64, flags block.ExtentFlags) {
		if k := len(all) - 1; k >= 0 && all[k].Flags == flags {
			all[k].Length += n
		} else if n > 0 {
			all = append(all, block.Extent{Length: n, Flags: flags})
		}
	}
	for pieces := 0; n > 0 && pieces < extentPieces; pieces++ {
		pc, err := d.place(off, n)
		if err != nil {
			if len(all) > 0 {
				break
			}
			return nil, err
		}
		switch pc.kind {
		case zeros:
			flags := block.ReadsZero
			if !pc.space {
				flags |= block.Hole
			}
			add(pc.n, flags)
		case unallocated:
			inBacking := int64(0)
			if d.image.backing != nil {
				inBacking = max(0, min(pc.n, d.image.backing.Size()-off))
			}
			if inBacking == 0 {
				add(pc.n, block.Hole|block.ReadsZero)
				break
			}
			known, err := block.Extents(d.image.backing, off, inBacking)
			if err != nil {
				return nil, fmt.Errorf("extents of the backing file: %w", err)
			}
			pc.n = 0
			for _, e := range known {
				add(e.Length, e.Flags)
				pc.n += e.Length
			}
		default:
			add(pc.n, 0)
		}
		off, n = off+pc.n, n-pc.n
	}
	return all, nil
}

// Held reports whether the image itself has the content at byte off, zeros included, or leaves it to its backing file,
// and for how many of the next n ≥ 1 bytes that is known to be so.
func (d *Disk) Held(off, n int64) (held bool, follow int64, err error) {
	if err := block.CheckRange("look up", off, n, d.size); err != nil {
		return false, 0, err
	}
	pc, err := d.place(off, n)
	return pc.kind != unallocated, pc.n, err
}

// Flush does nothing: there is nothing to make durable.
func (d *Disk) Flush() error { return nil }

// WriteAt returns block.ErrReadOnly, as every change does; a range outside the disk is a *block.RangeError.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	return 0, d.refuse("write", off, int64(len(p)))
}

// WriteDurableAt is refused like WriteAt.
func (d *Disk) WriteDurableAt(p []byte, off int64) error {
	return d.refuse("write", off, int64(len(p)))
}

// ZeroAt is refused like WriteAt.
func (d *Disk) ZeroAt(off, n int64, _ block.ZeroFlags) error { return d.refuse("zero", off, n) }

// Discard is refused like WriteAt.
func (d *Disk) Discard(off, n int64) error { return d.refuse("discard", off, n) }

// Allocate is refused like WriteAt.
func (d *Disk) Allocate(off, n int64) error { return d.refuse("allocate", off, n) }

func (d *Disk) refuse(op string, off, n int64) error {
	return errors.Join(block.CheckRange(op, off, n, d.size), block.ErrReadOnly)
}
