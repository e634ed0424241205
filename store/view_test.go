package store_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// blocks4k is a device of 4 KiB blocks.
type blocks4k struct{ block.Forward }

func (blocks4k) BlockSize() int { return 4096 }

// A View shows the stored chunks over the origin, whatever the chunk size, also on devices whose blocks are larger than a
// chunk, and its extents never call data zero.
func TestView(t *testing.T) {
	for _, sectors := range []uint32{1, 2, 8, 64} {
		r := rand.New(rand.NewPCG(uint64(sectors), 1))
		const size = 300<<10 + 512 // no whole number of chunks
		l := ondisk.Layout{ChunkSectors: sectors}
		origin := block.NewMemory(size)
		if _, err := origin.WriteAt(blocktest.Pattern(100<<10, 1), 50<<10); err != nil {
			t.Fatal(err)
		}
		cow := block.NewMemory(2 << 20)
		st, err := store.Create(cow, l, false)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size+l.ChunkBytes())
		copy(want, origin.Bytes())
		for range 40 {
			old := ondisk.OriginChunk(r.Uint64N(l.Chunks(size, true)))
			res, err := st.Reserve(old, 1)
			if err != nil {
				t.Fatal(err)
			}
			if _, stored := st.Lookup(old); stored {
				res.Cancel()
				continue
			}
			data := blocktest.Pattern(int(l.ChunkBytes()), uint64(old))
			if r.IntN(3) == 0 {
				clear(data)
			}
			if _, err := cow.WriteAt(data, l.COWOffset(res.New)); err != nil {
				t.Fatal(err)
			}
			if err := res.Commit(); err != nil {
				t.Fatal(err)
			}
			copy(want[l.OriginOffset(old):], data)
		}
		if err := st.Sync(); err != nil {
			t.Fatal(err)
		}
		want = want[:size]
		coarse := func(d block.Device) block.Device { return blocks4k{block.NewForward(d)} }
		if _, err := store.Open(coarse(cow)); (err == nil) != (sectors >= 8) {
			t.Errorf("%d sectors a chunk: Open on blocks of 4 KiB: %v", sectors, err)
		}
		st, err = store.OpenToRead(coarse(cow))
		if err != nil {
			t.Fatal(err)
		}
		v, err := store.NewView(coarse(origin), st)
		if err != nil {
			t.Fatal(err)
		}
		for range 300 {
			off := r.Int64N(size)
			p := make([]byte, r.Int64N(size-off)+1)
			if _, err := v.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+int64(len(p))]) {
				t.Fatalf("%d sectors a chunk: %d bytes at %d: %v, or other bytes", sectors, len(p), off, err)
			}
		}
		for off := int64(0); off < size; {
			list, err := v.Extents(off, size-off)
			if err != nil || len(list) == 0 {
				t.Fatal(list, err)
			}
			for _, e := range list {
				if e.Flags&block.ReadsZero != 0 && !bytes.Equal(want[off:off+e.Length], make([]byte, e.Length)) {
					t.Errorf("%d sectors a chunk: data at %d are said to be zero", sectors, off)
				}
				off += e.Length
			}
		}
		if _, err := v.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("a write: %v", err)
		}
		if _, err := v.ReadAt(make([]byte, 2), size-1); err == nil {
			t.Error("a read past the end succeeds")
		}
		if _, err := store.NewView(block.NewMemory(512), st); !errors.Is(err, store.ErrOriginTooSmall) {
			t.Errorf("over another origin: %v", err)
		}
		stored, err := store.NewView(nil, st)
		if err != nil {
			t.Fatal(err)
		}
		for x := range st.Exceptions() {
			off, end := l.OriginRange(x.Old, x.Count, size)
			p := make([]byte, end-off)
			if _, err := stored.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:end]) {
				t.Errorf("without the origin, at %d: %v, or other bytes", off, err)
			}
		}
		if _, err := stored.ReadAt(make([]byte, size), 0); err == nil {
			t.Error("what is not stored is read without an origin")
		}
	}
}

// begunReads notes what is begun to be read.
type begunReads struct {
	block.Forward
	ranges []block.Range
}

func (d *begunReads) BeginRead(off, n int64) {
	d.ranges = append(d.ranges, block.Range{Off: off, Length: n})
}

// A View begins to read each piece where it is.
func TestViewBeginsReads(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 8}
	origin, cow := &begunReads{Forward: block.NewForward(block.NewMemory(64 << 10))}, &begunReads{Forward: block.NewForward(block.NewMemory(1 << 20))}
	st, err := store.Create(cow, l, false)
	if err != nil {
		t.Fatal(err)
	}
	res, err := st.Reserve(3, 1)
	if err != nil {
		t.Fatal(err)
	}
	at := l.COWOffset(res.New)
	if err := res.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := st.Sync(); err != nil {
		t.Fatal(err)
	}
	v, err := store.NewView(origin, st)
	if err != nil {
		t.Fatal(err)
	}
	cow.ranges = nil
	v.BeginRead(8192, 12288)
	v.BeginRead(60<<10, 8192) // past the end: nothing
	if want := []block.Range{{Off: 8192, Length: 4096}, {Off: 16384, Length: 4096}}; !slices.Equal(origin.ranges, want) {
		t.Errorf("of the origin %v, want %v", origin.ranges, want)
	}
	if want := []block.Range{{Off: at, Length: 4096}}; !slices.Equal(cow.ranges, want) {
		t.Errorf("of the COW device %v, want %v", cow.ranges, want)
	}
}

// A read that fails beneath several views names the bytes once.
func TestViewErrors(t *testing.T) {
	file := &fs.PathError{Op: "read", Path: "disk.img", Err: errors.New("at byte 0: broken")}
	var dev block.Device = blocktest.NewFaulty(block.NewMemory(1<<20), blocktest.FailKind(blocktest.Read, file))
	for range 3 {
		st, err := store.Create(block.NewMemory(1<<20), ondisk.Layout{ChunkSectors: 8}, false)
		if err != nil {
			t.Fatal(err)
		}
		if dev, err = store.NewView(dev, st); err != nil {
			t.Fatal(err)
		}
	}
	_, err := dev.ReadAt(make([]byte, 4096), 8192)
	if !errors.Is(err, file) || err.Error() != "read 4096 bytes of the disk at byte 8192 from the origin: disk.img: at byte 0: broken" {
		t.Error(err)
	}
}
