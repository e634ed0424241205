package stack

import (
	"runtime"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// layers returns a chain of n layers with one exception each, and the chains below it.
func layers(t *testing.T, n int) []*Chain {
	t.Helper()
	const size = 1 << 20
	chains := []*Chain{New(block.NewMemory(size), size)}
	for i := range n {
		st, err := store.Create(block.NewMemory(64<<10), ondisk.Layout{ChunkSectors: 8}, false)
		if err != nil {
			t.Fatal(err)
		}
		r, err := st.Reserve(ondisk.OriginChunk(i), 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
		if err := st.Sync(); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Open(st.Device()); err != nil {
			t.Fatal(err)
		}
		l := NewLayer(st)
		chains = append(chains, chains[i].With(l, size))
		l.SetDurable()
	}
	return chains
}

// TestFewSegments: whatever the number of layers, there are few segments.
func TestFewSegments(t *testing.T) {
	for n, c := range layers(t, 70) {
		for c.Compact() {
		}
		if got := len(*c.index.Load()); got > 1 {
			t.Errorf("%d layers have %d segments", n, got)
		}
	}
}

// TestChainsShareSegments: chains with the same lower layers have the same merged segments, also when those that were
// merged on the way are gone.
func TestChainsShareSegments(t *testing.T) {
	chains := layers(t, 64)
	compact := func(c *Chain) []*segment {
		for c.Compact() {
		}
		runtime.GC()
		return *c.index.Load()
	}
	fork := chains[40].With(chains[64].Layers()[63], 1<<20)
	lower := compact(chains[40])
	for len(*fork.index.Load()) > len(lower)+1 && fork.Compact() {
	}
	if index := *fork.index.Load(); !slices.Equal(index[1:], lower) {
		t.Errorf("%d segments of the fork are not the %d of the chain below and its own", len(index), len(lower))
	}
	again := chains[20].With(chains[40].Layers()[20], 1<<20)
	for n := 21; n < 40; n++ {
		again = again.With(chains[40].Layers()[n], 1<<20)
	}
	if got := compact(again); !slices.Equal(got, lower) {
		t.Error("a chain of the same layers has other segments")
	}
}

// TestMergedMapsAreFreed: the map of a layer is freed when all chains that have it in a segment of its own are gone.
func TestMergedMapsAreFreed(t *testing.T) {
	chains := layers(t, 8)
	top := chains[8]
	own := top.Layers()[3]
	clear(chains)
	if own.own.Value() == nil {
		t.Fatal("the segment of the layer is gone before it was merged")
	}
	for top.Compact() {
	}
	runtime.GC()
	runtime.GC()
	if own.own.Value() != nil {
		t.Error("the segment of the layer is still there")
	}
	defer func() {
		if recover() == nil {
			t.Error("With of a layer whose memory was freed: no panic")
		}
	}()
	top.With(own, top.Size())
}
