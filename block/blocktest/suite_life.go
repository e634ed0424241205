package blocktest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// together runs n functions at the same time and waits for them.
func together(n int, run func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { run(i) })
	}
	wg.Wait()
}

func testConcurrentApart(t *testing.T, dev block.Device) {
	const workers = 8
	_, n := windows(dev)
	part := n / workers
	together(workers+1, func(i int) {
		if i == workers {
			for range 5 {
				if err := dev.Flush(); err != nil {
					t.Errorf("flush beside writes: %v", err)
				}
			}
			return
		}
		// Pieces of odd lengths, those of the workers interleaved within sectors and pages.
		r := rand.New(rand.NewPCG(8, uint64(i)))
		shadow := Pattern(int(part), uint64(i))
		for done := int64(0); done < part; {
			m := min(1+r.Int64N(3000), part-done)
			if _, err := dev.WriteAt(shadow[done:done+m], int64(i)*part+done); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			p := make([]byte, m)
			if _, err := dev.ReadAt(p, int64(i)*part+done); err != nil || !bytes.Equal(p, shadow[done:done+m]) {
				t.Errorf("read of what was just written: %v", err)
				return
			}
			done += m
		}
	})
	for i := range int64(workers) {
		want(t, dev, i*part, Pattern(int(part), uint64(i)))
	}
}

func testConcurrentOverlapping(t *testing.T, dev block.Device) {
	const workers, length = 6, 32 << 10
	write(t, dev, 0, bytes.Repeat([]byte{0xff}, length))
	together(workers, func(i int) {
		p := bytes.Repeat([]byte{byte(i)}, length)
		for range 10 {
			if _, err := dev.WriteAt(p, 0); err != nil {
				t.Errorf("write: %v", err)
			}
			if _, err := dev.ReadAt(make([]byte, length), 0); err != nil {
				t.Errorf("read: %v", err)
			}
		}
	})
	got := read(t, dev, 0, length)
	for s := 0; s < length; s += block.SectorSize {
		sector := got[s : s+block.SectorSize]
		if sector[0] >= workers || !bytes.Equal(sector, bytes.Repeat(sector[:1], block.SectorSize)) {
			t.Fatalf("sector %d is a mix of writes", s/block.SectorSize)
		}
	}
}

func testDurable(t *testing.T, dev block.Device) {
	starts, n := windows(dev)
	for _, start := range starts {
		shadow := Pattern(int(n), 13)
		write(t, dev, start, shadow)
		for i, r := range [][2]int64{{0, 512}, {4096, 4096}, {777, 5000}, {n - 1, 1}, {8192, n - 8192}} {
			p := Pattern(int(r[1]), uint64(i)+14)
			if err := block.WriteDurable(dev, p, start+r[0]); err != nil {
				t.Fatalf("durable write of %d bytes at %d: %v", r[1], start+r[0], err)
			}
			copy(shadow[r[0]:], p)
			want(t, dev, start, shadow)
		}
	}
	together(4, func(i int) {
		for range 3 {
			if err := block.WriteDurable(dev, Pattern(4096, uint64(i)), int64(i)*4096); err != nil {
				t.Errorf("durable writes at the same time: %v", err)
			}
			if err := dev.Flush(); err != nil {
				t.Errorf("flush beside durable writes: %v", err)
			}
		}
	})
	for i := range int64(4) {
		want(t, dev, i*4096, Pattern(4096, uint64(i)))
	}
}

func testGrow(t *testing.T, dev block.Device) {
	size := dev.Size()
	n := min(size, suiteWindow)
	shadow := Pattern(int(n), 15)
	write(t, dev, size-n, shadow)
	for _, same := range []int64{0, size - 1, size} {
		if err := block.Grow(dev, same); err != nil || dev.Size() != size {
			t.Fatalf("grow from %d to %d: %v, size %d", size, same, err, dev.Size())
		}
	}
	more := size + 100<<10
	if err := block.Grow(dev, more); err != nil {
		if !errors.Is(err, block.ErrFixedSize) && !block.CanGrow(dev) {
			t.Errorf("a device that can't be made longer: %v, want ErrFixedSize", err)
		}
		if dev.Size() != size {
			t.Errorf("grow failed (%v), and the size is %d instead of %d", err, dev.Size(), size)
		}
		t.Skipf("the device can't be grown by its user: %v", err)
	}
	if now, err := block.Refresh(dev); err != nil || now < more || dev.Size() != now {
		t.Fatalf("after growing to %d: refreshed %d, %v, size %d", more, now, err, dev.Size())
	}
	want(t, dev, size-n, append(bytes.Clone(shadow), make([]byte, more-size)...))
	p := Pattern(1000, 16)
	write(t, dev, size-500, p)
	want(t, dev, size-500, p)
	write(t, dev, dev.Size()-1000, p)
	want(t, dev, dev.Size()-1000, p)
	if _, err := dev.WriteAt(p, dev.Size()-999); err == nil {
		t.Error("a write past the new end was taken")
	}
	if err := dev.Flush(); err != nil {
		t.Error(err)
	}
}

func testClose(t *testing.T, dev block.Device) {
	c, ok := dev.(io.Closer)
	if !ok {
		t.Skip("the device has nothing to close")
	}
	p := Pattern(4096, 17)
	write(t, dev, 0, p)
	// Close beside calls under way: each of them does its work or returns that the device is closed.
	together(5, func(i int) {
		if i == 0 {
			if err := c.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			return
		}
		q := make([]byte, 4096)
		for range 50 {
			if _, err := dev.ReadAt(q, 0); err == nil && !bytes.Equal(q, p) || err != nil && !errors.Is(err, fs.ErrClosed) {
				t.Errorf("read beside close: %v", err)
			}
		}
	})
	closed := map[string]error{"flush": dev.Flush()}
	_, closed["read"] = dev.ReadAt(make([]byte, 512), 0)
	for name, change := range changes(dev) {
		if name != "discard" {
			closed[name] = change(0, 512)
		}
	}
	if d, ok := dev.(block.Discarder); ok {
		closed["discard"] = d.Discard(0, 512)
	}
	if e, ok := dev.(block.Extenter); ok {
		_, closed["extents"] = e.Extents(0, 512)
	}
	if block.CanGrow(dev) {
		closed["grow"] = block.Grow(dev, dev.Size()+512)
	}
	for name, err := range closed {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s after close: %v, want %v", name, err, fs.ErrClosed)
		}
	}
}
