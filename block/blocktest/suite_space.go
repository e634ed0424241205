package blocktest

import (
	"bytes"
	"errors"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

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
		checkExtents(t, dev, start, read(t, dev, start, n))
	}
}

// checkExtents holds the extents of a range against its content.
func checkExtents(t *testing.T, dev block.Device, start int64, content []byte) {
	t.Helper()
	n := int64(len(content))
	for _, r := range [][2]int64{{0, n}, {1, n - 1}, {511, 8193}, {8191, 2}, {8192, 1}, {n - 1, 1}, {n - 513, 513}} {
		off, end := r[0], r[0]+r[1]
		if off < 0 || end > n {
			continue
		}
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
