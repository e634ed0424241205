package dmsnap_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// Nothing overflows on the largest disks, whose last chunk may overlap the largest offset that there is: the engine
// and each offline task handle their first and last bytes.
func TestLargestDisks(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	sizes := []int64{math.MaxInt64 - 511, math.MaxInt64 - 1023, math.MaxInt64 - 4095, math.MaxInt64 - 1<<20 + 1, 1<<62 + 512, 1 << 62, 16<<40 + 512}
	for range 2 {
		sizes = append(sizes, math.MaxInt64-511-rand.Int64N(1<<22)*512)
	}
	for _, size := range sizes {
		for _, sectors := range []uint32{1, 8, 2048} {
			t.Run(fmt.Sprintf("%d bytes, %d sectors a chunk", size, sectors), func(t *testing.T) { largestDisk(t, size, sectors) })
		}
	}
}

func largestDisk(t *testing.T, size int64, sectors uint32) {
	origin, cow := block.NewMemory(size), block.NewMemory(64<<20)
	o := snapshot.NewOrigin(origin)
	s, err := o.Attach(cow, snapshot.Options{ChunkSectors: sectors})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	put := func(d block.Device, b byte, off int64) {
		t.Helper()
		_, err := d.WriteAt(bytes.Repeat([]byte{b}, 512), off)
		must(err)
	}
	chunk := int64(sectors) * 512
	put(origin, 1, size-512)
	put(s, 2, 0)
	put(s, 3, size/2&^511)
	put(o, 4, size-512) // keeps the last chunk
	put(o, 5, size/4&^511)
	put(s, 6, size-1024-chunk) // beside it
	must(s.Flush())
	end := make([]byte, 512)
	if _, err := s.ReadAt(end, size-512); err != nil || end[0] != 1 {
		t.Errorf("the last sector reads %d, %v", end[0], err)
	}
	for _, ask := range []func(off, n int64) ([]block.Extent, error){s.Extents, s.Changed} {
		calls := 0
		for off := int64(0); off < size; calls++ {
			list, err := ask(off, size-off)
			must(err)
			for _, e := range list {
				if e.Length <= 0 || e.Length > size-off {
					t.Fatalf("extent of %d bytes at %d", e.Length, off)
				}
				off += e.Length
			}
			if len(list) == 0 || calls > 1000 {
				t.Fatalf("no end of extents at %d", off)
			}
		}
	}
	must(s.Close())

	ctx := t.Context()
	r, err := check.Run(ctx, cow, check.Options{Origin: origin})
	if must(err); len(r.Findings) > 0 {
		t.Errorf("check: %v", r.Findings)
	}
	st, err := store.Open(cow)
	must(err)
	must(st.CheckOrigin(size))
	d, err := diff.New(origin, st)
	must(err)
	for e := range d.Extents() {
		if e.Length <= 0 || e.Off < 0 || e.Length > size-e.Off {
			t.Errorf("diff: %+v", e)
		}
	}
	found, err := rescue.Open(ctx, origin, cow, rescue.Options{})
	must(err)
	if sum := rescue.Totals(found.Plan()); sum[rescue.Certain] != size || found.Behind() != 0 {
		t.Errorf("rescue: %v bytes of each class, %d behind the end", sum, found.Behind())
	}
	out := block.NewMemory(size)
	_, err = found.Write(ctx, out, nil)
	must(err)
	for off, want := range map[int64]byte{0: 2, size / 2 &^ 511: 3, size - 512: 1, size / 4 &^ 511: 0, size - 1024 - chunk: 6} {
		if _, err := out.ReadAt(end, off); err != nil || end[0] != want {
			t.Errorf("rescue: byte %d is %d, %v", off, end[0], err)
		}
	}
	for _, to := range []uint32{0, 1, 8, 64} {
		for _, beside := range []block.Device{origin, nil} {
			compacted(t, cow, beside, to, size)
		}
	}
	if w, err := merge.Plan(origin, cow); err != nil || w.Bytes <= 0 || w.Bytes > 6*chunk {
		t.Errorf("merge: %+v, %v", w, err)
	}
	_, err = merge.Offline(ctx, origin, cow, merge.Options{})
	must(err)
	if _, err := origin.ReadAt(end, size-512); err != nil || end[0] != 1 {
		t.Errorf("merged: the last sector reads %d, %v", end[0], err)
	}
}

// compacted makes a dense store in chunks of another size and looks at its first and last byte.
func compacted(t *testing.T, cow, beside block.Device, sectors uint32, size int64) {
	t.Helper()
	p, err := compact.NewPlan(context.Background(), cow, compact.Options{Origin: beside, ChunkSectors: sectors})
	if err != nil {
		if beside != nil {
			t.Errorf("compact to %d: %v", sectors, err)
		}
		return // parts of larger chunks are the origin's
	}
	dst := block.NewMemory(p.Size())
	if _, err := p.Write(context.Background(), dst); err != nil {
		t.Errorf("compact to %d: %v", sectors, err)
		return
	}
	s, err := store.Open(dst)
	if err != nil {
		t.Error(err)
		return
	}
	if _, ok := s.Lookup(s.Layout().OriginChunkAt(size - 512)); !ok {
		t.Errorf("compact to %d: the last sector is not stored", sectors)
	}
}
