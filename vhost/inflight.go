package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"golang.org/x/sys/unix"
)

// The in-flight area of a ring (§8): a header and an entry for each descriptor.
const (
	inflightHeader  = 16
	inflightEntry   = 16
	inflightVersion = 1
)

// inflightStride returns the size in bytes of the area of one ring.
func inflightStride(queueSize uint16) uint64 {
	return (inflightHeader + inflightEntry*uint64(queueSize) + 63) &^ 63
}

// validQueueSize reports whether a ring may have n entries.
func validQueueSize(n uint32) bool { return n >= 1 && n <= 32768 && bits.OnesCount32(n) == 1 }

// newInflight makes the memory for the in-flight areas of a front-end.
func newInflight(queues, queueSize uint16) (fd int, size uint64, err error) {
	size = uint64(queues)*inflightStride(queueSize) + unflushedSize
	fd, err = unix.MemfdCreate("vhost-inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, 0, err
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, size, nil
}

// An inflight is the in-flight area of one ring, in memory of the front-end. The zero value tracks nothing. Its methods
// are called under guard and the ring's lock.
type inflight struct {
	area    []byte
	counter uint64
}

func (f *inflight) entry(head uint16) []byte {
	return f.area[inflightHeader+inflightEntry*int(head):][:inflightEntry]
}

// begin marks head as in flight, before anything is done for it.
func (f *inflight) begin(head uint16) {
	if f.area == nil {
		return
	}
	e := f.entry(head)
	binary.LittleEndian.PutUint64(e[8:], f.counter)
	f.counter++
	fence()
	e[0] = 1
	fence()
}

// completing makes head the last batch, before used.idx says so.
func (f *inflight) completing(head uint16) {
	if f.area == nil {
		return
	}
	binary.LittleEndian.PutUint16(f.entry(head)[6:], binary.LittleEndian.Uint16(f.area[12:]))
	binary.LittleEndian.PutUint16(f.area[12:], head)
	fence()
}

// completed ends the batch of head, after used.idx was stored.
func (f *inflight) completed(head, usedIdx uint16) {
	if f.area == nil {
		return
	}
	fence()
	f.entry(head)[0] = 0
	fence()
	binary.LittleEndian.PutUint16(f.area[14:], usedIdx)
}

// recover makes the area agree with the used ring, and returns the heads that were in flight, oldest first. An area that
// was never used is initialised for n descriptors.
func (f *inflight) recover(n, usedIdx uint16) ([]uint16, error) {
	if f.area == nil {
		return nil, nil
	}
	if len(f.area) < inflightHeader+inflightEntry*int(n) {
		return nil, fmt.Errorf("in-flight area is too small for a ring of %d", n)
	}
	switch v := binary.LittleEndian.Uint16(f.area[8:]); v {
	case 0:
		clear(f.area)
		binary.LittleEndian.PutUint16(f.area[10:], n)
		binary.LittleEndian.PutUint16(f.area[14:], usedIdx)
		fence()
		binary.LittleEndian.PutUint16(f.area[8:], inflightVersion)
		return nil, nil
	case inflightVersion:
	default:
		return nil, fmt.Errorf("in-flight area has version %d", v)
	}
	if d := binary.LittleEndian.Uint16(f.area[10:]); d != n {
		return nil, fmt.Errorf("in-flight area is for a ring of %d, not %d", d, n)
	}
	// The last batch was done when used.idx was stored, and its entries may still be marked.
	done := usedIdx - binary.LittleEndian.Uint16(f.area[14:])
	if done > n {
		return nil, errors.New("in-flight area does not match the used ring")
	}
	for head := binary.LittleEndian.Uint16(f.area[12:]); done > 0; done-- {
		if head >= n {
			return nil, errors.New("in-flight area: batch list is broken")
		}
		e := f.entry(head)
		e[0] = 0
		head = binary.LittleEndian.Uint16(e[6:])
	}
	binary.LittleEndian.PutUint16(f.area[14:], usedIdx)

	type entry struct {
		head    uint16
		counter uint64
	}
	var list []entry
	for head := range n {
		if e := f.entry(head); e[0] != 0 {
			list = append(list, entry{head, binary.LittleEndian.Uint64(e[8:])})
		}
	}
	slices.SortStableFunc(list, func(a, b entry) int {
		switch {
		case a.counter < b.counter:
			return -1
		case a.counter > b.counter:
			return 1
		}
		return 0
	})
	var heads []uint16
	for _, e := range list {
		heads = append(heads, e.head)
		f.counter = max(f.counter, e.counter+1)
	}
	return heads, nil
}
