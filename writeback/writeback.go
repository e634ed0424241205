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
	"maps"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/scratch"
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

// A Range is a range of bytes.
type Range struct{ Off, Length int64 }

func (r Range) String() string { return fmt.Sprintf("%d-%d", r.Off, r.Off+r.Length-1) }

// A LostError reports acknowledged writes that were discarded, because they could not be written.
type LostError struct {
	Ranges []Range // ascending
	Err    error   // why
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

// setTimer schedules the writing of dirty bytes. d.mu is held.
func (d *Device) setTimer(after time.Duration) {
	if d.timer == nil {
		d.timer = time.AfterFunc(after, func() { d.writeOutLocked() })
	} else {
		d.timer.Reset(after)
	}
}

// writeOutLocked is WriteOut for callers without opts.Lock.
func (d *Device) writeOutLocked() error {
	if d.blocks.Load() == 0 {
		return nil
	}
	if d.opts.Lock != nil {
		d.opts.Lock.Lock()
		defer d.opts.Lock.Unlock()
	}
	return d.WriteOut()
}

// WriteOut writes all that was dirty when it was called to the underlying device, after the barrier. It makes nothing
// durable. Concurrent calls share the work. What can't be written stays dirty.
//
// Errors: that of the barrier, or a *WriteError.
func (d *Device) WriteOut() error { return d.writeOut(failures) }

func (d *Device) writeOut(failures int) error {
	if d.blocks.Load() == 0 {
		return nil
	}
	mine := d.rounds.Load() + 1
	d.writing.Lock()
	defer d.writing.Unlock()
	if d.rounds.Load() >= mine && failures != noLimit {
		return d.err
	}
	d.rounds.Add(1)
	d.err = nil
	for again := true; again && d.err == nil; {
		again = d.take()
		d.err = d.round(failures)
	}
	if d.err == nil {
		if d.failing.Swap(nil) != nil && d.opts.Notify != nil {
			d.opts.Notify(nil)
		}
		return nil
	}
	err := d.err
	if d.failing.Swap(&err) == nil && d.opts.Notify != nil {
		d.opts.Notify(err)
	}
	d.mu.Lock()
	d.setTimer(max(d.opts.Delay, retryEvery))
	d.mu.Unlock()
	return err
}

// take moves dirty blocks to leaving, to be written. Blocks that a failed round left are written before later ones:
// then again is true, and take is to be called once more. d.writing is held.
func (d *Device) take() (again bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.leaving) > 0 {
		return len(d.dirty) > 0
	}
	d.leaving, d.dirty = d.dirty, nil
	return false
}

// round runs the barrier, then the writes. d.writing is held.
func (d *Device) round(failures int) error {
	if len(d.leaving) == 0 {
		return nil
	}
	if err := d.opts.Barrier(); err != nil {
		return err
	}
	return d.writeLeaving(failures)
}

// writeLeaving writes the blocks of d.leaving in the order of their offsets, adjacent ones together, and removes those
// that are written. A write that failed is repeated block by block; its error is returned anyway. d.writing is held.
func (d *Device) writeLeaving(failures int) error {
	w := &writer{d: d, failures: failures}
	scratch.With(scratch.Most, func(buf []byte) error {
		w.buf = buf[:0]
		for _, k := range slices.Sorted(maps.Keys(d.leaving)) {
			w.add(k)
		}
		w.flush()
		return nil
	})
	d.keep(w.bad)
	if w.err != nil {
		return &WriteError{w.err}
	}
	return nil
}

// A writer collects adjacent blocks for one write.
type writer struct {
	d        *Device
	buf      []byte
	at       int64          // byte of the device where buf belongs
	gathered []int64        // blocks whose bytes are in buf
	bad      map[int64]bool // blocks that are not written
	err      error          // the first
	failures int            // that are still allowed
}

// add adds the dirty bytes of block k, which are after those that were added before.
func (w *writer) add(k int64) {
	b := w.d.leaving[k]
	b.runs(func(from, to int64) {
		start := k*blockSize + from
		if start != w.at+int64(len(w.buf)) || len(w.buf)+int(to-from) > cap(w.buf) {
			w.flush()
			w.at = start
		}
		w.buf = append(w.buf, b.data[from:to]...)
		if n := len(w.gathered); n == 0 || w.gathered[n-1] != k {
			w.gathered = append(w.gathered, k)
		}
	})
}

// flush writes the collected blocks.
func (w *writer) flush() {
	if len(w.buf) > 0 {
		err := w.err
		if w.failures > 0 {
			_, err = w.d.dev.WriteAt(w.buf, w.at)
		}
		if err != nil {
			w.oneByOne(err)
		}
	}
	w.buf, w.gathered = w.buf[:0], w.gathered[:0]
}

// oneByOne writes the collected blocks one by one, after the write of all of them failed with err.
func (w *writer) oneByOne(err error) {
	if w.err == nil {
		w.err, w.bad = err, map[int64]bool{}
	}
	alone := len(w.gathered) == 1
	for _, k := range w.gathered {
		if w.failures > 0 && !alone && w.d.writeBlock(k) == nil {
			continue
		}
		w.bad[k] = true
		w.failures--
	}
}

// writeBlock writes one block of d.leaving.
func (d *Device) writeBlock(k int64) (err error) {
	b := d.leaving[k]
	b.runs(func(from, to int64) {
		if err == nil {
			_, err = d.dev.WriteAt(b.data[from:to], k*blockSize+from)
		}
	})
	return err
}

// keep removes all blocks from d.leaving but the bad ones. d.writing is held.
func (d *Device) keep(bad map[int64]bool) {
	d.mu.Lock()
	written := d.leaving
	d.leaving = nil
	for k := range bad {
		if d.leaving == nil {
			d.leaving = make(map[int64]*dirtyBlock, len(bad))
		}
		d.leaving[k] = written[k]
		delete(written, k)
	}
	d.left++
	d.blocks.Add(-int64(len(written)))
	d.mu.Unlock()
	for _, b := range written {
		spareBlocks.Put(b)
	}
}

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

// Reserve reserves space on the underlying device for dirty bytes, where it supports that. It fails, with the content
// unchanged, where writing would fail for lack of space.
func (d *Device) Reserve() error {
	for _, r := range d.ranges() {
		if _, err := block.Allocate(d.dev, r.Off, r.Length); err != nil {
			return err
		}
	}
	return nil
}

// ranges returns what is dirty.
func (d *Device) ranges() []Range {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[int64]uint8{}
	for _, set := range []map[int64]*dirtyBlock{d.leaving, d.dirty} {
		for k, b := range set {
			all[k] |= b.sectors
		}
	}
	var list []Range
	for _, k := range slices.Sorted(maps.Keys(all)) {
		b := dirtyBlock{sectors: all[k]}
		b.runs(func(from, to int64) {
			off := k*blockSize + from
			if n := len(list); n > 0 && list[n-1].Off+list[n-1].Length == off {
				list[n-1].Length += to - from
			} else {
				list = append(list, Range{off, to - from})
			}
		})
	}
	return list
}

// Finish makes the last attempt to write what is dirty, each block of it, and discards what can't be written, which a
// *LostError lists. It flushes nothing. Later calls of Flush fail when bytes were discarded.
func (d *Device) Finish() error {
	err := d.writeOut(noLimit)
	d.writing.Lock()
	defer d.writing.Unlock()
	ranges := d.ranges()
	d.mu.Lock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.leaving, d.dirty = nil, nil
	d.left++
	d.blocks.Store(0)
	d.mu.Unlock()
	if len(ranges) == 0 {
		return nil
	}
	err = &LostError{ranges, err}
	d.failed.Store(&err)
	return err
}

var _ block.Device = (*Device)(nil)
