package e2e_test

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"testing"
)

const sectorSize = 512

// device is the model of what an export shows: every snapshot is a copy. It knows, by sectors, what a read may
// return now and what may be found after a crash.
type device struct {
	now []byte
	// also has other contents that a read may return: of writes that failed, or were never answered.
	also map[int64][][]byte
	// late has contents of writes on connections that are gone, of whole sectors. They may be executed at any time.
	late map[int64][][]byte
	// older has contents that a crash may bring back, since nothing was flushed after them.
	older map[int64][][]byte
	// doubted are sectors that were not flushed when a flush failed: that another one succeeds says nothing of them.
	doubted map[int64]bool
	// own are sectors of a snapshot that were written to it, whose durability depends on its flushes; that of the
	// others depends on the origin's.
	own map[int64]bool
	// unclear are sectors of which that is not known, after a trim, which leaves a chunk without an exception as it is, or
	// a write that failed. Only flushes of both make them durable.
	unclear map[int64]bool
	// merged has, while the device is merged into its origin, the contents that sectors had since: a step that failed leaves
	// on the origin what it had copied, beneath newer writes in the COW device. nil: no merge.
	merged map[int64][][]byte
	// evicted: a flush failed, or may have, and what it lost may leave the page cache at any time.
	evicted bool
}

func newDevice(content []byte) *device {
	return &device{now: content, also: map[int64][][]byte{}, late: map[int64][][]byte{}, older: map[int64][][]byte{},
		doubted: map[int64]bool{}, own: map[int64]bool{}, unclear: map[int64]bool{}}
}

// clone returns the model of a snapshot of the device.
func (d *device) clone() *device {
	c := newDevice(slices.Clone(d.now))
	for s, list := range d.also {
		c.also[s] = slices.Clone(list)
	}
	for s, list := range d.late {
		c.also[s] = append(c.also[s], list...)
	}
	for s, list := range d.older {
		c.older[s] = slices.Clone(list)
	}
	c.doubted = maps.Clone(d.doubted)
	return c
}

func (d *device) sector(s int64) []byte { return d.now[s*sectorSize : (s+1)*sectorSize] }

// sectors calls f for each sector of a range with the part of it that lies in the range.
func sectors(off, n int64, f func(s, from, to int64)) {
	for at := off; at < off+n; {
		s := at / sectorSize
		end := min(off+n, (s+1)*sectorSize)
		f(s, at-s*sectorSize, end-s*sectorSize)
		at = end
	}
}

// with returns a sector's content with p written at from.
func with(sector []byte, from int64, p []byte) []byte {
	b := slices.Clone(sector)
	copy(b[from:], p)
	return b
}

// put adds a content to a list unless it is there.
func put(list [][]byte, b []byte) [][]byte {
	if slices.ContainsFunc(list, func(x []byte) bool { return bytes.Equal(x, b) }) {
		return list
	}
	return append(list, slices.Clone(b))
}

// write is a write that was acknowledged.
func (d *device) write(off int64, p []byte) {
	sectors(off, int64(len(p)), func(s, from, to int64) {
		part := p[s*sectorSize+from-off : s*sectorSize+to-off]
		if d.evicted && to-from < sectorSize { // what is lost already, is lost beneath this one
			for _, b := range slices.Clone(d.older[s]) {
				d.older[s] = put(d.older[s], with(b, from, part))
			}
		}
		d.older[s] = put(d.older[s], d.sector(s))
		for _, b := range d.also[s] {
			d.older[s] = put(d.older[s], b)
		}
		if d.merged != nil {
			for _, b := range d.older[s] {
				d.merged[s] = put(d.merged[s], b)
			}
		}
		if to-from == sectorSize {
			delete(d.also, s)
			delete(d.doubted, s)
		} else {
			for i, b := range d.also[s] {
				d.also[s][i] = with(b, from, part)
			}
			for _, b := range d.late[s] { // if it came before this one
				d.also[s] = put(d.also[s], with(b, from, part))
			}
		}
		copy(d.sector(s)[from:], part)
		d.own[s] = true
		delete(d.unclear, s)
	})
}

// durable is what a write with FUA adds to write.
func (d *device) durable(off, n int64) {
	sectors(off, n, func(s, from, to int64) {
		if to-from == sectorSize && len(d.late[s]) == 0 {
			delete(d.older, s)
		}
	})
}

// attempt is a write of which it is not known whether it happened, by sectors. If it is late it may still happen.
func (d *device) attempt(off int64, p []byte, late bool) {
	sectors(off, int64(len(p)), func(s, from, to int64) {
		part := p[s*sectorSize+from-off : s*sectorSize+to-off]
		list := [][]byte{with(d.sector(s), from, part)}
		for _, b := range slices.Concat(d.also[s], d.late[s]) {
			list = append(list, with(b, from, part))
		}
		for _, b := range list {
			if late {
				d.late[s] = put(d.late[s], b)
			} else {
				d.also[s] = put(d.also[s], b)
			}
			d.older[s] = put(d.older[s], b)
		}
		if !d.own[s] {
			d.unclear[s] = true
		}
	})
}

// flushed is a successful flush that began after every acknowledged write.
func (d *device) flushed() {
	for s := range d.older {
		d.settle(s)
	}
}

// snapshotFlushed is a successful flush of a snapshot: it covers what was written to the snapshot.
func (d *device) snapshotFlushed() {
	for s := range d.older {
		if d.own[s] {
			d.settle(s)
		}
	}
}

// originFlushed is a successful flush of the device that d is a snapshot of.
func (d *device) originFlushed() {
	for s := range d.older {
		if !d.own[s] && !d.unclear[s] {
			d.settle(s)
		}
	}
}

func (d *device) settle(s int64) {
	switch {
	case d.doubted[s]:
	case len(d.also[s])+len(d.late[s]) > 0:
		d.older[s] = append(slices.Clone(d.also[s]), d.late[s]...)
	default:
		delete(d.older, s)
	}
}

// flushFailed is a failed flush of the file that holds the device, or parts of it.
func (d *device) flushFailed() {
	for s := range d.older {
		d.doubted[s] = true
	}
}

// observe compares what was read now with the model, and learns from it.
func (d *device) observe(off int64, got []byte) error {
	var first error
	sectors(off, int64(len(got)), func(s, from, to int64) {
		b := got[s*sectorSize+from-off : s*sectorSize+to-off]
		if bytes.Equal(d.sector(s)[from:to], b) {
			if to-from == sectorSize && len(d.late[s]) == 0 {
				d.seen(s)
			}
			return
		}
		lists := [][][]byte{d.also[s], d.late[s]}
		if d.evicted {
			lists = append(lists, d.older[s])
		}
		for _, list := range lists {
			for _, x := range list {
				if bytes.Equal(x[from:to], b) {
					d.older[s] = put(d.older[s], d.sector(s))
					copy(d.sector(s), x)
					if to-from == sectorSize && len(d.late[s]) == 0 {
						d.seen(s)
					}
					return
				}
			}
		}
		if first == nil {
			first = d.wrong(s, got[s*sectorSize+from-off:s*sectorSize+to-off], d.sector(s)[from:to], len(d.also[s])+len(d.late[s]))
		}
	})
	return first
}

// seen ends the doubt about what a sector holds. A crash may still bring back what it may have held before.
func (d *device) seen(s int64) {
	for _, b := range d.also[s] {
		d.older[s] = put(d.older[s], b)
	}
	delete(d.also, s)
}

// describe is a sector's content in few words: the writes of this package begin with their number.
func describe(b []byte) string {
	if len(bytes.Trim(b, "\x00")) == 0 {
		return fmt.Sprintf("%d zeros", len(b))
	}
	return fmt.Sprintf("%q", b[:min(len(b), 16)])
}

func (d *device) wrong(s int64, got, want []byte, others int) error {
	where := ""
	for o := int64(0); o < int64(len(d.now))/sectorSize; o++ {
		if len(got) == sectorSize && bytes.Equal(d.sector(o), got) && !bytes.Equal(got, make([]byte, sectorSize)) {
			where = fmt.Sprintf(", which belongs to sector %d", o)
		}
	}
	return fmt.Errorf("sector %d holds %s%s, want %s or one of %d others", s, describe(got), where, describe(want), others)
}

// found compares what was found after a crash or a restart with what may be there, and takes it over. In the
// sectors of other's contents may be found as well (nil: none); all is durable after a power cut or a clean end.
func (d *device) found(got []byte, other *device, durable bool) error {
	if len(got) != len(d.now) {
		return fmt.Errorf("it has %d bytes, want %d", len(got), len(d.now))
	}
	for s := int64(0); s < int64(len(got))/sectorSize; s++ {
		b := got[s*sectorSize : (s+1)*sectorSize]
		list := d.possible(s)
		if other != nil {
			list = append(append(list, other.possible(s)...), other.merged[s]...)
			if other.doubted[s] {
				d.doubted[s] = true
			}
		}
		if !slices.ContainsFunc(list, func(x []byte) bool { return bytes.Equal(x, b) }) {
			return d.wrong(s, b, d.sector(s), len(list)-1)
		}
		delete(d.also, s)
		delete(d.late, s)
		if durable && !d.doubted[s] {
			delete(d.older, s)
		} else if len(list) > 1 {
			d.older[s] = slices.DeleteFunc(list, func(x []byte) bool { return bytes.Equal(x, b) })
			if len(d.older[s]) == 0 {
				delete(d.older, s)
			}
		}
		copy(d.sector(s), b)
	}
	return nil
}

// possible lists the contents that a sector may have after a crash.
func (d *device) possible(s int64) [][]byte {
	list := [][]byte{slices.Clone(d.sector(s))}
	for _, l := range [][][]byte{d.also[s], d.late[s], d.older[s]} {
		for _, b := range l {
			list = put(list, b)
		}
	}
	return list
}

// certain ends all doubts: the device is as the model has it, durably.
func (d *device) certain() {
	clear(d.also)
	clear(d.late)
	clear(d.older)
	clear(d.doubted)
}

// TestModel shows that the model notices what it is there for.
func TestModel(t *testing.T) {
	sector := func(c byte) []byte { return bytes.Repeat([]byte{c}, sectorSize) }
	d := newDevice(bytes.Repeat([]byte{'A'}, 4*sectorSize))
	snap := d.clone()
	d.write(sectorSize, sector('B'))
	if err := d.observe(0, slices.Concat(sector('A'), sector('B'), sector('A'), sector('A'))); err != nil {
		t.Error(err)
	}
	if d.observe(sectorSize, sector('A')) == nil {
		t.Error("an acknowledged write may not be seen")
	}
	if snap.observe(sectorSize, sector('B')) == nil {
		t.Error("a snapshot may change")
	}
	crash := func(d *device, c byte) error {
		return d.copyOf().found(slices.Concat(sector('A'), sector(c), sector('A'), sector('A')), nil, true)
	}
	if crash(d, 'A') != nil || crash(d, 'B') != nil || crash(d, 'C') == nil {
		t.Error("before a flush: old or new")
	}
	taken := d.clone()
	d.flushed()
	taken.flushed()
	if crash(d, 'A') == nil || crash(d, 'B') != nil {
		t.Error("after a flush: new")
	}
	d.attempt(sectorSize, sector('C'), false)
	d.flushed()
	if crash(d, 'B') != nil || crash(d, 'C') != nil || crash(d, 'A') == nil {
		t.Error("after a write that failed: both")
	}
	if err := d.observe(sectorSize, sector('C')); err != nil {
		t.Error(err)
	}
	if d.observe(sectorSize, sector('B')) == nil {
		t.Error("what was seen may go")
	}
	d.write(sectorSize, sector('D'))
	d.flushFailed()
	d.flushed()
	if crash(d, 'C') != nil {
		t.Error("after a failed flush a successful one says nothing")
	}
	// A write whose answer is not known, and a part of it written over: the whole of it may come back when it was overwritten again.
	d.write(sectorSize, sector('E'))
	d.attempt(sectorSize, sector('F'), true)
	d.write(sectorSize, []byte("x"))
	d.attempt(sectorSize, sector('G'), false)
	d.also[1], d.late = append(d.also[1], d.late[1]...), map[int64][][]byte{}
	if err := d.observe(sectorSize, sector('G')); err != nil {
		t.Error(err)
	}
	if d.copyOf().found(slices.Concat(sector('A'), with(sector('F'), 0, []byte("x")), sector('A'), sector('A')), nil, true) != nil {
		t.Error("what a write lay on may come back")
	}
	d.write(sectorSize, sector('E'))
	d.flushed()
	if crash(d, 'C') == nil || crash(d, 'D') == nil || crash(d, 'E') != nil {
		t.Error("written and flushed again")
	}
}

// copyOf returns an independent copy.
func (d *device) copyOf() *device {
	c := d.clone()
	c.merged = maps.Clone(d.merged)
	c.also, c.late = map[int64][][]byte{}, map[int64][][]byte{}
	for s, list := range d.also {
		c.also[s] = slices.Clone(list)
	}
	for s, list := range d.late {
		c.late[s] = slices.Clone(list)
	}
	return c
}
