package vhost_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/vhost"
)

// The guest's memory: addresses that differ between guest and front-end, so that a mix-up is found.
const (
	gpa     = 0x10000000
	ua      = 0x7f0000000000
	memSize = 8 << 20
	descOff = 0x0
	availAt = 0x2000
	usedAt  = 0x3000
	tableAt = 0x4000 // indirect tables, 64 bytes each
	headAt  = 0x8000 // headers and statuses, 64 bytes each
	longAt  = 0xa000 // an indirect table of up to 256 descriptors
	dataAt  = 0x10000
	slot    = 64 << 10 // bytes of data of a request
	size    = 64       // of the ring
)

const (
	allFeatures = 1<<2 | 1<<6 | 1<<9 | 1<<11 | 1<<12 | 1<<13 | 1<<14 | 1<<28 | 1<<29 | 1<<30 | 1<<32
	allProtocol = 0x9229
)

// A frontend is a front-end with a driver on one ring.
type frontend struct {
	t    testing.TB
	c    *net.UnixConn
	fd   int
	mem  []byte
	kick int
	call int

	mu       sync.Mutex
	features uint64
	avail    uint16
	seen     uint16
	free     []uint16
	waiting  [size]chan struct{}
	cond     *sync.Cond
	dead     atomic.Bool // closed
	gone     atomic.Bool // the back-end is, as far as somebody watches
}

func serve(t testing.TB, dev block.Device, change func(e *vhost.Export)) (s *vhost.Server, path string) {
	t.Helper()
	return serveLogged(t, dev, change, func(line string) { t.Log(line) })
}

func serveLogged(t testing.TB, dev block.Device, change func(e *vhost.Export), log func(line string)) (s *vhost.Server, path string) {
	t.Helper()
	s = vhost.NewServer(testhost.ShortDir(t), vhost.Options{Log: log})
	e := vhost.Export{Name: "a", Device: dev, CanTrim: true}
	if change != nil {
		change(&e)
	}
	if err := s.Add(e); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Serve(ctx)
	})
	return s, s.Path("a")
}

func dial(t testing.TB, path string) *frontend {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	f := &frontend{t: t, c: c}
	f.cond = sync.NewCond(&f.mu)
	f.fd, err = unix.MemfdCreate("guest", 0)
	if err == nil {
		err = unix.Ftruncate(f.fd, memSize)
	}
	if err == nil {
		f.mem, err = unix.Mmap(f.fd, 0, memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.newEvents()
	for i := range size {
		f.free = append(f.free, uint16(i))
	}
	t.Cleanup(f.close)
	return f
}

func (f *frontend) newEvents() {
	f.kick, _ = unix.Eventfd(0, unix.EFD_NONBLOCK)
	f.call, _ = unix.Eventfd(0, 0)
}

func (f *frontend) close() {
	if f.dead.Swap(true) {
		return
	}
	f.c.Close()
	f.mu.Lock()
	f.cond.Broadcast()
	f.mu.Unlock()
	unix.Close(f.fd)
	unix.Close(f.kick)
	unix.Close(f.call)
}

func le(v ...any) (b []byte) {
	for _, x := range v {
		b, _ = binary.Append(b, binary.LittleEndian, x)
	}
	return b
}

// send sends a message; flags 9 asks for an acknowledgement.
func (f *frontend) send(req, flags uint32, payload []byte, fds ...int) error {
	b := append(le(req, flags, uint32(len(payload))), payload...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := f.c.WriteMsgUnix(b, oob, nil)
	return err
}

// reply reads a reply and its descriptor.
func (f *frontend) reply(req uint32) (payload []byte, fd int, err error) {
	f.c.SetReadDeadline(time.Now().Add(20 * time.Second))
	var head [12]byte
	oob := make([]byte, 64)
	n, oobn, _, _, err := f.c.ReadMsgUnix(head[:], oob)
	if err == nil && n < 12 {
		err = io.EOF
	}
	if err != nil {
		return nil, -1, err
	}
	if got := binary.LittleEndian.Uint32(head[0:]); got != req || binary.LittleEndian.Uint32(head[4:]) != 5 {
		return nil, -1, fmt.Errorf("reply header % x to request %d", head, req)
	}
	fd = -1
	if oobn > 0 {
		list, _ := unix.ParseSocketControlMessage(oob[:oobn])
		fds, _ := unix.ParseUnixRights(&list[0])
		fd = fds[0]
	}
	payload = make([]byte, binary.LittleEndian.Uint32(head[8:]))
	_, err = io.ReadFull(f.c, payload)
	return payload, fd, err
}

// get sends a request that has a reply.
func (f *frontend) get(req uint32, payload []byte) []byte {
	f.t.Helper()
	if err := f.send(req, 1, payload); err != nil {
		f.t.Fatal(err)
	}
	b, _, err := f.reply(req)
	if err != nil {
		f.t.Fatalf("request %d: %v", req, err)
	}
	return b
}

// try sends a request and returns whether it was acknowledged as done.
func (f *frontend) try(req uint32, payload []byte, fds ...int) bool {
	f.t.Helper()
	if err := f.send(req, 9, payload, fds...); err != nil {
		f.t.Fatal(err)
	}
	b, _, err := f.reply(req)
	if err != nil || len(b) != 8 {
		f.t.Fatalf("request %d: % x, %v", req, b, err)
	}
	return binary.LittleEndian.Uint64(b) == 0
}

func (f *frontend) set(req uint32, payload []byte, fds ...int) {
	f.t.Helper()
	if !f.try(req, payload, fds...) {
		f.t.Fatalf("request %d was refused", req)
	}
}

// negotiate does what QEMU does before it starts a device.
func (f *frontend) negotiate(features uint64) {
	f.t.Helper()
	offered := binary.LittleEndian.Uint64(f.get(1, nil))
	f.features = features & offered
	f.set(16, le(binary.LittleEndian.Uint64(f.get(15, nil))&allProtocol))
	f.set(3, nil)
	f.set(2, le(f.features))
	f.set(37, le(uint64(0), uint64(gpa), uint64(memSize), uint64(ua), uint64(0)), f.fd)
}

// start starts ring 0 at a base.
func (f *frontend) start(base uint16) {
	f.t.Helper()
	f.set(13, le(uint64(0)), f.call)
	f.set(8, le(uint32(0), uint32(size)))
	f.set(10, le(uint32(0), uint32(base)))
	f.set(9, le(uint32(0), uint32(0), uint64(ua+descOff), uint64(ua+usedAt), uint64(ua+availAt), uint64(0)))
	f.set(18, le(uint32(0), uint32(1)))
	f.set(12, le(uint64(0)), f.kick)
}

func (f *frontend) u32(off int) *uint32 { return (*uint32)(unsafe.Pointer(&f.mem[off])) }

// put writes a descriptor.
func (f *frontend) put(at, i int, addr uint64, n uint32, flags, next uint16) {
	copy(f.mem[at+16*i:], le(addr, n, flags, next))
}

// offer makes heads available and kicks. The caller holds mu.
func (f *frontend) offer(heads ...uint16) {
	for _, head := range heads {
		binary.LittleEndian.PutUint16(f.mem[availAt+4+2*int(f.avail%size):], head)
		f.avail++
	}
	atomic.StoreUint32(f.u32(availAt), uint32(f.avail)<<16)
	unix.Write(f.kick, le(uint64(1)))
}

// poll takes completions out of the used ring.
func (f *frontend) poll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for used := uint16(atomic.LoadUint32(f.u32(usedAt)) >> 16); f.seen != used; f.seen++ {
		head := binary.LittleEndian.Uint32(f.mem[usedAt+4+8*int(f.seen%size):])
		if ch := f.waiting[head]; ch != nil {
			close(ch)
			f.waiting[head] = nil
		}
	}
	// used_event: a call for the next one
	binary.LittleEndian.PutUint16(f.mem[availAt+4+2*size:], f.seen)
}

var errGone = errors.New("the back-end is gone")

// A request is in the ring, or about to be.
type request struct {
	head uint16
	done chan struct{}
}

// do executes a request through an indirect table and returns its status. data is read from or written to.
func (f *frontend) do(kind uint32, sector uint64, data []byte, write bool) (status byte, err error) {
	f.mu.Lock()
	r, err := f.prepare(kind, sector, data, write)
	if err == nil {
		f.offer(r.head)
	}
	f.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if write {
		data = nil
	}
	return f.wait(r, data)
}

// prepare takes a free head, when there is one, for a request. The caller holds mu.
func (f *frontend) prepare(kind uint32, sector uint64, data []byte, write bool) (request, error) {
	for len(f.free) == 0 && !f.dead.Load() {
		f.cond.Wait()
	}
	if f.dead.Load() {
		return request{}, errGone
	}
	head := f.free[len(f.free)-1]
	f.free = f.free[:len(f.free)-1]
	r := request{head, make(chan struct{})}
	f.waiting[head] = r.done
	h, d, tab := headAt+64*int(head), dataAt+slot*int(head), tableAt+64*int(head)
	copy(f.mem[h:], le(kind, uint32(16388), sector))
	f.mem[h+32] = 0xff
	var flags uint16
	if write {
		copy(f.mem[d:], data)
	} else {
		flags = 2
	}
	n := 2
	f.put(tab, 0, gpa+uint64(h), 16, 1, 1)
	if len(data) > 0 {
		f.put(tab, 1, gpa+uint64(d), uint32(len(data)), flags|1, 2)
		n = 3
	}
	f.put(tab, n-1, gpa+uint64(h)+32, 1, 2, 0)
	f.put(descOff, int(head), gpa+uint64(tab), uint32(16*n), 4, 0)
	return r, nil
}

// wait waits for the status of a request, and copies what it has read to data.
func (f *frontend) wait(r request, data []byte) (status byte, err error) {
	for deadline := time.Now().Add(20 * time.Second); ; {
		f.poll()
		select {
		case <-r.done:
			copy(data, f.mem[dataAt+slot*int(r.head):])
			status = f.mem[headAt+64*int(r.head)+32]
			f.mu.Lock()
			f.free = append(f.free, r.head)
			f.cond.Signal()
			f.mu.Unlock()
			return status, nil
		case <-time.After(20 * time.Microsecond):
		}
		if f.gone.Load() {
			return 0, errGone
		}
		if time.Now().After(deadline) {
			return 0, errors.New("no completion in 20 s")
		}
	}
}

// A client is a front-end as a block.Device.
type client struct {
	*frontend
	size int64
}

func connect(t testing.TB, path string) *client {
	f := dial(t, path)
	f.negotiate(allFeatures)
	f.start(0)
	b := f.get(24, append(le(uint32(0), uint32(8), uint32(0)), make([]byte, 8)...))
	return &client{f, 512 * int64(binary.LittleEndian.Uint64(b[12:]))}
}

func (c *client) Size() int64 { return c.size }

func (c *client) ok(status byte, err error) error {
	switch {
	case err != nil:
		return err
	case status != 0:
		return fmt.Errorf("status %d: %w", status, syscall.EIO)
	}
	return nil
}

// sectors calls do with the sectors around a range, as kernels do for users of a disk; change says that they are written.
func (c *client) transfer(op string, p []byte, off int64, write bool) (int, error) {
	if err := block.CheckRange(op, off, int64(len(p)), c.size); err != nil {
		return 0, err
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		from := at &^ 511
		n := min(int64(slot), (off+int64(len(p))+511)&^511-from)
		b := make([]byte, n)
		if !write || from < at || from+n > off+int64(len(p)) {
			if err := c.ok(c.do(0, uint64(from/512), b, false)); err != nil {
				return done, err
			}
		}
		if write {
			m := copy(b[at-from:], p[done:])
			if err := c.ok(c.do(1, uint64(from/512), b, true)); err != nil {
				return done, err
			}
			done += m
		} else {
			done += copy(p[done:], b[at-from:])
		}
	}
	return len(p), nil
}

// whole returns the sectors that lie in a range as a whole: the first, and how many.
func whole(off, n int64) (first, count int64) {
	first = (off + 511) / 512
	return first, max(0, (off+n)/512-first)
}

// ranges sends a request that has a segment for the whole sectors of a range, in pieces that the device takes.
func (c *client) ranges(kind, flags uint32, first, count int64) error {
	for count > 0 {
		m := min(count, 64<<10)
		if err := c.ok(c.do(kind, 0, le(uint64(first), uint32(m), flags), true)); err != nil {
			return err
		}
		first, count = first+m, count-m
	}
	return nil
}

// ZeroAt zeroes whole sectors by WRITE_ZEROES and the edges by writes.
func (c *client) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := block.CheckRange("zero", off, n, c.size); err != nil {
		return err
	}
	if c.features&(1<<14) == 0 || flags&block.OnlyFast != 0 {
		return block.ErrNotFast
	}
	var unmap uint32
	if flags&block.KeepAllocated == 0 {
		unmap = 1
	}
	first, count := whole(off, n)
	if count == 0 {
		_, err := c.WriteAt(make([]byte, n), off)
		return err
	}
	if _, err := c.WriteAt(make([]byte, 512*first-off), off); err != nil {
		return err
	}
	if err := c.ranges(13, unmap, first, count); err != nil {
		return err
	}
	end := 512 * (first + count)
	_, err := c.WriteAt(make([]byte, off+n-end), end)
	return err
}

// Discard discards whole sectors.
func (c *client) Discard(off, n int64) error {
	if err := block.CheckRange("discard", off, n, c.size); err != nil || c.features&(1<<13) == 0 {
		return err
	}
	first, count := whole(off, n)
	return c.ranges(11, 0, first, count)
}

func (c *client) ReadAt(p []byte, off int64) (int, error)  { return c.transfer("read", p, off, false) }
func (c *client) WriteAt(p []byte, off int64) (int, error) { return c.transfer("write", p, off, true) }
func (c *client) Flush() error                             { return c.ok(c.do(4, 0, nil, false)) }
