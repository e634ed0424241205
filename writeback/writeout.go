package writeback

import (
	"maps"
	"slices"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/scratch"
)

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
func (d *Device) ranges() []block.Range {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[int64]uint8{}
	for _, set := range []map[int64]*dirtyBlock{d.leaving, d.dirty} {
		for k, b := range set {
			all[k] |= b.sectors
		}
	}
	var list []block.Range
	for _, k := range slices.Sorted(maps.Keys(all)) {
		b := dirtyBlock{sectors: all[k]}
		b.runs(func(from, to int64) {
			off := k*blockSize + from
			if n := len(list); n > 0 && list[n-1].Off+list[n-1].Length == off {
				list[n-1].Length += to - from
			} else {
				list = append(list, block.Range{Off: off, Length: to - from})
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
