package block

import "sync"

// A Forward passes every call on to an underlying device, the optional abilities included. A device that is stacked on
// another device embeds a Forward and overrides what it changes:
//
//	type counted struct {
//		block.Forward
//		reads atomic.Int64
//	}
//
//	func (c *counted) ReadAt(p []byte, off int64) (int, error) {
//		c.reads.Add(1)
//		return c.Forward.ReadAt(p, off)
//	}
//
//	dev := &counted{Forward: block.NewForward(disk)}
//
// What the underlying device lacks is answered so that the functions of this package fall back on the device that
// embeds the Forward: [Zero] writes zeros by its WriteAt, [WriteDurable] uses its WriteAt and Flush. What the
// underlying device has is called directly. So a device that changes what is written, or where, overrides WriteAt,
// WriteDurableAt, WriteLastAt, ZeroAt, Discard and Allocate; one that changes what is read overrides ReadAt,
// ReadCached and Extents; one that represents a disk of its own overrides Identity.
//
// A Forward adds nothing: errors, concurrency and guarantees are those of the underlying device. A Forward has no
// Close: the code that opened the underlying device closes it. The zero Forward is not usable.
type Forward struct {
	dev    Device
	holder Holder
}

// A Holder supplies the underlying device of a Forward for each call, where it may be replaced between calls. Its
// methods may be called concurrently, also several times before a Release.
type Holder interface {
	// Acquire returns the device for one call, and keeps it in place until Release.
	Acquire() Device
	Release()
}

// A Switch is a Holder whose device can be replaced while it is used. Its methods may be called concurrently.
type Switch struct {
	mu  sync.RWMutex // held for reading by each call to the device, for writing by Replace
	dev Device
}

// NewSwitch returns a Switch that holds dev.
func NewSwitch(dev Device) *Switch { return &Switch{dev: dev} }

// Acquire returns the device for one call; Release must follow.
func (s *Switch) Acquire() Device {
	s.mu.RLock()
	return s.dev
}

// Release ends a call.
func (s *Switch) Release() { s.mu.RUnlock() }

// Replace makes the device that with returns the one that is held, while no call is in flight. New calls wait meanwhile.
// After an error of with, which it returns, everything stays as it was.
func (s *Switch) Replace(with func() (Device, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	dev, err := with()
	if err == nil {
		s.dev = dev
	}
	return err
}

// NewForward returns a Forward to dev.
func NewForward(dev Device) Forward { return Forward{dev: dev} }

// NewHeldForward returns a Forward to the device that h supplies.
func NewHeldForward(h Holder) Forward { return Forward{holder: h} }

// acquire returns the underlying device; release must follow.
func (f Forward) acquire() Device {
	if f.holder != nil {
		return f.holder.Acquire()
	}
	return f.dev
}

func (f Forward) release() {
	if f.holder != nil {
		f.holder.Release()
	}
}

// ReadAt reads from the underlying device.
func (f Forward) ReadAt(p []byte, off int64) (int, error) {
	defer f.release()
	return f.acquire().ReadAt(p, off)
}

// WriteAt writes to the underlying device.
func (f Forward) WriteAt(p []byte, off int64) (int, error) {
	defer f.release()
	return f.acquire().WriteAt(p, off)
}

// Flush flushes the underlying device.
func (f Forward) Flush() error {
	defer f.release()
	return f.acquire().Flush()
}

// Size is that of the underlying device.
func (f Forward) Size() int64 {
	defer f.release()
	return f.acquire().Size()
}

// WriteDurableAt writes durably to the underlying device, or is ErrUnsupported.
func (f Forward) WriteDurableAt(p []byte, off int64) error {
	defer f.release()
	if d, ok := f.acquire().(DurableWriter); ok {
		return d.WriteDurableAt(p, off)
	}
	return ErrUnsupported
}

// WriteLastAt writes durably to the underlying device, whatever failed there before, or is ErrUnsupported.
func (f Forward) WriteLastAt(p []byte, off int64) error {
	defer f.release()
	if d, ok := f.acquire().(LastWriter); ok {
		return d.WriteLastAt(p, off)
	}
	return ErrUnsupported
}

// BeginFlush begins to write a range to the disk, where the underlying device can.
func (f Forward) BeginFlush(off, n int64) {
	defer f.release()
	BeginFlush(f.acquire(), off, n)
}

// BeginRead begins to read a range from the disk, where the underlying device can.
func (f Forward) BeginRead(off, n int64) {
	defer f.release()
	BeginRead(f.acquire(), off, n)
}

// ReadCached executes those reads that the underlying device can without waiting.
func (f Forward) ReadCached(reads []Read) int {
	defer f.release()
	return ReadCached(f.acquire(), reads)
}

// ZeroAt zeroes a range of the underlying device by its own means, or is ErrNotFast.
func (f Forward) ZeroAt(off, n int64, flags ZeroFlags) error {
	defer f.release()
	if z, ok := f.acquire().(Zeroer); ok {
		return z.ZeroAt(off, n, flags)
	}
	return ErrNotFast
}

// Allocate reserves space on the underlying device, or is ErrNotFast.
func (f Forward) Allocate(off, n int64) error {
	defer f.release()
	if a, ok := f.acquire().(Allocator); ok {
		return a.Allocate(off, n)
	}
	return ErrNotFast
}

// Discard discards a range of the underlying device, where it can.
func (f Forward) Discard(off, n int64) error {
	defer f.release()
	return Discard(f.acquire(), off, n)
}

// Extents returns the extents of the underlying device; all is data where it does not know.
func (f Forward) Extents(off, n int64) ([]Extent, error) {
	defer f.release()
	return Extents(f.acquire(), off, n)
}

// DropCache drops what is cached of a range of the underlying device.
func (f Forward) DropCache(off, n int64) error {
	defer f.release()
	return DropCache(f.acquire(), off, n)
}

// Refresh looks up the size of the underlying device.
func (f Forward) Refresh() (int64, error) {
	defer f.release()
	return Refresh(f.acquire())
}

// Grow makes the underlying device longer, or is ErrFixedSize.
func (f Forward) Grow(size int64) error {
	defer f.release()
	return Grow(f.acquire(), size)
}

// CanGrow reports whether the underlying device may be made longer.
func (f Forward) CanGrow() bool {
	defer f.release()
	return CanGrow(f.acquire())
}

// BlockSize is the logical block size of the underlying device.
func (f Forward) BlockSize() int {
	defer f.release()
	return BlockSize(f.acquire())
}

// Identity is that of the underlying device: its address when it has none but is a pointer, else empty.
func (f Forward) Identity() string {
	defer f.release()
	return Identity(f.acquire())
}
