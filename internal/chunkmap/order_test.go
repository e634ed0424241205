package chunkmap

import (
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/ondisk"
)

// TestOrder holds an order against a sorted slice.
func TestOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 0))
	for range 20 {
		var o order
		var want []uint64
		space := uint64(1) << (4 + r.UintN(12))
		for range 20_000 {
			number := r.Uint64N(space)
			at, there := slices.BinarySearch(want, number)
			switch {
			case r.IntN(3) > 0:
				if o.add(number); !there {
					want = slices.Insert(want, at, number)
				}
			default:
				if o.remove(number); there {
					want = slices.Delete(want, at, at+1)
				}
			}
			number = r.Uint64N(space)
			at, _ = slices.BinarySearch(want, number)
			got, ok := o.next(number)
			if ok != (at < len(want)) || ok && got != want[at] {
				t.Fatalf("next(%d) = %d, %v", number, got, ok)
			}
		}
		if got := slices.Concat(o.leaves...); !slices.Equal(got, want) {
			t.Fatalf("%d numbers, want %d", len(got), len(want))
		}
		for _, l := range o.leaves {
			if len(l) == 0 || len(l) > leafSize {
				t.Fatalf("a leaf of %d numbers", len(l))
			}
		}
	}
}

// TestRunCost: to go through a map whose pages are far apart by Run, while pages come and go, looks at all of its pages
// once, not once for each gap.
func TestRunCost(t *testing.T) {
	const pages, gap = 1 << 15, 1000 * pageChunks
	var m Map
	for i := range ondisk.OriginChunk(pages) {
		m.Insert(ondisk.Exception{Old: i * gap, New: 5})
	}
	steps := 0
	for old := ondisk.OriginChunk(0); old < pages*gap; steps++ {
		new, n, mapped := m.Run(old, uint64(pages*gap-old))
		if mapped != (old%gap == 0) || mapped && (new != 5 || n != 1) || !mapped && n > gap-1 {
			t.Fatalf("Run(%d) = %d, %d, %v", old, new, n, mapped)
		}
		old += ondisk.OriginChunk(n)
		if mapped && steps%3 == 0 {
			m.Delete(old - 1)
			m.Insert(ondisk.Exception{Old: old + 500*pageChunks, New: 5})
			_, n, _ := m.Run(old, 1<<50)
			if n != 500*pageChunks {
				t.Fatalf("Run(%d) = %d, with a page in the gap", old, n)
			}
			m.Delete(old + 500*pageChunks)
		}
	}
	if steps > 3*pages || m.order.builds != 1 {
		t.Errorf("%d steps, pages collected %d times", steps, m.order.builds)
	}
}

// TestOrderIsBuiltBesideInserts: a page that was inserted before Run is found by it, also one that is made while
// the pages are collected.
func TestOrderIsBuiltBesideInserts(t *testing.T) {
	const gap = 100 * pageChunks
	for range 20 {
		var m Map
		for i := range ondisk.OriginChunk(5000) {
			m.Insert(ondisk.Exception{Old: (1000 + i) * 2 * gap, New: 5})
		}
		var group sync.WaitGroup
		var inserted atomic.Uint64
		group.Go(func() {
			for i := range ondisk.OriginChunk(500) {
				m.Insert(ondisk.Exception{Old: (3000 - i) * gap, New: 5}) // ever nearer to 0
				inserted.Store(uint64(3000-i) * gap)
			}
		})
		for range 2 {
			group.Go(func() {
				for range 500 {
					before := inserted.Load()
					if _, n, mapped := m.Run(1, 1<<50); mapped || before > 0 && n > before-1 || n < 2501*gap-1 && n != 2000*gap-1 {
						t.Errorf("Run(1) = %d, %v; the first is at most at %d", n, mapped, before)
						return
					}
				}
			})
		}
		group.Wait()
	}
}

// TestPageMadeWhileTheOrderIsBuilt: the same, with the page made after its shard was looked at.
func TestPageMadeWhileTheOrderIsBuilt(t *testing.T) {
	var m Map
	m.Insert(ondisk.Exception{Old: 1 << 50, New: 5})
	number := uint64(1000)
	for hash(number)%shards != 0 {
		number++
	}
	last := &m.shards[shards-1].mu
	last.Lock() // building stops there
	built := make(chan struct{})
	go func() {
		defer close(built)
		m.buildOrder()
	}()
	for !m.order.wanted.Load() {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond) // for the shards before the last
	m.Insert(ondisk.Exception{Old: ondisk.OriginChunk(number * pageChunks), New: 5})
	last.Unlock()
	<-built
	if _, n, mapped := m.Run(0, 1<<52); n != number*pageChunks || mapped {
		t.Errorf("Run(0) = %d, %v; the first is at %d", n, mapped, number*pageChunks)
	}
}
