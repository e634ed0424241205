package blocktest

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// suiteWindow is how many bytes at either end of a device the suite works on, so that it is quick on
// a terabyte too.
const suiteWindow = 192 << 10

// Run checks that a device keeps the contract of block.Device and of the abilities it has. open returns a new device
// each time, of at least 64 KiB and whole sectors, with any content, writable; it closes it with t.Cleanup, where a
// device that is closed already must be no error.
//
// The part about closing runs where the device is an io.Closer, the one about growing where block.CanGrow says
// so.
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

// RunReadOnly checks that a device opened for reading keeps the contract of reads, refuses each change with
// block.ErrReadOnly, and changes nothing. open is as for Run; any size of whole sectors will do, except 0.
func RunReadOnly(t *testing.T, open func(t *testing.T) block.Device) {
	dev := open(t)
	testReads(t, dev)
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
	size := dev.Size()
	if err := block.Grow(dev, size+4096); err == nil || dev.Size() != size {
		t.Errorf("grow: error %v, size %d of %d", err, dev.Size(), size)
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
	calls["read"] = func(off, n int64) error { return refusedRead(t, dev, off, n) }
	calls["extents"] = func(off, n int64) error {
		_, err := block.Extents(dev, off, n)
		return err
	}
	testOutside(t, dev, calls)
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

// refusedRead reads a range that is not in the device.
func refusedRead(t *testing.T, dev block.Device, off, n int64) error {
	p := Pattern(int(n), 4)
	got, err := dev.ReadAt(p, off)
	if got != 0 || !bytes.Equal(p, Pattern(int(n), 4)) {
		t.Errorf("refused read of %d bytes at %d: %d bytes read, or the buffer changed", n, off, got)
	}
	return err
}

// testOutside makes calls with ranges that are not in the device.
func testOutside(t *testing.T, dev block.Device, calls map[string]func(off, n int64) error) {
	t.Helper()
	size := dev.Size()
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
