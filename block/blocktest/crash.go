package blocktest

import (
	"fmt"
	"slices"
	"sync"

	"github.com/dmsnap/dmsnap/block"
)

// A Power supplies the devices of one machine, which lose what was not flushed together. The zero
// value is ready for use.
//
// The disk it assumes is a usual one with a volatile cache:
//
//   - A sector of 512 bytes is written whole or not at all. A longer write is a number of such sectors, each on
//     its own.
//   - A write that was not flushed may or may not be on the disk, whatever else is: the disk writes its
//     cache in the order it likes. Of several such writes to one sector each may be the one that is
//     left.
//   - A Flush makes durable what was written to its device before.
//   - A durable write makes its own sectors durable, and no others. While it runs any of them may be.
//   - Zeroing and discarding are writes of zeros.
//   - Making a device longer is durable at once.
//
// [Power.Observe] is called at each moment after which a power cut could leave something new, and
// [Power.Cut] is the cut: it stops the clock, and [Cut.Images] shows what the disks could then hold.
type Power struct {
	mu       sync.RWMutex // guards all devices too: a cut is one moment for all
	devices  []*Crash
	writes   []sectorWrite // not durable yet, in order
	observer func(Op)
}

// sectorWrite is one version of a sector that is in a disk's cache.
type sectorWrite struct {
	dev    *Crash
	sector int64
	data   []byte // the whole sector; never changed
}

// A Crash is a device in memory that keeps apart what is durable and what is not. Its methods may be called
// concurrently.
type Crash struct {
	power   *Power
	name    string
	size    int64
	durable []byte // what survives for certain; whole sectors
	current []byte // what reads return: durable with all writes applied
}

// NewCrash returns a device with a power supply of its own that holds a copy of content, durably.
func NewCrash(content []byte) *Crash { return new(Power).NewCrash("", content) }

// NewCrash adds a device that holds a copy of content, durably. The name is for messages.
func (p *Power) NewCrash(name string, content []byte) *Crash {
	c := &Crash{power: p, name: name, size: int64(len(content))}
	c.durable = make([]byte, roundUp(c.size))
	copy(c.durable, content)
	c.current = slices.Clone(c.durable)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.devices = append(p.devices, c)
	return c
}

// roundUp returns the size of the whole sectors that hold size bytes.
func roundUp(size int64) int64 {
	return (size + block.SectorSize - 1) / block.SectorSize * block.SectorSize
}

// Observe has call called after each step that changes what a power cut could leave: once for a write,
// zero, discard or flush, before it returns, and twice for a durable write, when its sectors are
// written and any of them may be durable, and when all are. call may cut the power and read, and must
// not change the devices. It runs in the goroutine of the operation. nil ends it.
func (p *Power) Observe(call func(Op)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.observer = call
}

// Power returns the device's power supply.
func (c *Crash) Power() *Power { return c.power }

// Size returns the size in bytes.
func (c *Crash) Size() int64 {
	c.power.mu.RLock()
	defer c.power.mu.RUnlock()
	return c.size
}

// Durable returns a copy of what survives a power cut for certain.
func (c *Crash) Durable() []byte {
	c.power.mu.RLock()
	defer c.power.mu.RUnlock()
	return slices.Clone(c.durable[:c.size])
}

// Bytes returns a copy of the content as reads see it.
func (c *Crash) Bytes() []byte {
	c.power.mu.RLock()
	defer c.power.mu.RUnlock()
	return slices.Clone(c.current[:c.size])
}

// ReadAt reads what was written last, durable or not.
func (c *Crash) ReadAt(p []byte, off int64) (int, error) {
	c.power.mu.RLock()
	defer c.power.mu.RUnlock()
	if err := block.CheckRange("read", off, int64(len(p)), c.size); err != nil {
		return 0, err
	}
	return copy(p, c.current[off:]), nil
}

// WriteAt writes into the disk's cache.
func (c *Crash) WriteAt(p []byte, off int64) (int, error) {
	err := c.step(Op{Kind: Write, Off: off, Len: int64(len(p))}, "write", func() {
		c.cache(off, int64(len(p)), func(to []byte) { copy(to, p) })
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteDurableAt writes p and makes the sectors it touches durable, and nothing else.
func (c *Crash) WriteDurableAt(p []byte, off int64) error {
	op := Op{Kind: WriteDurable, Off: off, Len: int64(len(p))}
	err := c.step(op, "write", func() {
		c.cache(off, int64(len(p)), func(to []byte) { copy(to, p) })
	})
	if err != nil {
		return err
	}
	return c.step(op, "write", func() {
		first, last := off/block.SectorSize, roundUp(off+int64(len(p)))/block.SectorSize
		c.settle(func(sector int64) bool { return first <= sector && sector < last })
	})
}

// Flush makes everything written to the device durable.
func (c *Crash) Flush() error {
	return c.step(Op{Kind: Flush}, "flush", func() {
		c.settle(func(int64) bool { return true })
	})
}

// ZeroAt writes zeros into the disk's cache.
func (c *Crash) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	return c.step(Op{Kind: Zero, Off: off, Len: n, Flags: flags}, "zero", func() {
		c.cache(off, n, func(to []byte) { clear(to) })
	})
}

// Discard writes zeros into the disk's cache.
func (c *Crash) Discard(off, n int64) error {
	return c.step(Op{Kind: Discard, Off: off, Len: n}, "discard", func() {
		c.cache(off, n, func(to []byte) { clear(to) })
	})
}

// Refresh returns the size, which only Grow changes.
func (c *Crash) Refresh() (int64, error) { return c.Size(), nil }

// Grow makes the device at least size bytes long, durably.
func (c *Crash) Grow(size int64) error {
	return c.step(Op{Kind: Grow, Len: size}, "grow", func() {
		if size <= c.size {
			return
		}
		more := make([]byte, roundUp(size)-int64(len(c.current)))
		c.size = size
		c.current = append(c.current, more...)
		c.durable = append(c.durable, more...)
	})
}

// step checks the range of an operation, does it under the lock, and has it observed.
func (c *Crash) step(op Op, name string, do func()) error {
	op.Device = c.name
	p := c.power
	p.mu.Lock()
	length := op.Len
	if op.Kind == Grow {
		length = 0
	}
	if err := block.CheckRange(name, op.Off, length, c.size); err != nil {
		p.mu.Unlock()
		return err
	}
	do()
	observer := p.observer
	p.mu.Unlock()
	if observer != nil {
		observer(op)
	}
	return nil
}

// cache lets fill change n bytes at off of what reads return, and adds a version of each sector touched
// to the writes that are not durable.
func (c *Crash) cache(off, n int64, fill func(to []byte)) {
	if n == 0 {
		return
	}
	fill(c.current[off : off+n])
	for s := off / block.SectorSize; s*block.SectorSize < off+n; s++ {
		data := slices.Clone(c.sector(c.current, s))
		c.power.writes = append(c.power.writes, sectorWrite{c, s, data})
	}
}

// settle makes the sectors that match durable, with their newest content. Their older versions are dropped: a cache
// does not write back data that was overwritten.
func (c *Crash) settle(match func(sector int64) bool) {
	p := c.power
	p.writes = slices.DeleteFunc(p.writes, func(w sectorWrite) bool {
		if w.dev != c || !match(w.sector) {
			return false
		}
		copy(c.sector(c.durable, w.sector), c.sector(c.current, w.sector))
		return true
	})
}

// sector returns one sector of an image.
func (c *Crash) sector(image []byte, s int64) []byte {
	return image[s*block.SectorSize : (s+1)*block.SectorSize]
}

// Pending describes the sectors that are not durable, in the order of writing: "COW 17".
func (p *Power) Pending() []string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	var list []string
	for _, w := range p.writes {
		list = append(list, w.String())
	}
	return list
}

func (w sectorWrite) String() string {
	if w.dev.name == "" {
		return fmt.Sprint(w.sector)
	}
	return fmt.Sprintf("%s %d", w.dev.name, w.sector)
}
