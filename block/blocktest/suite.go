package blocktest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// suiteWindow is how many bytes at either end of a device the suite works on, so that it is quick on
// a terabyte too.
const suiteWindow = 192 << 10

// Run checks that a device keeps the contract of block.Device and of the abilities it has. open
// returns a new device each time, of at least 64 KiB and whole sectors, with any content, writable;
// it arranges for its end with t.Cleanup, which must bear a device that was closed already.
//
// The part about closing runs where the device is an io.Closer, the one about growing where it is a
// block.Resizer.
func Run(t *testing.T, open func(t *testing.T) block.Device) {
	for _, part := range []struct {
		name string
		run  func(*testing.T, block.Device)
	}{
		{"size", testSize},
		{"round trip", testRoundTrip},
		{"range errors", testRangeErrors},
		{"zero length", testZeroLength},
		{"buffer is the caller's", testBuffer},
		{"random operations", testRandom},
		{"concurrent, apart", testConcurrentApart},
		{"concurrent, overlapping", testConcurrentOverlapping},
		{"zero", testZero},
		{"discard", testDiscard},
		{"extents", testExtents},
		{"durable write", testDurable},
		{"grow", testGrow},
		{"close", testClose},
	} {
		t.Run(part.name, func(t *testing.T) {
			dev := open(t)
			if dev.Size() < 64<<10 || dev.Size()%block.SectorSize != 0 {
				t.Fatalf("a device of %d bytes can't be tested", dev.Size())
			}
			part.run(t, dev)
		})
	}
}

// RunReadOnly checks that a device opened for reading refuses each change with block.ErrReadOnly, and
// changes nothing. open is as for Run.
func RunReadOnly(t *testing.T, open func(t *testing.T) block.Device) {
	dev := open(t)
	n := min(dev.Size(), 4096)
	before := read(t, dev, 0, n)
	for name, change := range changes(dev) {
		if err := change(0, n); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: error %v, want %v", name, err, block.ErrReadOnly)
		}
		if err := change(dev.Size(), 1); err == nil {
			t.Errorf("%s outside the device: no error", name)
		}
	}
	if r, ok := dev.(block.Resizer); ok {
		size := dev.Size()
		if err := r.Grow(size + 4096); err == nil || dev.Size() != size {
			t.Errorf("grow: error %v, size %d of %d", err, dev.Size(), size)
		}
	}
	if err := dev.Flush(); err != nil {
		t.Errorf("flush with nothing to flush: %v", err)
	}
	want(t, dev, 0, before)
}

// changes are the ways to change a range of a device.
func changes(dev block.Device) map[string]func(off, n int64) error {
	return map[string]func(off, n int64) error{
		"write": func(off, n int64) error {
			_, err := dev.WriteAt(make([]byte, n), off)
			return err
		},
		"durable write": func(off, n int64) error { return block.WriteDurable(dev, make([]byte, n), off) },
		"zero":          func(off, n int64) error { return block.Zero(dev, off, n, 0) },
		"discard": func(off, n int64) error {
			if _, ok := dev.(block.Discarder); !ok {
				return block.ErrReadOnly // nothing to refuse
			}
			return block.Discard(dev, off, n)
		},
	}
}

// read returns n bytes at off.
func read(t *testing.T, dev block.Device, off, n int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xa5}, int(n)) // so that what is not filled in shows
	if got, err := dev.ReadAt(p, off); err != nil || int64(got) != n {
		t.Fatalf("read of %d bytes at %d: %d, %v", n, off, got, err)
	}
	return p
}

// write writes p at off.
func write(t *testing.T, dev block.Device, off int64, p []byte) {
	t.Helper()
	if n, err := dev.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write of %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

// want compares the content at off.
func want(t *testing.T, dev block.Device, off int64, p []byte) {
	t.Helper()
	got := read(t, dev, off, int64(len(p)))
	if i := differ(got, p); i >= 0 {
		t.Fatalf("byte %d (of %d bytes at %d) is %#02x, want %#02x", off+int64(i), len(p), off, got[i], p[i])
	}
}

// differ returns the first place where a and b differ, or -1.
func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	return i
}

// windows returns the parts of a device that the suite works on: its start and its end.
func windows(dev block.Device) (starts []int64, n int64) {
	n = min(suiteWindow, dev.Size())
	if dev.Size() == n {
		return []int64{0}, n
	}
	return []int64{0, dev.Size() - n}, n
}

func testSize(t *testing.T, dev block.Device) {
	if n, err := block.Refresh(dev); err != nil || n != dev.Size() {
		t.Errorf("refreshed size %d, %v, want %d", n, err, dev.Size())
	}
	if b := block.BlockSize(dev); b < 512 || b&(b-1) != 0 {
		t.Errorf("logical block size %d", b)
	}
	if !block.Same(dev, dev) {
		t.Error("the device is not the same as itself")
	}
}

func testRoundTrip(t *testing.T, dev block.Device) {
	starts, n := windows(dev)
	for _, start := range starts {
		shadow := Pattern(int(n), 1)
		write(t, dev, start, shadow)
		for i, r := range [][2]int64{
			{0, 1}, {0, 512}, {1, 1}, {511, 2}, {512, 512}, {513, 511}, {1000, 5000}, {4095, 4098},
			{8192, 4096}, {12289, 40001}, {n - 1, 1}, {n - 513, 513}, {n - 65536, 65536},
		} {
			p := Pattern(int(r[1]), uint64(i)+2)
			write(t, dev, start+r[0], p)
			copy(shadow[r[0]:], p)
			want(t, dev, start+r[0], p)
			want(t, dev, start, shadow) // the neighbours too
		}
		if err := dev.Flush(); err != nil {
			t.Fatalf("flush: %v", err)
		}
		want(t, dev, start, shadow)
	}
}

func testRangeErrors(t *testing.T, dev block.Device) {
	starts, n := windows(dev)
	shadow := Pattern(int(n), 3)
	for _, start := range starts {
		write(t, dev, start, shadow)
	}
	size := dev.Size()
	calls := changes(dev)
	calls["discard"] = func(off, n int64) error { return block.Discard(dev, off, n) }
	calls["read"] = func(off, n int64) error {
		p := Pattern(int(n), 4)
		got, err := dev.ReadAt(p, off)
		if got != 0 || !bytes.Equal(p, Pattern(int(n), 4)) {
			t.Errorf("refused read of %d bytes at %d: %d bytes read, or the buffer changed", n, off, got)
		}
		return err
	}
	calls["extents"] = func(off, n int64) error {
		_, err := block.Extents(dev, off, n)
		return err
	}
	for name, call := range calls {
		for _, r := range [][2]int64{
			{-1, 1}, {-512, 1024}, {math.MinInt64, 512}, {size, 1}, {size - 1, 2}, {size - 512, 1024},
			{size + 512, 512}, {size + 1, 0}, {-1, 0}, {math.MaxInt64, 512}, {math.MaxInt64 - 511, 512}, {math.MaxInt64, 0},
		} {
			err := call(r[0], r[1])
			var re *block.RangeError
			if !errors.As(err, &re) {
				t.Errorf("%s of %d bytes at %d of %d: %v, want a RangeError", name, r[1], r[0], size, err)
			} else if re.Off != r[0] || re.Length != r[1] || re.Size != size {
				t.Errorf("%s of %d bytes at %d of %d: %v", name, r[1], r[0], size, re)
			}
		}
	}
	if dev.Size() != size {
		t.Errorf("size is now %d, was %d", dev.Size(), size)
	}
	for i := len(starts) - 1; i >= 0; i-- {
		if i == 0 && len(starts) == 2 && starts[1] < n {
			break // the windows overlap, and the second was written over the first
		}
		want(t, dev, starts[i], shadow)
	}
}

func testZeroLength(t *testing.T, dev block.Device) {
	shadow := Pattern(4096, 5)
	write(t, dev, 0, shadow)
	for _, off := range []int64{0, 1, 512, dev.Size() - 1, dev.Size()} {
		if n, err := dev.ReadAt(nil, off); n != 0 || err != nil {
			t.Errorf("read of nothing at %d: %d, %v", off, n, err)
		}
		for name, change := range changes(dev) {
			if err := change(off, 0); err != nil && !(name == "discard" && errors.Is(err, block.ErrReadOnly)) {
				t.Errorf("%s of nothing at %d: %v", name, off, err)
			}
		}
	}
	want(t, dev, 0, shadow)
}

func testBuffer(t *testing.T, dev block.Device) {
	p := Pattern(20000, 6)
	write(t, dev, 777, p)
	if err := block.WriteDurable(dev, p, 30000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, Pattern(20000, 6)) {
		t.Error("a write changed its argument")
	}
	clear(p)
	want(t, dev, 777, Pattern(20000, 6))
	want(t, dev, 30000, Pattern(20000, 6))
}

// testRandom does operations of all kinds in sequence and compares with a copy in memory.
func testRandom(t *testing.T, dev block.Device) {
	starts, n := windows(dev)
	for _, start := range starts {
		r := rand.New(rand.NewPCG(7, uint64(start)))
		shadow := Pattern(int(n), 7)
		write(t, dev, start, shadow)
		for i := range 300 {
			off := r.Int64N(n)
			length := r.Int64N(min(n-off, 1<<(1+r.IntN(17)))) + 1
			if r.IntN(2) == 0 {
				off &^= 511
				length = min((length+511)&^511, n-off)
			}
			span := shadow[off : off+length]
			var err error
			var what string
			switch r.IntN(8) {
			case 0, 1, 2:
				what = "write"
				copy(span, Pattern(int(length), uint64(i)))
				_, err = dev.WriteAt(span, start+off)
			case 3:
				what = "durable write"
				copy(span, Pattern(int(length), uint64(i)))
				err = block.WriteDurable(dev, span, start+off)
			case 4:
				what = "zero"
				clear(span)
				err = block.Zero(dev, start+off, length, 0)
			case 5:
				what = "zero, keeping it allocated"
				clear(span)
				err = block.Zero(dev, start+off, length, block.KeepAllocated)
			case 6:
				what = "discard"
				err = block.Discard(dev, start+off, length)
				if err == nil {
					discarded(t, span, read(t, dev, start+off, length), start+off)
				}
			case 7:
				what = "flush"
				err = dev.Flush()
			}
			if err != nil {
				t.Fatalf("operation %d, %s of %d bytes at %d: %v", i, what, length, start+off, err)
			}
			if got := read(t, dev, start, n); !bytes.Equal(got, shadow) {
				t.Fatalf("after operation %d, %s of %d bytes at %d: byte %d is wrong", i, what, length, start+off, start+int64(differ(got, shadow)))
			}
		}
	}
}

// discarded checks what was discarded at off, each piece of a sector as before or zero, and takes it
// over into the copy.
func discarded(t *testing.T, before, now []byte, off int64) {
	t.Helper()
	for i := 0; i < len(now); {
		n := min(len(now)-i, block.SectorSize-int((off+int64(i))%block.SectorSize))
		if p := now[i : i+n]; !bytes.Equal(p, before[i:i+n]) && !bytes.Equal(p, make([]byte, n)) {
			t.Fatalf("after a discard %d bytes at %d are neither as before nor zeros", n, off+int64(i))
		}
		i += n
	}
	copy(before, now)
}

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

func testZero(t *testing.T, dev block.Device) {
	const n = 48 << 10
	for _, flags := range []block.ZeroFlags{0, block.KeepAllocated, block.OnlyFast, block.OnlyFast | block.KeepAllocated} {
		for _, r := range [][2]int64{{0, 4096}, {4096, 8192}, {512, 512}, {1000, 10}, {4095, 16386}, {0, n}, {100, n - 200}} {
			shadow := Pattern(n, uint64(r[0]))
			write(t, dev, 0, shadow)
			err := block.Zero(dev, r[0], r[1], flags)
			if err != nil && !(flags&block.OnlyFast != 0 && errors.Is(err, block.ErrNotFast)) {
				t.Fatalf("zero of %d bytes at %d with flags %d: %v", r[1], r[0], flags, err)
			}
			if err == nil {
				clear(shadow[r[0] : r[0]+r[1]])
			}
			want(t, dev, 0, shadow) // ErrNotFast changed nothing
		}
	}
	// A range larger than any buffer.
	_, length := windows(dev)
	off := dev.Size() - length
	write(t, dev, off, Pattern(int(length), 9))
	if err := block.Zero(dev, off, length, 0); err != nil {
		t.Fatal(err)
	}
	want(t, dev, off, make([]byte, length))
	write(t, dev, off+5, []byte("again"))
	want(t, dev, off, append([]byte("\x00\x00\x00\x00\x00again"), 0))
}

func testDiscard(t *testing.T, dev block.Device) {
	const n = 48 << 10
	for _, r := range [][2]int64{{0, 4096}, {512, 512}, {1000, 10}, {4095, 16386}, {0, n}} {
		shadow := Pattern(n, uint64(r[0])+10)
		write(t, dev, 0, shadow)
		if err := block.Discard(dev, r[0], r[1]); err != nil {
			t.Fatalf("discard of %d bytes at %d: %v", r[1], r[0], err)
		}
		discarded(t, shadow[r[0]:r[0]+r[1]], read(t, dev, r[0], r[1]), r[0])
		want(t, dev, 0, shadow)
		write(t, dev, r[0], Pattern(int(r[1]), 11))
		want(t, dev, r[0], Pattern(int(r[1]), 11))
	}
}

func testExtents(t *testing.T, dev block.Device) {
	starts, n := windows(dev)
	for _, start := range starts {
		write(t, dev, start, Pattern(int(n), 12))
		for i := int64(1); i < n>>13; i += 3 {
			if err := block.Zero(dev, start+i<<13, 8192, 0); err != nil {
				t.Fatal(err)
			}
		}
		content := read(t, dev, start, n)
		for _, r := range [][2]int64{{0, n}, {1, n - 1}, {511, 8193}, {8191, 2}, {8192, 1}, {n - 1, 1}, {n - 513, 513}} {
			off, end := r[0], r[0]+r[1]
			for off < end {
				list, err := block.Extents(dev, start+off, end-off)
				if err != nil || len(list) == 0 {
					t.Fatalf("extents of %d bytes at %d: %v, %v", end-off, start+off, list, err)
				}
				for _, e := range list {
					if e.Length <= 0 || e.Length > end-off {
						t.Fatalf("extents of [%d, %d): one of %d bytes at %d", start+r[0], start+end, e.Length, start+off)
					}
					if p := content[off : off+e.Length]; e.Flags&block.ReadsZero != 0 && !bytes.Equal(p, make([]byte, len(p))) {
						t.Fatalf("%d bytes at %d are said to be zeros, and are not", e.Length, start+off)
					}
					if e.Flags&^(block.Hole|block.ReadsZero) != 0 {
						t.Fatalf("flags %#x", e.Flags)
					}
					off += e.Length
				}
			}
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
	r, ok := dev.(block.Resizer)
	if !ok {
		t.Skip("the device can't change its size")
	}
	size := dev.Size()
	n := min(size, suiteWindow)
	shadow := Pattern(int(n), 15)
	write(t, dev, size-n, shadow)
	for _, same := range []int64{0, size - 1, size} {
		if err := r.Grow(same); err != nil || dev.Size() != size {
			t.Fatalf("grow from %d to %d: %v, size %d", size, same, err, dev.Size())
		}
	}
	more := size + 100<<10
	if err := r.Grow(more); err != nil {
		if dev.Size() != size {
			t.Errorf("grow failed (%v), and the size is %d instead of %d", err, dev.Size(), size)
		}
		t.Skipf("the device can't be grown by its user: %v", err)
	}
	if now, err := r.Refresh(); err != nil || now < more || dev.Size() != now {
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
	// Close beside calls under way: each of them does its work or says that the device is closed.
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
	if r, ok := dev.(block.Resizer); ok {
		closed["grow"] = r.Grow(dev.Size() + 512)
	}
	for name, err := range closed {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s after close: %v, want %v", name, err, fs.ErrClosed)
		}
	}
}
