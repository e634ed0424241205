package dmsnap_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/writeback"
)

// hugeDisk is a device of nearly 2^63 bytes and what it holds: a byte for each sector that is not zero.
type hugeDisk struct {
	dev     block.Device
	sectors map[int64]byte
	most    int64 // bytes of the longest zeroing: some devices need space for each chunk; 0: any
	view    bool  // read only
}

// Whatever range is asked for, no device adds up offsets that overflow: each method, with ranges around the ends of
// the device and of int64, does what was asked or returns a *block.RangeError.
func TestRangesOfLargestDisks(t *testing.T) {
	const rounds = 2000
	for _, size := range []int64{math.MaxInt64, math.MaxInt64 - 511, math.MaxInt64 - 4095, math.MaxInt64 - 65535, 1<<62 + 512} {
		for name, open := range map[string]func(t *testing.T) hugeDisk{
			"memory":  func(t *testing.T) hugeDisk { return hugeDisk{dev: block.NewMemory(size)} },
			"forward": func(t *testing.T) hugeDisk { return hugeDisk{dev: block.NewForward(block.NewMemory(size))} },
			"faulty": func(t *testing.T) hugeDisk {
				return hugeDisk{dev: blocktest.NewFaulty(block.NewMemory(size), nil)}
			},
			"quota": func(t *testing.T) hugeDisk {
				return hugeDisk{dev: blocktest.NewQuota(block.NewMemory(size), 1<<40, false), most: 1 << 20}
			},
			"page cache": func(t *testing.T) hugeDisk {
				return hugeDisk{dev: blocktest.NewPageCache(block.NewMemory(size), nil).Open(), most: 1 << 20}
			},
			"write-back": func(t *testing.T) hugeDisk {
				return hugeDisk{dev: writeback.New(block.NewMemory(size), writeback.Options{Limit: 1 << 20, Delay: time.Hour})}
			},
			"file":               func(t *testing.T) hugeDisk { return hugeDisk{dev: hugeFile(t, size)} },
			"origin":             func(t *testing.T) hugeDisk { return hugeOrigin(t, size, false) },
			"origin, write-back": func(t *testing.T) hugeDisk { return hugeOrigin(t, size, true) },
			"snapshot":           func(t *testing.T) hugeDisk { return hugeSnapshot(t, size) },
			"view":               func(t *testing.T) hugeDisk { return hugeView(t, size) },
		} {
			if size%512 != 0 && slices.Contains([]string{"origin", "origin, write-back", "snapshot", "view"}, name) {
				continue // whole sectors
			}
			t.Run(fmt.Sprintf("%s of %d bytes", name, size), func(t *testing.T) {
				d := open(t)
				if d.sectors == nil {
					d.sectors = map[int64]byte{}
				}
				r := rand.New(rand.NewPCG(uint64(size), 7))
				for range rounds {
					d.one(t, r)
				}
			})
		}
	}
}

// hugeFile is a sparse file where a file system has files so long.
func hugeFile(t *testing.T, size int64) block.Device {
	for _, dir := range []string{t.TempDir(), "/dev/shm"} {
		path := filepath.Join(dir, fmt.Sprintf("dmsnap-huge-%d", os.Getpid()))
		f, err := os.Create(path)
		if err != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(path) })
		err = f.Truncate(size)
		f.Close()
		if err != nil {
			continue
		}
		dev, err := block.Open(path, block.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Close() })
		return dev
	}
	t.Skipf("no file system here has files of %d bytes", size)
	return nil
}

func hugeOrigin(t *testing.T, size int64, back bool) hugeDisk {
	var opts []snapshot.OriginOption
	if back {
		opts = append(opts, snapshot.WriteBack(1<<20, time.Hour))
	}
	o := snapshot.NewOrigin(block.NewMemory(size), opts...)
	cow := block.NewMemory(1 << 30)
	s, err := o.Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeHuge(t, s, cow) })
	return hugeDisk{dev: o, most: 64 << 10}
}

func hugeSnapshot(t *testing.T, size int64) hugeDisk {
	cow := block.NewMemory(1 << 30)
	s, err := snapshot.NewOrigin(block.NewMemory(size)).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeHuge(t, s, cow) })
	return hugeDisk{dev: s, most: 64 << 10}
}

func closeHuge(t *testing.T, s *snapshot.Snapshot, cow block.Device) {
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := store.Open(cow); err != nil {
		t.Error(err)
	}
}

// hugeView is what a snapshot of the disk shows, without an engine.
func hugeView(t *testing.T, size int64) hugeDisk {
	origin, cow := block.NewMemory(size), block.NewMemory(1<<30)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	d := hugeDisk{dev: s, sectors: map[int64]byte{}, most: 64 << 10}
	r := rand.New(rand.NewPCG(uint64(size), 8))
	for range 100 {
		d.one(t, r)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(cow)
	if err != nil {
		t.Fatal(err)
	}
	v, err := store.NewView(origin, st)
	if err != nil {
		t.Fatal(err)
	}
	d.dev, d.view = v, true
	return d
}

// place returns an offset or a length near one of the places where sums overflow or ranges end.
func place(r *rand.Rand, size int64) int64 {
	at := []int64{0, size, size / 2, math.MaxInt64, math.MinInt64, 1 << 62, -1 << 62, size - 4096, 1 << 32}[r.IntN(9)]
	return at + []int64{0, 1, -1, 511, -512, 512, 4096, -4096, r.Int64N(1<<17) - 1<<16}[r.IntN(9)] // may wrap around: it is a number like others
}

// one makes one random call.
func (d *hugeDisk) one(t *testing.T, r *rand.Rand) {
	t.Helper()
	size := d.dev.Size()
	off, n := place(r, size), place(r, size)
	if r.IntN(2) == 0 {
		n = r.Int64N(20000)
	}
	if r.IntN(3) == 0 { // whole sectors at either end: the usual
		off = []int64{0, size - 20480, size / 2, 1 << 40}[r.IntN(4)]&^511 + 512*r.Int64N(20)
		n = min(512*r.Int64N(20), max(0, size-off))
	}
	inside := off >= 0 && n >= 0 && off <= size && n <= size-off
	op := r.IntN(6)
	what := fmt.Sprintf("%s of %d bytes at %d of %d", []string{"read", "write", "durable write", "zero", "extents", "discard or drop cache"}[op], n, off, size)
	var err error
	switch op {
	case 0:
		if n < 0 || n > 64<<10 {
			return
		}
		p := make([]byte, n)
		if _, err = d.dev.ReadAt(p, off); err == nil && inside {
			if want := d.content(off, n); !bytes.Equal(p, want) {
				t.Fatalf("%s: wrong content", what)
			}
		}
	case 1, 2:
		if n < 0 || n > 64<<10 || d.view || inside && (off%512 != 0 || n%512 != 0) {
			return
		}
		b := byte(1 + r.IntN(255))
		p := bytes.Repeat([]byte{b}, int(n))
		if op == 1 {
			_, err = d.dev.WriteAt(p, off)
		} else {
			err = block.WriteDurable(d.dev, p, off)
		}
		for s := off; inside && s < off+n; s += 512 {
			d.sectors[s] = b
		}
	case 3:
		if d.view || inside && (d.most > 0 && n > d.most || off%512 != 0 || n%512 != 0) {
			return
		}
		if _, can := d.dev.(block.Zeroer); !can && n > 1<<20 {
			return
		}
		if err = block.Zero(d.dev, off, n, block.OnlyFast); errors.Is(err, block.ErrNotFast) {
			if n > 1<<20 {
				return
			}
			err = block.Zero(d.dev, off, n, 0)
		}
		for s := range d.sectors {
			if inside && s >= off && s-off < n {
				delete(d.sectors, s)
			}
		}
	case 4:
		var list []block.Extent
		if list, err = block.Extents(d.dev, off, n); err == nil {
			d.checkExtents(t, what, off, n, list)
		}
	case 5:
		if !inside {
			err = block.Discard(d.dev, off, n) // inside it may zero, or not
		} else if err = block.DropCache(d.dev, off, n); errors.Is(err, block.ErrUnsupported) {
			err = nil
		}
	}
	var outside *block.RangeError
	if inside && err != nil || !inside && !errors.As(err, &outside) {
		t.Fatalf("%s: %v", what, err)
	}
}

// content is what is in a range.
func (d *hugeDisk) content(off, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = d.sectors[(off+int64(i))&^511]
	}
	return p
}

// checkExtents wants extents within the range that call nothing zero that is not.
func (d *hugeDisk) checkExtents(t *testing.T, what string, off, n int64, list []block.Extent) {
	t.Helper()
	if n > 0 && len(list) == 0 {
		t.Fatalf("%s: none", what)
	}
	written := make([]int64, 0, len(d.sectors))
	for s := range d.sectors {
		written = append(written, s)
	}
	slices.Sort(written)
	for _, e := range list {
		if e.Length < min(1, n) || e.Length > n {
			t.Fatalf("%s: one of %d bytes, %d are left", what, e.Length, n)
		}
		if i, _ := slices.BinarySearch(written, off&^511); e.Flags&block.ReadsZero != 0 && i < len(written) && (written[i] < off || written[i]-off < e.Length) {
			t.Fatalf("%s: byte %d is said to be zero", what, max(off, written[i]))
		}
		off, n = off+e.Length, n-e.Length
	}
}
