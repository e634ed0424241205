package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Messages of vhost-user, features and request types that are used: docs/spec/vhost-user-blk.md.
const (
	getFeatures, setFeatures                 = 1, 2
	setOwner, setMemTable                    = 3, 5
	setVringNum, setVringAddr, setVringBase  = 8, 9, 10
	setVringKick, setVringCall               = 12, 13
	getProtocolFeatures, setProtocolFeatures = 15, 16
	setVringEnable, getConfig                = 18, 24

	featFlush, featIndirect, featEventIdx = 1 << 9, 1 << 28, 1 << 29
	featProtocol, featVersion1            = 1 << 30, 1 << 32
	protoReplyAck, protoConfig            = 1 << 3, 1 << 9

	descNext, descWrite, descIndirect = 1, 2, 4
	reqIn, reqOut, reqFlush           = 0, 1, 4
	sectorSize                        = 512
)

// The memory of the guest: its addresses differ from the front-end's.
//
//	0         4096     8192    12288            64 KiB                data
//	+---------+--------+-------+- … -+----------+--------------------+------+
//	|  descs  | avail  | used  |     | tables,  | headers, statuses  | data |
//	+---------+--------+-------+- … -+----------+--------------------+------+
const (
	ringSize  = 128
	guestBase = 0x10000000
	userBase  = 0x7f0000000000

	descAt   = 0
	availAt  = 4096
	usedAt   = 8192
	tablesAt = 32 << 10 // 64 bytes each
	headsAt  = 64 << 10 // 64 bytes each: header at 0, status at 32
	dataAt   = 128 << 10
)

// Vhost executes a job as the front-end of a vhost-user-blk back-end that listens on a unix socket. Requests lie in shared memory
// in one ring with indirect descriptors and event index, as Linux guests have them.
func Vhost(ctx context.Context, socket string, j Job) (Result, error) {
	if err := j.check(); err != nil {
		return Result{}, err
	}
	if j.Depth > ringSize || j.Block%sectorSize != 0 {
		return Result{}, fmt.Errorf("load: over vhost-user at most %d requests, of whole sectors", ringSize)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	v := &frontEnd{block: j.Block, depth: j.Depth, memfd: -1, kick: -1, call: -1}
	defer v.close()
	if err := v.connect(socket, int64(dataAt)+int64(j.Depth)*int64(j.Block)); err != nil {
		return Result{}, fmt.Errorf("load: %s: %w", socket, err)
	}
	if j.Size > v.size {
		return Result{}, fmt.Errorf("load: the disk has %d bytes", v.size)
	}
	return v.run(begin(ctx, j))
}

// frontEnd is a connection with one ring, whose driver it is too.
type frontEnd struct {
	c     *net.UnixConn
	memfd int
	kick  int
	call  int
	mem   []byte
	block int
	depth int
	size  int64 // of the disk, in bytes

	free     []uint16
	avail    uint16 // requests made available, as the ring counts
	notified uint16 // avail when the back-end was notified last
	seen     uint16 // requests completed
}

func (v *frontEnd) close() {
	if v.c != nil {
		v.c.Close()
	}
	if v.mem != nil {
		unix.Munmap(v.mem)
	}
	for _, fd := range []int{v.memfd, v.kick, v.call} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// connect connects and starts the ring.
func (v *frontEnd) connect(socket string, memory int64) (err error) {
	if v.memfd, err = unix.MemfdCreate("load", unix.MFD_CLOEXEC); err != nil {
		return err
	}
	if err = unix.Ftruncate(v.memfd, memory); err != nil {
		return err
	}
	if v.mem, err = unix.Mmap(v.memfd, 0, int(memory), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return err
	}
	if v.kick, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return err
	}
	if v.call, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return err
	}
	fill(v.mem[dataAt:])
	for i := range v.depth {
		v.free = append(v.free, uint16(i))
	}
	if v.c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"}); err != nil {
		return err
	}
	return v.negotiate(uint64(memory))
}

func (v *frontEnd) negotiate(memory uint64) error {
	offered, err := v.ask(getFeatures, nil)
	if err != nil {
		return err
	}
	const wanted = featFlush | featIndirect | featEventIdx | featProtocol | featVersion1
	if binary.LittleEndian.Uint64(offered)&wanted != wanted {
		return fmt.Errorf("features 0x%x: not all that are required", offered)
	}
	if _, err := v.ask(getProtocolFeatures, nil); err != nil {
		return err
	}
	for _, m := range []struct {
		request uint32
		payload []byte
		fds     []int
	}{
		{setProtocolFeatures, le(uint64(protoReplyAck | protoConfig)), nil},
		{setOwner, nil, nil},
		{setFeatures, le(uint64(wanted)), nil},
		{setMemTable, le(uint32(1), uint32(0), uint64(guestBase), memory, uint64(userBase), uint64(0)), []int{v.memfd}},
		{setVringCall, le(uint64(0)), []int{v.call}},
		{setVringNum, le(uint32(0), uint32(ringSize)), nil},
		{setVringBase, le(uint32(0), uint32(0)), nil},
		{setVringAddr, le(uint32(0), uint32(0), uint64(userBase+descAt), uint64(userBase+usedAt), uint64(userBase+availAt), uint64(0)), nil},
		{setVringKick, le(uint64(0)), []int{v.kick}},
		{setVringEnable, le(uint32(0), uint32(1)), nil},
	} {
		if err := v.set(m.request, m.payload, m.fds...); err != nil {
			return fmt.Errorf("message %d: %w", m.request, err)
		}
	}
	config, err := v.ask(getConfig, append(le(uint32(0), uint32(8), uint32(0)), make([]byte, 8)...))
	if err != nil || len(config) < 20 {
		return fmt.Errorf("configuration of %d bytes: %w", len(config), err)
	}
	v.size = int64(binary.LittleEndian.Uint64(config[12:])) * sectorSize
	return nil
}

func le(values ...any) (b []byte) {
	for _, x := range values {
		b, _ = binary.Append(b, binary.LittleEndian, x)
	}
	return b
}

// send sends a message.
//
//	0         4       8      12
//	+---------+-------+------+---- … ----+
//	| request | flags | size |  payload  |
//	+---------+-------+------+---- … ----+
func (v *frontEnd) send(request, flags uint32, payload []byte, fds []int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err := v.c.WriteMsgUnix(append(le(request, flags, uint32(len(payload))), payload...), rights, nil)
	return err
}

// ask sends a message that has a reply, and returns the reply's payload.
func (v *frontEnd) ask(request uint32, payload []byte) ([]byte, error) {
	if err := v.send(request, 1, payload, nil); err != nil {
		return nil, err
	}
	return v.reply(request)
}

// set sends a message that is only acknowledged.
func (v *frontEnd) set(request uint32, payload []byte, fds ...int) error {
	if err := v.send(request, 1|8, payload, fds); err != nil {
		return err
	}
	b, err := v.reply(request)
	if err == nil && (len(b) != 8 || binary.LittleEndian.Uint64(b) != 0) {
		err = errors.New("refused")
	}
	return err
}

func (v *frontEnd) reply(request uint32) ([]byte, error) {
	var head [12]byte
	if _, err := io.ReadFull(v.c, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[8:])
	if got := binary.LittleEndian.Uint32(head[:]); got != request || n > 4096 {
		return nil, fmt.Errorf("reply to %d of %d bytes", got, n)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(v.c, b)
	return b, err
}

func (v *frontEnd) run(s *schedule) (Result, error) {
	inFlight, flushing := 0, false
	kind := uint32(reqIn)
	if s.job.Write {
		kind = reqOut
	}
	for {
		s.round()
		for !flushing && inFlight < s.job.Depth {
			off, ok := s.next()
			if !ok {
				break
			}
			v.offer(kind, off)
			inFlight++
		}
		if flushing {
			v.offer(reqFlush, 0)
			inFlight++
		}
		if inFlight == 0 {
			return s.result()
		}
		if err := v.notify(); err != nil {
			return Result{}, err
		}
		done, err := v.wait()
		if err != nil {
			return Result{}, err
		}
		inFlight -= done
		flushing = s.job.Flush && done > 0 && !flushing
	}
}

// offer puts a request into the ring; notify makes it known.
func (v *frontEnd) offer(kind uint32, off int64) {
	id := v.free[len(v.free)-1]
	v.free = v.free[:len(v.free)-1]
	table, head, data := tablesAt+64*int(id), headsAt+64*int(id), dataAt+v.block*int(id)
	h := v.mem[head:]
	binary.LittleEndian.PutUint32(h, kind)
	binary.LittleEndian.PutUint64(h[8:], uint64(off/sectorSize))
	h[32] = 0xff
	v.descriptor(table, guestBase+head, 16, descNext, 1)
	n := 1
	if kind != reqFlush {
		flags := uint16(descNext)
		if kind == reqIn {
			flags |= descWrite
		}
		v.descriptor(table+16, guestBase+data, v.block, flags, 2)
		n = 2
	}
	v.descriptor(table+16*n, guestBase+head+32, 1, descWrite, 0)
	v.descriptor(descAt+16*int(id), guestBase+table, 16*(n+1), descIndirect, 0)
	binary.LittleEndian.PutUint16(v.mem[availAt+4+2*int(v.avail%ringSize):], id)
	v.avail++
}

func (v *frontEnd) descriptor(at, addr, n int, flags, next uint16) {
	b := v.mem[at:]
	binary.LittleEndian.PutUint64(b, uint64(addr))
	binary.LittleEndian.PutUint32(b[8:], uint32(n))
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// word is flags and index of a ring, which are read and written together: the flags are always 0.
func (v *frontEnd) word(at int) *uint32 { return (*uint32)(unsafe.Pointer(&v.mem[at])) }

// notify publishes what was offered, and kicks if the back-end wants that.
func (v *frontEnd) notify() error {
	old := v.notified
	if old == v.avail {
		return nil
	}
	atomic.StoreUint32(v.word(availAt), uint32(v.avail)<<16)
	v.notified = v.avail
	event := uint16(atomic.LoadUint32(v.word(usedAt + 4 + 8*ringSize)))
	if v.avail-event-1 >= v.avail-old {
		return nil
	}
	if _, err := unix.Write(v.kick, one[:]); err != nil && err != unix.EAGAIN {
		return fmt.Errorf("load: kick: %w", err)
	}
	return nil
}

var one = [8]byte{1}

// wait waits for at least one completion, and returns how many there are.
func (v *frontEnd) wait() (done int, err error) {
	for {
		for used := uint16(atomic.LoadUint32(v.word(usedAt)) >> 16); v.seen != used; v.seen++ {
			id := uint16(binary.LittleEndian.Uint32(v.mem[usedAt+4+8*int(v.seen%ringSize):]))
			if status := v.mem[headsAt+64*int(id)+32]; status != 0 {
				return 0, fmt.Errorf("load: a request ended with status %d", status)
			}
			v.free = append(v.free, id)
			done++
		}
		if done > 0 {
			return done, nil
		}
		// used_event: the next completion calls. It is checked again afterwards, since it may have come before.
		at := v.word(availAt + 4 + 2*ringSize)
		if atomic.SwapUint32(at, uint32(v.seen)); uint16(atomic.LoadUint32(v.word(usedAt))>>16) != v.seen {
			continue
		}
		if err := v.waitCall(); err != nil {
			return 0, err
		}
	}
}

// waitCall waits until the back-end calls, or is gone.
func (v *frontEnd) waitCall() error {
	var b [8]byte
	p := []unix.PollFd{{Fd: int32(v.call), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 10_000)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("load: poll: %w", err)
		case n == 0:
			return errors.New("load: no completion within ten seconds")
		}
		_, err = unix.Read(v.call, b[:])
		return err
	}
}
