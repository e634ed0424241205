package vhost_test

import (
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// What a hostile guest does, one step after the other, each of 8 bytes:
//
//	0      1..3              4..7
//	kind   offset, 24 bits   value
//
// The low bits of kind: store the value at the offset of its memory (0, 4), set the available index to the value and kick (1), truncate
// the memory to the offset (2; nothing follows), ask for the ring base, which stops the ring (3), start the ring at the base
// value (5), kick (6, 7). Bit 7 of kind: before the ring is started.
const (
	doStore, doOffer, doTruncate, doStop, doStart, doKick = 0, 1, 2, 3, 5, 6

	early = 0x80
)

func step(kind byte, off int, value uint32) []byte {
	return append([]byte{kind, byte(off), byte(off >> 8), byte(off >> 16)}, le(value)...)
}

// store is steps that store bytes, four at a time.
func store(kind byte, off int, p []byte) (steps []byte) {
	for i := 0; i+4 <= len(p); i += 4 {
		steps = append(steps, step(kind, off+i, binary.LittleEndian.Uint32(p[i:]))...)
	}
	return steps
}

func descriptor(addr uint64, n uint32, flags, next uint16) []byte { return le(addr, n, flags, next) }

// guest puts requests of every kind into memory that nobody else uses: a read, a write, a flush, an identification, a discard and a
// write of zeros, by direct descriptors 0 to 17 and by indirect ones 20 to 25.
func (f *frontend) guest() {
	for i, kind := range []uint32{0, 1, 4, 8, 11, 13} {
		h, d, tab := headAt+64*i, dataAt+slot*i, tableAt+64*i
		copy(f.mem[h:], le(kind, uint32(0), uint64(8*i)))
		n, flags := uint32(4096), uint16(2)
		switch kind {
		case 1:
			flags = 0
		case 8:
			n = 20
		case 11, 13:
			n, flags = 16, 0
			copy(f.mem[d:], le(uint64(64*i), uint32(8), uint32(0)))
		}
		for at, first := range map[int]int{descOff: 3 * i, tab: 0} {
			f.put(at, first, gpa+uint64(h), 16, 1, uint16(first+1))
			f.put(at, first+1, gpa+uint64(d), n, flags|1, uint16(first+2))
			f.put(at, first+2, gpa+uint64(h)+32, 1, 2, 0)
		}
		f.put(descOff, 20+i, gpa+uint64(tab), 48, 4, 0)
		binary.LittleEndian.PutUint16(f.mem[availAt+4+4*i:], uint16(3*i))
		binary.LittleEndian.PutUint16(f.mem[availAt+6+4*i:], uint16(20+i))
	}
}

// attack executes a step and reports whether there can be another one.
func (f *frontend) attack(kind byte, off int, value uint32) bool {
	switch kind &^ early & 7 {
	case doOffer:
		binary.LittleEndian.PutUint16(f.mem[availAt+2:], uint16(value))
		unix.Write(f.kick, le(uint64(1)))
	case doTruncate:
		unix.Ftruncate(f.fd, int64(off))
		unix.Write(f.kick, le(uint64(1)))
		return false
	case doStop:
		f.send(11, 1, le(uint32(0), uint32(0)))
		_, _, err := f.reply(11)
		return err == nil
	case doStart:
		f.send(10, 1, le(uint32(0), value&0xffff))
		f.send(12, 1, le(uint64(0)), f.kick)
	case doKick, 7:
		unix.Write(f.kick, le(uint64(1)))
	default:
		copy(f.mem[off%(memSize-4):], le(value))
	}
	return true
}

// settle waits until the back-end has done what it can with what is available: all of it, or it has stopped the ring, or the connection.
// Nobody can know whether it is about to where neither comes: then a moment is enough. mapped: the memory can still be read.
func (f *frontend) settle(errfd int, mapped bool) {
	fd := -1
	raw, _ := f.c.SyscallConn()
	raw.Control(func(c uintptr) { fd = int(c) })
	for end := time.Now().Add(100 * time.Millisecond); time.Now().Before(end); {
		fds := []unix.PollFd{{Fd: int32(errfd), Events: unix.POLLIN}, {Fd: int32(fd), Events: unix.POLLRDHUP}}
		if n, _ := unix.Poll(fds, 1); n > 0 {
			return
		}
		if mapped && binary.LittleEndian.Uint16(f.mem[usedAt+2:]) == binary.LittleEndian.Uint16(f.mem[availAt+2:]) {
			return
		}
	}
}

// FuzzGuest is a guest that writes whatever it likes into its rings, tables and buffers, before they are used and meanwhile. It reaches
// nothing outside of its disk, another front-end is served afterwards, and nothing is left of it.
func FuzzGuest(f *testing.F) {
	all := step(doOffer, 0, 12)
	f.Add(all)
	add := func(steps ...[]byte) {
		var b []byte
		for _, s := range steps {
			b = append(b, s...)
		}
		f.Add(b)
	}
	// Indices out of range: of the available ring, of heads, of next.
	add(step(doOffer, 0, size+1))
	add(step(doStore|early, availAt+4, 0xffff0000|size), all)
	add(store(early, descOff, descriptor(gpa+headAt, 16, 1, 0xffff)), all)
	add(step(doStart, 0, 0xfff0), step(doOffer, 0, 0xffff), step(doOffer, 0, 4))
	// Loops, in the ring and in a table; a table within a table; a chain that is too long.
	add(store(early, descOff, descriptor(gpa+headAt, 16, 1, 0)), all)
	add(store(early, tableAt, descriptor(gpa+headAt, 16, 1, 0)), all)
	add(store(early, tableAt, descriptor(gpa+tableAt, 48, 4, 0)), all)
	var long []byte
	for i := range uint16(size) {
		long = append(long, descriptor(gpa+headAt, 16, 1, (i+1)%size)...)
	}
	add(store(early, descOff, long), all)
	add(store(early, descOff+16*20, descriptor(gpa+tableAt, 16*4096, 4, 0)), all)
	// Lengths that overflow, alone and together; addresses that wrap, and outside.
	add(store(early, descOff+16, descriptor(gpa+dataAt, 0xffffffff, 3, 2)), all)
	add(store(early, tableAt, append(descriptor(gpa+dataAt, 0xffffff00, 1, 1), descriptor(gpa+dataAt, 0xffffff00, 3, 2)...)), all)
	add(store(early, descOff+16, descriptor(1<<64-8, 4096, 3, 2)), all)
	add(store(early, descOff+16, descriptor(gpa+memSize-100, 4096, 3, 2)), all)
	add(store(early, descOff+16*20, descriptor(1<<64-16, 48, 4, 0)), all)
	add(store(early, headAt, le(uint32(0), uint32(0), uint64(1<<63))), all)
	add(store(early, dataAt+4*slot, le(uint64(1<<64-8), uint32(0xffffffff), uint32(0))), all)
	// Ranges that end behind the end of the disk.
	add(store(early, headAt+64, le(uint32(1), uint32(0), uint64(1<<20/512))), store(early, headAt+64*5, le(uint32(1), uint32(0), uint64(1<<20/512-1))), all)
	add(store(early, dataAt+4*slot, le(uint64(1<<20/512-1), uint32(8), uint32(0))), store(early, dataAt+5*slot, le(uint64(1<<20/512), uint32(8), uint32(0))), all)
	// No status, a status that is readable, no header.
	add(store(early, descOff+32, descriptor(gpa+headAt+32, 0, 2, 0)), all)
	add(store(early, descOff+32, descriptor(gpa+headAt+32, 1, 0, 0)), all)
	add(store(early, descOff, descriptor(gpa+headAt, 3, 1, 1)), all)
	// Memory that changes and goes away meanwhile.
	add(all, store(0, descOff, descriptor(1, 2, 3, 4)), store(0, tableAt, long[:48]), step(doOffer, 0, 24), store(0, headAt, le(uint32(99), uint32(1), uint64(7))))
	add(all, step(doTruncate, 0, 0))
	add(all, step(doTruncate, dataAt+100, 0))
	add(step(doTruncate|early, usedAt, 0), all)
	add(all, step(doStop, 0, 0), step(doStart, 0, 3), all, step(doStop, 0, 0))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 4096 {
			return
		}
		const disk, guard = 1 << 20, 64 << 10
		mem := block.MemoryFrom(blocktest.Pattern(disk+guard, 1))
		_, path := serve(t, limited{block.NewForward(mem), disk}, nil)
		c := dial(t, path)
		c.negotiate(allFeatures)
		errfd, _ := unix.Eventfd(0, unix.EFD_NONBLOCK)
		defer unix.Close(errfd)
		c.set(14, le(uint64(0)), errfd)
		c.guest()
		more := true
		for when := range 2 {
			for i := 0; i+8 <= len(p) && more; i += 8 {
				if (p[i]&early != 0) == (when == 0) {
					more = c.attack(p[i], int(p[i+1])|int(p[i+2])<<8|int(p[i+3])<<16, binary.LittleEndian.Uint32(p[i+4:]))
				}
			}
			if when == 0 && more {
				c.send(13, 1, le(uint64(0)), c.call)
				c.send(8, 1, le(uint32(0), uint32(size)))
				c.send(9, 1, le(uint32(0), uint32(0), uint64(ua+descOff), uint64(ua+usedAt), uint64(ua+availAt), uint64(0)))
				c.send(18, 1, le(uint32(0), uint32(1)))
				c.send(12, 1, le(uint64(0)), c.kick)
			}
		}
		c.settle(errfd, more)
		c.send(11, 1, le(uint32(0), uint32(0))) // completes what is in flight
		c.reply(11)
		c.close()
		connect(t, path).want(0, 0, 0, make([]byte, 512), false)
		behind := make([]byte, guard)
		if _, err := mem.ReadAt(behind, disk); err != nil || string(behind) != string(blocktest.Pattern(disk+guard, 1)[disk:]) {
			t.Error("bytes behind the end of the disk were changed")
		}
	})
}

// limited is the first part of a device.
type limited struct {
	block.Forward
	size int64
}

func (l limited) Size() int64 { return l.size }
