// Package mapped is a device whose bytes are ranges of other devices: one range (a partition), several in a row (a linear
// volume), striped over several (a striped volume), or zeros.
//
//	part, err := mapped.New("", []mapped.Target{{Length: size, Areas: []mapped.Area{{Dev: disk, Off: start}}}})
//
// Guarantees: a device never reads or writes a byte outside its ranges. Abilities of the underlying devices are passed on
// within them; the size is fixed. Errors, concurrency and durability are those of the underlying devices, which the caller
// closes.
package mapped

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"sort"

	"github.com/dmsnap/dmsnap/block"
)

// An Area is where the bytes of a target, or of one of its stripes, begin.
type Area struct {
	Dev block.Device
	Off int64 // bytes
}

// A Target is a run of bytes of a mapped device.
type Target struct {
	Length int64 // bytes, > 0
	// Areas hold the bytes: none means zeros, one a linear run, several stripes.
	Areas []Area
	// Stripe is the size of a stripe in bytes, where there are several areas.
	Stripe int64
}

// A Device maps its bytes onto ranges of other devices. Its methods may be called concurrently.
type Device struct {
	id       string
	targets  []Target
	starts   []int64 // of the targets
	size     int64
	devs     []block.Device // below, each once, none of them mapped
	block    int
	readOnly bool
}

var _ interface {
	block.Device
	block.DurableWriter
	block.LastWriter
	block.EarlyFlusher
	block.Zeroer
	block.Allocator
	block.Discarder
	block.Extenter
	block.CacheDropper
	block.Resizer
	block.GrowReporter
	block.BlockSizer
	block.Identifier
} = (*Device)(nil)

// New returns the device that consists of targets, in this order. id is its [block.Identity]; an empty one is made from the
// underlying device where there is a single target with one area. A range outside of the underlying device is an error that
// wraps *block.RangeError.
func New(id string, targets []Target) (*Device, error) {
	d := &Device{id: id, targets: targets, block: block.SectorSize}
	known := map[block.Device]bool{}
	for i, t := range targets {
		if t.Length <= 0 || t.Length > math.MaxInt64-d.size {
			return nil, fmt.Errorf("target %d of %d bytes at byte %d: the length is out of range", i, t.Length, d.size)
		}
		n := t.Length
		if k := int64(len(t.Areas)); k > 1 {
			if t.Stripe <= 0 || t.Length%k != 0 || (t.Length/k)%t.Stripe != 0 {
				return nil, fmt.Errorf("target %d: %d bytes can't be divided into %d areas of whole stripes of %d bytes", i, t.Length, k, t.Stripe)
			}
			n /= k
		}
		for _, a := range t.Areas {
			if err := block.CheckRange("map", a.Off, n, a.Dev.Size()); err != nil {
				return nil, fmt.Errorf("target %d: %w", i, err)
			}
			d.add(a.Dev, known)
		}
		d.starts = append(d.starts, d.size)
		d.size += t.Length
	}
	if id == "" && len(targets) == 1 && len(targets[0].Areas) == 1 {
		a := targets[0].Areas[0]
		if below := block.Identity(a.Dev); below != "" {
			d.id = fmt.Sprintf("%s[%d+%d]", below, a.Off, d.size)
		}
	}
	return d, nil
}

// add notes a device to be flushed. Instead of a mapped device it notes those below: a mapped device may be below many
// others, each of which would flush it.
func (d *Device) add(dev block.Device, known map[block.Device]bool) {
	if reflect.ValueOf(dev).Comparable() {
		if known[dev] {
			return
		}
		known[dev] = true
	}
	if m, ok := dev.(*Device); ok {
		for _, below := range m.devs {
			d.add(below, known)
		}
		d.block = max(d.block, m.block)
		return
	}
	d.devs = append(d.devs, dev)
	d.block = max(d.block, block.BlockSize(dev))
}

// ReadOnly returns d as a device whose changes are refused with block.ErrReadOnly.
func (d *Device) ReadOnly() *Device {
	r := *d
	r.readOnly = true
	return &r
}

// Writable reports whether d passes writes on. The underlying devices may still refuse them.
func (d *Device) Writable() bool { return !d.readOnly }

// place returns where the byte at off is, and how many of the next n ≥ 1 bytes follow it there. dev is nil where they are
// zeros. off is inside d.
func (d *Device) place(off, n int64) (dev block.Device, at, follow int64) {
	i := 0
	if len(d.starts) > 1 {
		i = sort.Search(len(d.starts), func(i int) bool { return d.starts[i] > off }) - 1
	}
	t := d.targets[i]
	off -= d.starts[i]
	n = min(n, t.Length-off)
	switch k := int64(len(t.Areas)); k {
	case 0:
		return nil, 0, n
	case 1:
		return t.Areas[0].Dev, t.Areas[0].Off + off, n
	default:
		stripe, in := off/t.Stripe, off%t.Stripe
		a := t.Areas[stripe%k]
		return a.Dev, a.Off + stripe/k*t.Stripe + in, min(n, t.Stripe-in)
	}
}

// each calls do for each piece of a range in order, until it returns an error. done is the number of bytes before the piece.
func (d *Device) each(op string, off, n int64, do func(dev block.Device, at, n, done int64) error) error {
	if err := block.CheckRange(op, off, n, d.size); err != nil {
		return err
	}
	for done := int64(0); done < n; {
		dev, at, follow := d.place(off+done, n-done)
		if err := do(dev, at, follow, done); err != nil {
			return err
		}
		done += follow
	}
	return nil
}

// change is each for changes.
func (d *Device) change(op string, off, n int64, do func(dev block.Device, at, n, done int64) error) error {
	if err := block.CheckRange(op, off, n, d.size); err != nil {
		return err
	}
	if d.readOnly {
		return block.ErrReadOnly
	}
	return d.each(op, off, n, func(dev block.Device, at, n, done int64) error {
		if dev == nil {
			return block.ErrReadOnly
		}
		return do(dev, at, n, done)
	})
}

// single reports whether a range inside d is in one piece.
func (d *Device) single(off, n int64) bool {
	if block.CheckRange("", off, n, d.size) != nil || n == 0 {
		return true
	}
	_, _, follow := d.place(off, n)
	return follow == n
}

// ReadAt reads len(p) bytes at off.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if n := int64(len(p)); n > 0 && block.CheckRange("read", off, n, d.size) == nil {
		if dev, at, follow := d.place(off, n); follow == n && dev != nil { // in one piece, as nearly always
			return dev.ReadAt(p, at)
		}
	}
	total := 0
	err := d.each("read", off, int64(len(p)), func(dev block.Device, at, n, done int64) error {
		if dev == nil {
			clear(p[done : done+n])
			total += int(n)
			return nil
		}
		m, err := dev.ReadAt(p[done:done+n], at)
		total += m
		return err
	})
	return total, err
}

// ReadCached passes reads on where d is one range of one device.
func (d *Device) ReadCached(reads []block.Read) int {
	if len(d.targets) != 1 || len(d.targets[0].Areas) != 1 {
		return 0
	}
	a := d.targets[0].Areas[0]
	below := make([]block.Read, len(reads))
	for i, r := range reads {
		if block.CheckRange("read", r.Off, int64(len(r.P)), d.size) == nil { // else it stays empty, and is left
			below[i] = block.Read{P: r.P, Off: a.Off + r.Off, Done: r.Done}
		}
	}
	n := block.ReadCached(a.Dev, below)
	for i := range reads {
		reads[i].Done = below[i].Done
	}
	return n
}

// WriteAt writes p at off.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	total := 0
	err := d.change("write", off, int64(len(p)), func(dev block.Device, at, n, done int64) error {
		m, err := dev.WriteAt(p[done:done+n], at)
		total += m
		return err
	})
	return total, err
}

// Flush flushes every underlying device, also after one has failed.
func (d *Device) Flush() error {
	if d.readOnly {
		return nil
	}
	var errs []error
	for _, dev := range d.devs {
		errs = append(errs, dev.Flush())
	}
	return errors.Join(errs...)
}

// Size is the sum of the lengths of the targets in bytes.
func (d *Device) Size() int64 { return d.size }

// WriteDurableAt writes durably where a range is in one piece; else it is block.ErrUnsupported.
func (d *Device) WriteDurableAt(p []byte, off int64) error {
	if !d.readOnly && !d.single(off, int64(len(p))) {
		return block.ErrUnsupported
	}
	return d.change("write", off, int64(len(p)), func(dev block.Device, at, n, done int64) error {
		return block.WriteDurable(dev, p[done:done+n], at)
	})
}

// WriteLastAt writes durably, whatever failed before on the underlying devices.
func (d *Device) WriteLastAt(p []byte, off int64) error {
	return d.change("write", off, int64(len(p)), func(dev block.Device, at, n, done int64) error {
		return block.WriteLast(dev, p[done:done+n], at)
	})
}

// BeginFlush begins to write a range to the disks.
func (d *Device) BeginFlush(off, n int64) {
	if d.readOnly {
		return
	}
	_ = d.each("flush", off, n, func(dev block.Device, at, n, _ int64) error { // a range outside: nothing to do
		if dev != nil {
			block.BeginFlush(dev, at, n)
		}
		return nil
	})
}

// BeginRead begins to read a range from the disks.
func (d *Device) BeginRead(off, n int64) {
	_ = d.each("read", off, n, func(dev block.Device, at, n, _ int64) error { // a range outside: nothing to do
		if dev != nil {
			block.BeginRead(dev, at, n)
		}
		return nil
	})
}

// ZeroAt zeroes a range. With OnlyFast a range in several pieces is block.ErrNotFast: a later piece could fail after an
// earlier one was changed.
func (d *Device) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if flags&block.OnlyFast != 0 && !d.readOnly && !d.single(off, n) {
		return block.ErrNotFast
	}
	return d.change("zero", off, n, func(dev block.Device, at, n, _ int64) error {
		return block.Zero(dev, at, n, flags)
	})
}

// Allocate reserves space for a range.
func (d *Device) Allocate(off, n int64) error {
	return d.change("allocate", off, n, func(dev block.Device, at, n, _ int64) error {
		can, err := block.Allocate(dev, at, n)
		if err == nil && !can {
			return block.ErrNotFast
		}
		return err
	})
}

// Discard discards a range.
func (d *Device) Discard(off, n int64) error {
	return d.change("discard", off, n, func(dev block.Device, at, n, _ int64) error {
		return block.Discard(dev, at, n)
	})
}

// extentPieces bounds the pieces that one call of Extents looks at.
const extentPieces = 64

var errEnough = errors.New("enough")

// Extents returns the extents of the underlying devices. Zeros that no device holds are holes.
func (d *Device) Extents(off, n int64) ([]block.Extent, error) {
	var all []block.Extent
	pieces := 0
	err := d.each("extents", off, n, func(dev block.Device, at, n, _ int64) error {
		known := []block.Extent{{Length: n, Flags: block.Hole | block.ReadsZero}}
		if dev != nil {
			var err error
			if known, err = block.Extents(dev, at, n); err != nil {
				return err
			}
		}
		covered := int64(0)
		for _, e := range known {
			all = block.AppendExtent(all, e)
			covered += e.Length
		}
		if pieces++; covered < n || pieces == extentPieces {
			return errEnough
		}
		return nil
	})
	if err != nil && err != errEnough {
		return nil, err
	}
	return all, nil
}

// DropCache drops what is cached of a range.
func (d *Device) DropCache(off, n int64) error {
	return d.each("drop cache", off, n, func(dev block.Device, at, n, _ int64) error {
		if dev == nil {
			return nil
		}
		return block.DropCache(dev, at, n)
	})
}

// Refresh returns the size, which is fixed.
func (d *Device) Refresh() (int64, error) { return d.size, nil }

// Grow is block.ErrFixedSize unless the device is long enough.
func (d *Device) Grow(size int64) error {
	if size > d.size {
		return fmt.Errorf("grow from %d to %d bytes: %w", d.size, size, block.ErrFixedSize)
	}
	return nil
}

// CanGrow is false.
func (d *Device) CanGrow() bool { return false }

// BlockSize is the largest logical block size of the underlying devices, in bytes.
func (d *Device) BlockSize() int { return d.block }

// Identity is equal for two devices made with one id, or of one range of one device.
func (d *Device) Identity() string {
	if d.id == "" {
		return fmt.Sprintf("mapped %p", &d.targets)
	}
	return d.id
}
