package stack_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
	"golang.org/x/sys/unix"
)

// layered returns a chain of n layers, in files, over a base of 256 MiB, in which together every second chunk is stored, at
// random places.
func layered(tb testing.TB, n int) *stack.Chain {
	tb.Helper()
	const size = 256 << 20
	dir := tb.TempDir()
	base, err := block.CreateUnsynced(filepath.Join(dir, "base"), size)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { base.Close() })
	order := rand.New(rand.NewPCG(1, 2)).Perm(size / 4096)
	order = order[:len(order)/2]
	c := stack.New(base, size)
	data := make([]byte, 4096)
	for k := range n {
		f, st, err := cowfile.CreateUnsynced(filepath.Join(dir, fmt.Sprint(k)), size, cowfile.Options{})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { f.Close() })
		for _, old := range order[len(order)*k/n : len(order)*(k+1)/n] {
			r, err := st.Reserve(ondisk.OriginChunk(old), 1)
			if err != nil {
				tb.Fatal(err)
			}
			if _, err := f.WriteAt(data, st.Layout().COWOffset(r.New)); err != nil {
				tb.Fatal(err)
			}
			if err := r.Commit(); err != nil {
				tb.Fatal(err)
			}
		}
		c = c.With(stack.NewLayer(st), size)
	}
	for c.Compact() {
	}
	return c
}

// BenchmarkRead reads 4 KiB at random, through one layer and through 64 with as many exceptions.
func BenchmarkRead(b *testing.B) {
	for _, n := range []int{1, 64} {
		c := layered(b, n)
		p := make([]byte, 1<<20)
		for off := int64(0); off < c.Size(); off += 1 << 20 { // into the cache of the operating system
			if _, err := c.ReadAt(p, off); err != nil {
				b.Fatal(err)
			}
		}
		b.Run(fmt.Sprintf("layers=%d", n), func(b *testing.B) {
			r := rand.New(rand.NewPCG(3, 4))
			p := p[:4096]
			defer processor(b, 1)()
			for b.Loop() {
				if _, err := c.ReadAt(p, r.Int64N(c.Size()/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("place/layers=%d", n), func(b *testing.B) {
			r := rand.New(rand.NewPCG(3, 4))
			defer processor(b, 1)()
			for b.Loop() {
				c.Place(r.Int64N(c.Size()/4096)*4096, 4096)
			}
		})
	}
}

// BenchmarkMerge merges two layers with exceptions at random places.
func BenchmarkMerge(b *testing.B) {
	const chunks = 1 << 20
	var stores []*store.Store
	for k := range 2 {
		stores = append(stores, scattered(b, uint64(k), chunks, chunks/4))
	}
	n := int(stores[0].Len() + stores[1].Len())
	defer processor(b, n)()
	for b.Loop() {
		c := stack.New(block.NewMemory(chunks*4096), chunks*4096)
		for _, st := range stores {
			c = c.With(stack.NewLayer(st), c.Size())
		}
		for c.Compact() {
		}
	}
}

// scattered returns a store with n exceptions at random places of a disk of so many chunks of 4 KiB.
func scattered(tb testing.TB, seed uint64, chunks, n int) *store.Store {
	tb.Helper()
	st, _ := newStore(tb, 8, int64(chunks)*4096)
	for _, old := range rand.New(rand.NewPCG(seed, 2)).Perm(chunks)[:n] {
		r, err := st.Reserve(ondisk.OriginChunk(old), 1)
		if err != nil {
			tb.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			tb.Fatal(err)
		}
	}
	return st
}

// BenchmarkIndexMemory measures the merged index of 16 layers with a million exceptions each, and 100 chains that share it.
func BenchmarkIndexMemory(b *testing.B) {
	for _, spread := range []int{1, 4, 64} { // of how many chunks one is stored
		b.Run(fmt.Sprintf("one-of=%d", spread), func(b *testing.B) {
			const per = 1 << 20
			for b.Loop() {
				chunks := per * 16 * spread
				order := rand.New(rand.NewPCG(5, 6))
				c := stack.New(block.NewMemory(int64(chunks)*4096), int64(chunks)*4096)
				before := heap()
				for range 16 {
					st, err := store.Create(nowhere{size: int64(chunks+chunks/128) * 4096}, ondisk.Layout{ChunkSectors: 8}, true)
					if err != nil {
						b.Fatal(err)
					}
					for st.Len() < per {
						old := ondisk.OriginChunk(order.Uint64N(uint64(chunks)))
						if _, there := st.Lookup(old); there {
							continue
						}
						r, err := st.Reserve(old, 1)
						if err != nil {
							b.Fatal(err)
						}
						if err := r.Commit(); err != nil {
							b.Fatal(err)
						}
					}
					if err := st.Sync(); err != nil {
						b.Fatal(err)
					}
					l := stack.NewLayer(st)
					c = c.With(l, c.Size())
					l.SetDurable()
					for c.Compact() {
					}
				}
				for range c.StoredSince(nil, 0, c.Size()) {
				} // the order of the pages is made
				after := heap()
				b.ReportMetric(float64(after-before)/(16*per), "B/exception")
				tops := make([]*snapshot.Origin, 100)
				for i := range tops {
					tops[i] = snapshot.NewOrigin(c)
				}
				b.ReportMetric(float64(heap()-after)/100, "B/fork")
				runtime.KeepAlive(tops)
			}
		})
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// processor returns a function that reports the processor time of the goroutine since the call, for each of the n units of
// an iteration: on a busy machine it says more than the time that passed.
func processor(b *testing.B, n int) func() {
	runtime.LockOSThread()
	begin := threadTime()
	return func() {
		b.ReportMetric(float64(threadTime()-begin)/float64(b.N)/float64(n), "cpu-ns/unit")
		runtime.UnlockOSThread()
	}
}

func threadTime() int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		panic(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// nowhere is a device that takes no memory.
type nowhere struct{ size int64 }

func (nowhere) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (nowhere) Flush() error                           { return nil }
func (n nowhere) Size() int64                          { return n.size }
