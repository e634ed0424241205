package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// dirtyOf returns the ranges of one bitmap of an image.
func dirtyOf(t *testing.T, dev block.Device, name string) (all []block.Range, err error) {
	t.Helper()
	info, err := ReadInfo(dev)
	if err != nil {
		t.Fatal(err)
	}
	bitmaps, _, err := Bitmaps(dev, info)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(bitmaps, func(b Bitmap) bool { return b.Name == name })
	if at < 0 {
		t.Fatalf("no bitmap %q in %v", name, bitmaps)
	}
	err = DirtyRanges(t.Context(), dev, info, bitmaps[at], func(r block.Range) error {
		all = append(all, r)
		return nil
	})
	return all, err
}

// TestInteropDirtyRanges: bitmaps that qemu keeps mark what qemu-io wrote, rounded to their granularity.
func TestInteropDirtyRanges(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	r := rand.New(rand.NewPCG(3, 4))
	for n, c := range []struct {
		cluster     string
		size        int64
		granularity int64
	}{{"64k", 8<<20 - 512, 64 << 10}, {"512", 3<<20 + 1024, 512}, {"4k", 40 << 20, 4 << 10}, {"2M", 16 << 20, 1 << 20}} {
		path := filepath.Join(t.TempDir(), "disk")
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size="+c.cluster, path, fmt.Sprint(c.size))
		run(t, "qemu-img", "bitmap", "--add", "-g", fmt.Sprint(c.granularity), path, "written")
		run(t, "qemu-img", "bitmap", "--add", "--disable", path, "empty")
		marked := make([]bool, (c.size+c.granularity-1)/c.granularity)
		args := []string{"-f", "qcow2", path}
		for range 30 {
			off := r.Int64N(c.size/512) * 512
			length := min(c.size-off, 512*(1+r.Int64N(600)))
			if n%2 == 0 && r.IntN(10) == 0 {
				length = min(c.size-off, 2<<20)
			}
			args = append(args, "-c", fmt.Sprintf("write -P 7 %d %d", off, length))
			for g := off / c.granularity; g*c.granularity < off+length; g++ {
				marked[g] = true
			}
		}
		run(t, "qemu-io", args...)
		var want []block.Range
		for g, is := range marked {
			off := int64(g) * c.granularity
			length := min(c.granularity, c.size-off)
			if k := len(want) - 1; is && k >= 0 && want[k].Off+want[k].Length == off {
				want[k].Length += length
			} else if is {
				want = append(want, block.Range{Off: off, Length: length})
			}
		}
		f, err := block.Open(path, block.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if got, err := dirtyOf(t, f, "written"); err != nil || !slices.Equal(got, want) {
			t.Errorf("clusters of %s: %v, %v\nwant %v", c.cluster, got, err, want)
		}
		if got, err := dirtyOf(t, f, "empty"); err != nil || len(got) != 0 {
			t.Errorf("clusters of %s, an empty bitmap: %v, %v", c.cluster, got, err)
		}
		if status, said := checkStatus(t, path); status != 0 {
			t.Errorf("check: %d, %s", status, said)
		}
	}
}

// bitmapImage is an image of a disk of size bytes and clusters of 4 KiB with one bitmap, whose table has these entries.
func bitmapImage(size uint64, granularityBits, flags uint64, entries []uint64, data []byte) []byte {
	const cs = 4096
	b := tiny(3, 12, size, 0, nil, make([]byte, 2*cs))
	for _, e := range []edit{
		{36, 4, 512}, {88, 8, autoclearBitmaps}, {104, 4, extBitmaps}, {108, 4, 24}, {112, 4, 1}, {120, 8, 32}, {128, 8, 3 * cs},
		{3 * cs, 8, 4 * cs}, {3*cs + 8, 4, uint64(len(entries))}, {3*cs + 12, 4, flags}, {3*cs + 16, 1, 1},
		{3*cs + 17, 1, granularityBits}, {3*cs + 18, 2, 1},
	} {
		e.apply(b)
	}
	b[3*cs+24] = 'b'
	for i, e := range entries {
		binary.BigEndian.PutUint64(b[4*cs+8*i:], e)
	}
	return append(b, data...)
}

// TestDirtyRanges: table entries of all kinds, bits in the order of the specification, and damage.
func TestDirtyRanges(t *testing.T) {
	const cs, each = 4096, 4096 * 8 * 512 // bytes of the disk that a cluster of bits is for
	bits := make([]byte, cs)
	bits[0], bits[1], bits[cs-1] = 1<<1|1<<7, 1<<0|1<<2, 1<<7
	size := uint64(3*each + 512)
	for _, c := range []struct {
		name    string
		size    uint64
		flags   uint64
		entries []uint64
		want    []block.Range
		says    error
	}{
		{"all kinds", size, 0, []uint64{1, 5 * cs, 0, 1}, []block.Range{
			{Off: 0, Length: each}, {Off: each + 512, Length: 512}, {Off: each + 7*512, Length: 1024}, {Off: each + 10*512, Length: 512},
			{Off: 2*each - 512, Length: 512}, {Off: 3 * each, Length: 512},
		}, nil},
		{"in use", size, 1, []uint64{1, 0, 0, 1}, nil, ErrStaleBitmap},
		{"a short table", size, 0, []uint64{1, 0, 0}, nil, errAny},
		{"behind the end", size, 0, []uint64{0, 0, 6 * cs, 0}, nil, errAny},
		{"not aligned", size, 0, []uint64{0, 0, 5*cs + 512, 0}, nil, errAny},
	} {
		got, err := dirtyOf(t, memory(t, bitmapImage(c.size, 9, c.flags, c.entries, bits)), "b")
		if c.says == nil && (err != nil || !slices.Equal(got, c.want)) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
		if c.says != nil && (err == nil || c.says != errAny && !errors.Is(err, c.says)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	stale := bitmapImage(size, 9, 0, []uint64{1, 0, 0, 1}, bits)
	edit{88, 8, 0}.apply(stale)
	if _, err := dirtyOf(t, memory(t, stale), "b"); !errors.Is(err, ErrStaleBitmap) {
		t.Errorf("without the autoclear bit: %v", err)
	}
}

var errAny = errors.New("any error")
