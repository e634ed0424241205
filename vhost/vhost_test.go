package vhost_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/vhost"
)

func TestConformance(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		_, path := serve(t, block.NewMemory(1<<20), nil)
		return connect(t, path)
	})
}

// want executes a request and checks its status.
func (c *client) want(status byte, kind uint32, sector uint64, data []byte, write bool) {
	c.t.Helper()
	if got, err := c.do(kind, sector, data, write); err != nil || got != status {
		c.t.Fatalf("request %d at sector %d: status %d (%v), not %d", kind, sector, got, err, status)
	}
}

func TestRequests(t *testing.T) {
	dev := block.NewMemory(1 << 20)
	_, path := serve(t, dev, func(e *vhost.Export) { e.ID = "serial-0123456789-0123456789" })
	c := connect(t, path)
	last := uint64(1<<20/512 - 1)
	p := blocktest.Pattern(4096, 1)
	c.want(0, 1, last-7, p, true)
	got := make([]byte, 4096)
	c.want(0, 0, last-7, got, false)
	if !bytes.Equal(got, p) {
		t.Fatal("other data")
	}
	for _, sector := range []uint64{last - 6, last + 1, 1 << 55, 1<<64 - 1, 1<<64 - 8} {
		c.want(1, 0, sector, got, false)
		c.want(1, 1, sector, got, true)
	}
	c.want(1, 0, 0, nil, false)
	c.want(1, 1, 0, got[:100], true)
	c.want(2, 3, 0, nil, false)
	c.want(2, 99, 0, got, true)
	c.want(0, 4, 77, nil, false)
	id := make([]byte, 20)
	c.want(0, 8, 0, id, false)
	if string(id) != "serial-0123456789-01" {
		t.Fatalf("serial number %q", id)
	}
	c.want(0, 13, 0, le(last-7, uint32(4), uint32(0)), true)
	c.want(0, 0, last-7, got, false)
	if !bytes.Equal(got[:2048], make([]byte, 2048)) || !bytes.Equal(got[2048:], p[2048:]) {
		t.Fatal("WRITE_ZEROES zeroed something else")
	}
	c.want(0, 11, 0, le(last-7, uint32(8), uint32(0)), true)
	c.want(2, 11, 0, le(last-7, uint32(8), uint32(1)), true) // unmap is no flag of DISCARD
	c.want(2, 13, 0, le(last-7, uint32(8), uint32(2)), true)
	c.want(1, 13, 0, le(last, uint32(8), uint32(0)), true)
	c.want(1, 13, 0, le(uint64(1<<64-1), uint32(8), uint32(0)), true)
	c.want(1, 11, 0, make([]byte, 32), true) // two segments
}

func TestReadOnly(t *testing.T) {
	dev := block.NewMemory(1 << 16)
	_, path := serve(t, dev, func(e *vhost.Export) { e.ReadOnly = true })
	c := connect(t, path)
	c.want(1, 1, 0, blocktest.Pattern(512, 1), true)
	c.want(2, 13, 0, le(uint64(0), uint32(8), uint32(0)), true)
	got := make([]byte, 512)
	c.want(0, 0, 0, got, false)
	if !bytes.Equal(got, make([]byte, 512)) {
		t.Fatal("a read-only export was written")
	}
}

// A write is durable when it completes where the driver has no write cache, or turned it off; else after a flush.
func TestWriteThrough(t *testing.T) {
	dev := blocktest.NewCrash(make([]byte, 1<<16))
	_, path := serve(t, dev, nil)
	c := connect(t, path)
	p := blocktest.Pattern(512, 1)
	durable := func(sector int) bool { return bytes.Equal(dev.Durable()[512*sector:][:512], p) }
	c.want(0, 1, 0, p, true)
	if durable(0) {
		t.Fatal("durable without a flush: the test shows nothing")
	}
	c.set(25, append(le(uint32(32), uint32(1), uint32(0)), 0))
	if !durable(0) {
		t.Fatal("turning the write cache off did not flush")
	}
	if b := c.get(24, append(le(uint32(32), uint32(1), uint32(0)), 0)); b[12] != 0 {
		t.Fatal("writeback is still 1")
	}
	c.want(0, 1, 1, p, true)
	if !durable(1) {
		t.Fatal("a write is not durable with the write cache off")
	}
	for _, bad := range [][]byte{append(le(uint32(31), uint32(1), uint32(0)), 0), append(le(uint32(32), uint32(1), uint32(0)), 2), le(uint32(32), uint32(0), uint32(0))} {
		if c.try(25, bad) {
			t.Fatalf("SET_CONFIG % x was accepted", bad)
		}
	}

	dev2 := blocktest.NewCrash(make([]byte, 1<<16))
	_, path = serve(t, dev2, nil)
	f := dial(t, path)
	f.negotiate(allFeatures &^ (1<<9 | 1<<11 | 1<<29)) // as firmware: neither FLUSH nor CONFIG_WCE, no event index
	f.start(0)
	c = &client{f, 1 << 16}
	c.want(0, 1, 0, p, true)
	if !bytes.Equal(dev2.Durable()[:512], p) {
		t.Fatal("firmware's write is not durable")
	}
}

// inflightFD asks for in-flight memory and sets it.
func (f *frontend) inflightFD() (fd int, payload []byte) {
	f.t.Helper()
	if err := f.send(31, 1, le(uint64(0), uint64(0), uint16(1), uint16(size), uint32(0))); err != nil {
		f.t.Fatal(err)
	}
	payload, fd, err := f.reply(31)
	if err != nil || fd < 0 {
		f.t.Fatal(err)
	}
	f.set(32, payload, fd)
	return fd, payload
}

// After a back-end ended with a request in flight, the next one executes it once, and goes on behind it, whatever base
// the front-end sends.
func TestReconnectResumesInFlight(t *testing.T) {
	release := make(chan struct{})
	held := make(chan struct{}, 8)
	mem := block.NewMemory(1 << 20)
	dev := blocktest.NewFaulty(mem, func(op blocktest.Op) error {
		if op.Kind == blocktest.Write && op.Off == 4096 {
			select {
			case <-release:
			default:
				return full{release, held}
			}
		}
		return nil
	})
	_, path := serve(t, dev, nil)
	f := dial(t, path)
	f.negotiate(allFeatures)
	fd, payload := f.inflightFD()
	defer unix.Close(fd)
	f.start(0)
	c := &client{f, 1 << 20}
	p := blocktest.Pattern(4096, 3)
	for range 7 {
		c.want(0, 1, 0, p, true)
	}
	done := make(chan error, 1)
	go func() {
		done <- c.ok(c.do(1, 8, p, true))
	}()
	<-held // it was fetched, and waits for space
	f.c.Close()

	// The same guest with a new connection.
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	close(release)
	f.c = conn
	f.negotiate(allFeatures)
	f.set(32, payload, fd)
	f.start(7)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for range 100 {
		c.want(0, 1, 16, p, true)
	}
	f.poll()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seen != f.avail {
		t.Fatalf("%d completions of %d requests", f.seen, f.avail)
	}
	got := make([]byte, 4096)
	mem.ReadAt(got, 4096)
	if !bytes.Equal(got, p) {
		t.Fatal("the request in flight was lost")
	}
}

// When a back-end is killed, what it completed and did not flush may be lost: each flush fails until the driver starts anew.
// Nothing is lost when all was flushed, or when the back-end ended in order.
func TestReconnectAfterUnflushedWrites(t *testing.T) {
	for _, c := range []struct {
		name                           string
		write, flush, killed, wantLost bool
	}{
		{"killed", true, false, true, true},
		{"killed after a flush", true, true, true, false},
		{"killed after reads", false, false, true, false},
		{"ended in order", true, false, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, path := serve(t, block.NewMemory(1<<20), nil)
			f := dial(t, path)
			f.negotiate(allFeatures)
			fd, payload := f.inflightFD()
			defer unix.Close(fd)
			f.start(0)
			guest := &client{f, 1 << 20}
			p := blocktest.Pattern(4096, 3)
			guest.want(0, 4, 0, nil, false)
			if c.write {
				guest.want(0, 1, 8, p, true)
			}
			if c.flush {
				guest.want(0, 4, 0, nil, false)
			}
			guest.want(0, 0, 0, make([]byte, 512), false)
			// A process that is killed leaves the memory as it is now.
			left := make([]byte, binary.LittleEndian.Uint64(payload))
			if _, err := unix.Pread(fd, left, 0); err != nil {
				t.Fatal(err)
			}
			f.c.Close()
			_, other := serve(t, block.NewMemory(1<<20), nil) // of another process; waits for the session that is ending
			if c.killed {
				time.Sleep(100 * time.Millisecond)
				if _, err := unix.Pwrite(fd, left, 0); err != nil {
					t.Fatal(err)
				}
			} else {
				dial(t, path).close() // is served when the first session has ended
			}
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: other, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			f.c = conn
			f.negotiate(allFeatures)
			f.set(32, payload, fd)
			f.start(0)
			for range 2 {
				if err := guest.ok(guest.do(4, 0, nil, false)); (err != nil) != c.wantLost {
					t.Fatalf("flush: %v", err)
				}
			}
			if c.wantLost {
				guest.want(0, 1, 8, p, true) // writes go on
				fresh, _ := f.inflightFD()
				defer unix.Close(fresh)
				guest.want(0, 4, 0, nil, false)
			}
		})
	}
}

// full is a block.RetryLater.
type full struct{ ch, held chan struct{} }

func (full) Error() string { return "no space" }
func (e full) Retry() <-chan struct{} {
	select {
	case e.held <- struct{}{}:
	default:
	}
	return e.ch
}

// startRing starts a ring for a driver with these features. errfd is signalled when the back-end stops it, and log has the lines of the
// back-end's log.
func startRing(t *testing.T, dev block.Device, features uint64) (f *frontend, path string, errfd int, log <-chan string) {
	t.Helper()
	lines := make(chan string, 8)
	_, path = serveLogged(t, dev, nil, func(line string) { lines <- line })
	f = dial(t, path)
	f.negotiate(features)
	errfd, _ = unix.Eventfd(0, 0)
	t.Cleanup(func() { unix.Close(errfd) })
	f.set(14, le(uint64(0)), errfd)
	f.start(0)
	return f, path, errfd, lines
}

// stopsRing wants that the back-end signals the error descriptor of a ring, and says why.
func (f *frontend) stopsRing(errfd int, log <-chan string, says string) {
	f.t.Helper()
	fds := []unix.PollFd{{Fd: int32(errfd), Events: unix.POLLIN}}
	if n, _ := unix.Poll(fds, 10000); n != 1 {
		f.t.Fatal("the error descriptor was not signalled")
	}
	if line := <-log; !strings.Contains(line, "stopped: ") || !strings.Contains(line, says) {
		f.t.Errorf("%q, want %q", line, says)
	}
}

// A driver that breaks the rules loses its ring, not the control socket, and another front-end is served afterwards. Each rule is
// checked by itself: the reason is that rule's.
func TestHostileRings(t *testing.T) {
	long := func(n int) func(f *frontend) {
		return func(f *frontend) {
			for i := range n {
				f.put(longAt, i, gpa+headAt, 16, 1, uint16(i+1))
			}
			f.put(descOff, 0, gpa+longAt, uint32(16*n), 4, 0)
			f.offer(0)
		}
	}
	for name, c := range map[string]struct {
		says   string
		attack func(f *frontend)
	}{
		"head outside": {"available descriptor 64 is outside", func(f *frontend) { f.offer(size) }},
		"index jumps":  {"available index 66 is more than 64 entries after 0", func(f *frontend) { f.avail += size + 1; f.offer(0) }},
		"loop": {"more than 128 descriptors", func(f *frontend) {
			f.put(descOff, 0, gpa+headAt, 16, 1, 1)
			f.put(descOff, 1, gpa+headAt, 16, 1, 0)
			f.offer(0)
		}},
		"next outside":          {"descriptor 64 is outside a table of 64", func(f *frontend) { f.put(descOff, 0, gpa+headAt, 16, 1, size); f.offer(0) }},
		"next outside of table": {"descriptor 128 is outside a table of 128", long(128)},
		"nested indirect": {"indirect descriptor where none may be", func(f *frontend) {
			f.put(descOff, 0, gpa+tableAt, 16, 4, 0)
			f.put(tableAt, 0, gpa+headAt, 16, 4, 0)
			f.offer(0)
		}},
		"indirect with next": {"indirect descriptor where none may be", func(f *frontend) {
			f.put(descOff, 0, gpa+tableAt, 16, 5, 1)
			f.offer(0)
		}},
		"long table":    {"indirect table of 2064 bytes", long(129)},
		"huge table":    {"indirect table of 4294967280 bytes", func(f *frontend) { f.put(descOff, 0, gpa+tableAt, 0xfffffff0, 4, 0); f.offer(0) }},
		"empty table":   {"indirect table of 0 bytes", func(f *frontend) { f.put(descOff, 0, gpa+tableAt, 0, 4, 0); f.offer(0) }},
		"odd table":     {"indirect table of 40 bytes", func(f *frontend) { f.put(descOff, 0, gpa+tableAt, 40, 4, 0); f.offer(0) }},
		"table wraps":   {"is outside of memory", func(f *frontend) { f.put(descOff, 0, 1<<64-16, 32, 4, 0); f.offer(0) }},
		"table outside": {"is outside of memory", func(f *frontend) { f.put(descOff, 0, 0, 32, 4, 0); f.offer(0) }},
	} {
		t.Run(name, func(t *testing.T) {
			f, path, errfd, log := startRing(t, block.NewMemory(1<<20), allFeatures)
			f.mu.Lock()
			c.attack(f)
			f.mu.Unlock()
			f.stopsRing(errfd, log, c.says)
			f.get(11, le(uint32(0), uint32(0)))
			f.close()
			connect(t, path).want(0, 0, 0, make([]byte, 512), false)
		})
	}
}

// Indirect descriptors are for drivers that negotiated them.
func TestIndirectNotNegotiated(t *testing.T) {
	f, _, errfd, log := startRing(t, block.NewMemory(1<<20), allFeatures&^(1<<28))
	f.mu.Lock()
	f.put(descOff, 0, gpa+tableAt, 32, 4, 0)
	f.offer(0)
	f.mu.Unlock()
	f.stopsRing(errfd, log, "indirect descriptor where none may be")
}

// A driver that offers a request again while it is in flight loses its ring; the request is executed once.
func TestOfferedTwice(t *testing.T) {
	dev := &meanwhile{Forward: block.NewForward(block.NewMemory(1 << 20)), seen: make(chan struct{}), goOn: make(chan struct{})}
	f, _, errfd, log := startRing(t, dev, allFeatures)
	f.mu.Lock()
	r, err := f.prepare(1, 8, blocktest.Pattern(4096, 1), true)
	if err != nil {
		t.Fatal(err)
	}
	f.offer(r.head)
	f.mu.Unlock()
	<-dev.seen
	f.mu.Lock()
	f.offer(r.head)
	f.mu.Unlock()
	f.stopsRing(errfd, log, "is made available while it is in flight")
	close(dev.goOn)
	f.get(11, le(uint32(0), uint32(0)))
	if n := dev.calls.Load(); n != 1 {
		t.Errorf("%d writes", n)
	}
}

// A meanwhile is a device that stops its first read or write until goOn can be received from.
type meanwhile struct {
	block.Forward // the requests here are plain reads and writes
	calls         atomic.Int32
	seen, goOn    chan struct{}
}

func (m *meanwhile) stop() {
	if m.calls.Add(1) == 1 {
		close(m.seen)
		<-m.goOn
	}
}

func (*meanwhile) ReadCached([]block.Read) int { return 0 } // all by ReadAt

func (m *meanwhile) ReadAt(p []byte, off int64) (int, error) {
	m.stop()
	return m.Forward.ReadAt(p, off)
}

func (m *meanwhile) WriteAt(p []byte, off int64) (int, error) {
	m.stop()
	return m.Forward.WriteAt(p, off)
}

// A guest that changes everything about a request while the device executes the first piece of it changes nothing of the request: what
// was checked is what is used, and data that was taken is not looked at again.
func TestMemoryChangedMeanwhile(t *testing.T) {
	const n, disk, other = 2 << 20, 4 << 20, dataAt + 3<<20
	for _, c := range []struct {
		name  string
		write bool
		table int
	}{{"write", true, tableAt}, {"read", false, tableAt}, {"write by direct descriptors", true, descOff}, {"read by direct descriptors", false, descOff}} {
		t.Run(c.name, func(t *testing.T) {
			mem := block.NewMemory(disk)
			content, data := blocktest.Pattern(disk, 1), blocktest.Pattern(n, 2)
			if _, err := mem.WriteAt(content, 0); err != nil {
				t.Fatal(err)
			}
			dev := &meanwhile{Forward: block.NewForward(mem), seen: make(chan struct{}), goOn: make(chan struct{})}
			_, path := serve(t, dev, nil)
			f := connect(t, path).frontend
			kind, flags := uint32(0), uint16(3)
			if c.write {
				kind, flags = 1, 1
				copy(f.mem[dataAt:], data)
			}
			f.mu.Lock()
			copy(f.mem[headAt:], le(kind, uint32(0), uint64(8)))
			f.mem[headAt+32] = 0xff
			f.put(c.table, 0, gpa+headAt, 16, 1, 1)
			f.put(c.table, 1, gpa+dataAt, n, flags, 2)
			f.put(c.table, 2, gpa+headAt+32, 1, 2, 0)
			if c.table == tableAt {
				f.put(descOff, 0, gpa+tableAt, 48, 4, 0)
			}
			done := make(chan struct{})
			f.waiting[0] = done
			f.offer(0)
			f.mu.Unlock()

			<-dev.seen // the device has the first piece
			f.mu.Lock()
			copy(f.mem[headAt:], le(1-kind, uint32(0), uint64(1<<40)))
			for _, at := range []int{descOff, tableAt} {
				f.put(at, 0, gpa+other, 16, 1, 1)
				f.put(at, 1, gpa+other, 1<<31, flags^2, 0)
				f.put(at, 2, 1<<63, 1, 2, 0)
			}
			clear(f.mem[dataAt:][:1<<20])
			f.mu.Unlock()
			close(dev.goOn)
			f.wait(request{0, done}, nil)

			if status := f.mem[headAt+32]; status != 0 {
				t.Fatalf("status %d", status)
			}
			if !bytes.Equal(f.mem[other:][:4096], make([]byte, 4096)) {
				t.Error("memory that was no part of the request was changed")
			}
			got, want := f.mem[dataAt:][:n], content[4096:][:n]
			if c.write {
				copy(content[4096:], data)
				got, want = make([]byte, disk), content
				if _, err := mem.ReadAt(got, 0); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, want) {
				t.Error("other data than those of the request")
			}
		})
	}
}

// A buffer outside of memory fails the request, and nothing is read or written there.
func TestBuffersOutside(t *testing.T) {
	_, path := serve(t, block.NewMemory(1<<20), nil)
	c := connect(t, path)
	for i, bad := range []struct {
		addr uint64
		n    uint32
	}{{0, 512}, {gpa + memSize - 256, 512}, {1<<64 - 256, 512}, {gpa + dataAt, 1<<32 - 512}, {ua + dataAt, 512}} {
		c.mu.Lock()
		copy(c.mem[headAt:], le(uint32(0), uint32(0), uint64(0)))
		c.mem[headAt+32] = 0xff
		c.put(descOff, 0, gpa+headAt, 16, 1, 1)
		c.put(descOff, 1, bad.addr, bad.n, 3, 2)
		c.put(descOff, 2, gpa+headAt+32, 1, 2, 0)
		done := make(chan struct{})
		c.waiting[0] = done
		c.offer(0)
		c.mu.Unlock()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			c.poll()
			select {
			case <-done:
			default:
				if time.Now().Before(end) {
					continue
				}
				t.Fatal("no completion")
			}
			break
		}
		if c.mem[headAt+32] != 1 {
			t.Fatalf("case %d: status %d", i, c.mem[headAt+32])
		}
	}
	c.want(0, 0, 0, make([]byte, 512), false)
}

// A front-end that truncates its memory loses its connection; the server goes on.
func TestTruncatedMemory(t *testing.T) {
	_, path := serve(t, block.NewMemory(1<<20), nil)
	for _, left := range []int64{0, usedAt, headAt} {
		c := connect(t, path)
		c.mu.Lock()
		c.put(descOff, 0, gpa+headAt, 16, 1, 1)
		c.put(descOff, 1, gpa+headAt+32, 1, 2, 0)
		c.mu.Unlock()
		c.get(11, le(uint32(0), uint32(0)))
		c.mu.Lock()
		c.offer(0)
		c.mu.Unlock()
		unix.Ftruncate(c.fd, left)
		c.send(12, 1, le(uint64(0)), c.kick)
		c.c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("memory of %d bytes is left: the connection was not closed (%v)", left, err)
		}
		c.close()
	}
	connect(t, path).want(0, 0, 0, make([]byte, 512), false)
}

// Messages that break the rules are refused, or end the connection; no descriptor is left.
func TestHostileMessages(t *testing.T) {
	_, path := serve(t, block.NewMemory(1<<20), nil)
	connect(t, path).close()
	open := func() int { l, _ := os.ReadDir("/proc/self/fd"); return len(l) }
	settle := func(want int) {
		for end := time.Now().Add(10 * time.Second); open() > want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d descriptors are open, not %d", open(), want)
			}
		}
	}
	time.Sleep(100 * time.Millisecond)
	before := open()
	region := func(g, n, u, off uint64) []byte { return le(uint64(0), g, n, u, off) }
	for i, m := range []struct {
		req     uint32
		payload []byte
		fds     int
	}{
		{2, le(uint64(1) << 34), 0}, {16, le(uint64(1) << 63), 0}, {37, region(0, 0, 0, 0), 1}, {37, region(gpa, 4096, 0, 0), 1},
		{37, region(0, 1<<50, 0, 0), 1}, {37, region(0, 4096, 0, 1<<40), 1}, {37, region(1<<64-4096, 8192, 0, 0), 1},
		{37, region(0, 4096, 0, 0), 0}, {37, region(0, 4096, 0, 0), 2}, {5, le(uint32(9), uint32(0)), 1},
		{8, le(uint32(1), uint32(3)), 0}, {8, le(uint32(1), uint32(65536)), 0}, {8, le(uint32(4), uint32(2)), 0},
		{10, le(uint32(1<<31), uint32(0)), 0}, {12, le(uint64(255)), 1}, {12, le(uint64(1)), 1}, {12, le(uint64(1 << 8)), 0},
		{12, le(uint64(1)), 0}, {3, nil, 1}, {21, nil, 1}, {6, make([]byte, 16), 1}, {77, nil, 0}, {2, le(uint32(0)), 0},
		{32, le(uint64(1<<62), uint64(0), uint16(1), uint16(64)), 1}, {32, le(uint64(64), uint64(0), uint16(1), uint16(64)), 1},
	} {
		f := dial(t, path)
		f.negotiate(allFeatures)
		var fds []int
		for range m.fds {
			fds = append(fds, f.fd)
		}
		if f.try(m.req, m.payload, fds...) {
			t.Errorf("message %d (request %d) was accepted", i, m.req)
		}
		f.get(1, nil) // the connection goes on
		f.close()
	}
	for _, raw := range [][]byte{le(uint32(1), uint32(2), uint32(0)), le(uint32(1), uint32(5), uint32(0)), le(uint32(1), uint32(1), uint32(1<<32-1)), le(uint32(77), uint32(1), uint32(0))} {
		f := dial(t, path)
		f.c.Write(raw)
		f.c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := f.c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("% x did not end the connection", raw)
		}
		f.close()
	}
	settle(before)
}

// FuzzMessages sends bytes instead of messages.
func FuzzMessages(f *testing.F) {
	f.Add(le(uint32(1), uint32(1), uint32(0)))
	f.Add(le(uint32(24), uint32(1), uint32(16), uint32(0), uint32(4), uint32(0), uint32(0)))
	f.Fuzz(func(t *testing.T, p []byte) {
		_, path := serve(t, block.NewMemory(1<<20), nil)
		c := dial(t, path)
		c.send(1, 1, nil, c.fd)
		c.c.Write(p)
		c.close()
		connect(t, path).want(0, 0, 0, make([]byte, 512), false)
	})
}

// A server that ends leaves a socket alone that another one has put in the place of its own.
func TestCloseSparesSocketsOfOthers(t *testing.T) {
	dir := testhost.ShortDir(t)
	s := vhost.NewServer(dir, vhost.Options{})
	if err := s.Add(vhost.Export{Name: "a", Device: block.NewMemory(1 << 20)}); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.Path("a"), s.Path("a")+".was"); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", s.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(s.Path("a")); err != nil {
		t.Errorf("the other server's socket: %v", err)
	}
}

// TestHeadersAndStatuses: a header that is too short fails its request, without a byte for a status nothing is done, and an identification is
// no longer than the buffer.
func TestHeadersAndStatuses(t *testing.T) {
	mem := block.MemoryFrom(blocktest.Pattern(1<<20, 1))
	_, path := serve(t, mem, nil)
	c := connect(t, path)
	const d = 0 // head
	request := func(kind uint32, sector uint64, descriptors ...[]byte) (status byte) {
		t.Helper()
		copy(c.mem[headAt:], le(kind, uint32(0), sector))
		c.mem[headAt+32] = 0xff
		for i, b := range descriptors {
			copy(c.mem[tableAt+16*i:], b)
		}
		c.put(descOff, d, gpa+tableAt, uint32(16*len(descriptors)), 4, 0)
		done := make(chan struct{})
		c.mu.Lock()
		c.waiting[d] = done
		c.offer(d)
		c.mu.Unlock()
		for end := time.Now().Add(20 * time.Second); ; c.poll() {
			select {
			case <-done:
				return c.mem[headAt+32]
			default:
			}
			if time.Now().After(end) {
				t.Fatal("no completion in 20 s")
			}
		}
	}
	head, status := descriptor(gpa+headAt, 16, 1, 1), descriptor(gpa+headAt+32, 1, 2, 0)
	data := func(n uint32, flags uint16) []byte { return descriptor(gpa+dataAt, n, flags|1, 2) }
	want := func(what string, got, want byte) {
		t.Helper()
		if got != want {
			t.Errorf("%s: status %d, not %d", what, got, want)
		}
	}
	before := mem.Bytes()
	want("a write", request(1, 8, head, data(512, 0), status), 0)
	if bytes.Equal(mem.Bytes(), before) {
		t.Error("a write changed nothing")
	}
	before = mem.Bytes()
	want("a header of 15 bytes", request(1, 8, descriptor(gpa+headAt, 15, 1, 1), status), 1)
	want("a flush with a header of 8 bytes", request(4, 0, descriptor(gpa+headAt, 8, 1, 1), status), 1)
	want("no header", request(1, 8, descriptor(gpa+headAt+32, 1, 2, 0)), 1)
	want("a write without a status", request(1, 16, head, descriptor(gpa+dataAt, 512, 0, 0)), 0xff)
	if !bytes.Equal(mem.Bytes(), before) {
		t.Error("a request without a header or a status changed the disk")
	}
	copy(c.mem[dataAt:], "....................")
	want("an identification of 4 bytes", request(8, 0, head, data(4, 2), status), 0)
	if got := string(c.mem[dataAt:][:6]); got[4:] != ".." || got[:4] == "...." {
		t.Errorf("the identification is %q", got)
	}
	copy(c.mem[dataAt:], strings.Repeat(".", 64))
	want("an identification of 64 bytes", request(8, 0, head, data(64, 2), status), 0)
	if got := string(c.mem[dataAt:][:64]); got[20:] != strings.Repeat(".", 44) {
		t.Errorf("the identification is %q", got)
	}
	want("an identification without a buffer", request(8, 0, head, status), 0)
	want("a request of no kind", request(99, 0, head, status), 2)
	want("a read into what is readable", request(0, 0, head, data(512, 0), status), 1)
	c.want(0, 0, 0, make([]byte, 512), false)
}
