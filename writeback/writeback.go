// Package writeback keeps writes in memory for a while before they are written to a device.
//
//	dev := writeback.New(disk, writeback.Options{Limit: 64 << 20, Delay: 100 * time.Millisecond, Barrier: sync})
//	err := dev.WriteBack(p, off) // acknowledged
//	err = dev.Flush()            // barrier, writes in the order of their offsets, flush of disk
//
// A [Device] is stacked on a block device. Bytes passed to [Device.WriteBack] are dirty when it returns: reads return them,
// and they are written to the underlying device by a Flush, at half of the limit, or after the delay, whichever comes first.
// Before any of them is written there, a barrier runs: a function of the caller that makes durable what has to be durable
// first. So many writes share one barrier.
//
// Guarantees: reads return what was written last. A write by any other method, a zeroing or a discard that overlaps dirty
// bytes is made on the underlying device after them. Flush makes durable everything that was written before it, and fails
// while any of it is dirty. Dirty bytes that can't be written stay dirty and are tried again at each Flush and once a
// second, block by block, so that one bad block affects no other; until they are written WriteBack accepts nothing more. A
// failed flush of the underlying device is permanent.
package writeback

import (
	"fmt"
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

const (
	blockSize  = 4096               // bytes of a dirtyBlock
	largest    = 1 << 20            // bytes of a write that WriteBack takes
	retryEvery = time.Second        // between attempts to write what could not be written
	failures   = 64                 // failed writes after which an attempt ends, unless it is the last one
	noLimit    = int(^uint(0) >> 1) // failures of the last attempt
)

// Options are the limits of dirty bytes. With the zero value none are kept.
type Options struct {
	// Limit is how many bytes may be dirty, about; 0: WriteBack must not be called.
	Limit int64
	// Delay is how long bytes stay dirty at most.
	Delay time.Duration
	// Barrier is called before dirty bytes are written to the underlying device, once for many; when it fails none of
	// them is written. nil: no barrier.
	Barrier func() error
	// Lock is held while Barrier runs. The timer and Flush take it; callers of the other methods that may write
	// (WriteBack, WriteOut, WriteAt, WriteDurableAt, ZeroAt, Discard, Finish) hold it already, several at a time: it
	// protects state that must not change while Barrier runs. nil: none is needed.
	Lock sync.Locker
	// Notify is called with the error of an attempt to write dirty bytes that failed after one that did not, and with
	// nil when an attempt succeeds after that. It must neither block nor call back.
	Notify func(err error)
}

// A Device is a block.Device over another one. Its methods may be called concurrently.
type Device struct {
	forward
	dev  block.Device
	opts Options

	writing sync.Mutex    // one round of writing out at a time
	rounds  atomic.Uint64 // begun
	err     error         // of the last round; writing is held

	mu      sync.Mutex
	dirty   map[int64]*dirtyBlock // by offset / blockSize
	leaving map[int64]*dirtyBlock // those that the current round, or the last one that failed, writes; unchanged until they are written
	left    uint64                // how often blocks were removed from leaving
	timer   *time.Timer

	blocks  atomic.Int64          // in both maps; changed with mu held
	failing atomic.Pointer[error] // of the last round
	failed  atomic.Pointer[error] // of a flush of the underlying device, or of dirty bytes that were discarded
}

// forward is block.Forward under an unexported name, so that users of the package can't reach the underlying device.
type forward = block.Forward

// New returns a device over dev without dirty bytes. The caller keeps dev open until Finish.
func New(dev block.Device, opts Options) *Device {
	if opts.Barrier == nil {
		opts.Barrier = func() error { return nil }
	}
	return &Device{forward: block.NewForward(dev), dev: dev, opts: opts}
}

// A dirtyBlock has the dirty sectors of blockSize bytes: those whose bits are set.
type dirtyBlock struct {
	sectors uint8
	data    [blockSize]byte
}

var spareBlocks = sync.Pool{New: func() any { return new(dirtyBlock) }}

// runs calls do for each range of dirty bytes of b.
func (b *dirtyBlock) runs(do func(from, to int64)) {
	for left, at := uint(b.sectors), 0; left != 0; {
		skip := bits.TrailingZeros(left)
		n := bits.TrailingZeros(^(left >> skip))
		at += skip
		do(int64(at)*block.SectorSize, int64(at+n)*block.SectorSize)
		at, left = at+n, left>>(skip+n)
	}
}

// A LostError reports acknowledged writes that were discarded, because they could not be written.
type LostError struct {
	Ranges []block.Range // ascending
	Err    error         // why
}

func (e *LostError) Error() string {
	var list strings.Builder
	n := int64(0)
	for _, r := range e.Ranges {
		fmt.Fprintf(&list, ", %v", r)
		n += r.Length
	}
	return fmt.Sprintf("%d acknowledged bytes could not be written and are lost: bytes %s: %v", n, list.String()[2:], e.Err)
}

func (e *LostError) Unwrap() error { return e.Err }

// A WriteError reports that writing dirty bytes to the underlying device failed, as opposed to the barrier.
type WriteError struct{ Err error }

func (e *WriteError) Error() string { return "write acknowledged bytes: " + e.Err.Error() }
func (e *WriteError) Unwrap() error { return e.Err }

// A Status is the state of a device at one moment.
type Status struct {
	Dirty   int64 // bytes, rounded up to blocks of 4 KiB
	Failing error // why the last attempt to write them failed; nil: it succeeded. The next one may succeed
	Failed  error // why every Flush fails from now on; nil: none failed
}

// Status returns the state of the device. It waits for no I/O.
func (d *Device) Status() Status {
	s := Status{Dirty: d.blocks.Load() * blockSize}
	if err := d.failing.Load(); err != nil && s.Dirty > 0 {
		s.Failing = *err
	}
	if err := d.failed.Load(); err != nil {
		s.Failed = *err
	}
	return s
}

// CanWriteBack reports whether WriteBack accepts a write of n bytes at off: whole sectors, and not too many.
func (d *Device) CanWriteBack(off, n int64) bool {
	return d.opts.Limit > 0 && n <= largest && off%block.SectorSize == 0 && n%block.SectorSize == 0
}

// Overlaps reports whether some of n > 0 bytes at off is dirty.
func (d *Device) Overlaps(off, n int64) bool {
	if d.blocks.Load() == 0 {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	_, found := d.firstDirty(off/blockSize, (off+n-1)/blockSize)
	return found
}

// firstDirty returns the first block of [first, last] that has dirty bytes. d.mu is held.
func (d *Device) firstDirty(first, last int64) (at int64, found bool) {
	for _, set := range []map[int64]*dirtyBlock{d.dirty, d.leaving} {
		if last-first < int64(len(set)) {
			for k := first; k <= last; k++ {
				if set[k] != nil {
					last, at, found = k, k, true
				}
			}
			continue
		}
		for k := range set {
			if first <= k && k <= last {
				last, at, found = k, k, true
			}
		}
	}
	return at, found
}

// WriteBack accepts len(p) bytes at off, for which CanWriteBack is true. When it returns nil they are dirty. At the
// limit, or after a failed attempt to write dirty bytes, it writes those first.
//
// Errors: those of WriteOut, with nothing accepted.
func (d *Device) WriteBack(p []byte, off int64) error {
	if err := block.CheckRange("write", off, int64(len(p)), d.dev.Size()); err != nil {
		return err
	}
	if d.blocks.Load()*blockSize >= d.opts.Limit || d.failing.Load() != nil {
		if err := d.WriteOut(); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	before := int64(len(d.dirty))
	if d.dirty == nil {
		d.dirty = map[int64]*dirtyBlock{}
	}
	for len(p) > 0 {
		at, in := off/blockSize, off%blockSize
		b := d.dirty[at]
		if b == nil {
			b = spareBlocks.Get().(*dirtyBlock)
			b.sectors = 0
			d.dirty[at] = b
			d.blocks.Add(1)
		}
		n := copy(b.data[in:], p)
		b.sectors |= uint8(1<<(n/block.SectorSize)-1) << (in / block.SectorSize)
		p, off = p[n:], off+int64(n)
	}
	// The timer is set last: if it fired before, it would find nothing, and would not be set again.
	half := d.opts.Limit / blockSize / 2
	switch after := int64(len(d.dirty)); {
	case before < half && half <= after:
		d.setTimer(0)
	case before == 0 && after > 0:
		d.setTimer(d.opts.Delay)
	}
	return nil
}

var _ block.Device = (*Device)(nil)
