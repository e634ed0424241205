package chunkmap

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

const million = 1 << 20

// olds are orders in which origin chunks get exceptions: the i-th of n.
var orders = []struct {
	name  string
	space uint64 // chunks of origin; 0: as many as exceptions
	old   func(i, space uint64) uint64
}{
	{"sequential", 0, func(i, space uint64) uint64 { return i }},
	{"descending", 0, func(i, space uint64) uint64 { return space - 1 - i }},
	{"scattered-16M", 16 * million, permute},
	{"scattered-64M", 64 * million, permute},
	{"scattered-256M", 256 * million, permute},
}

// permute is a bijection on [0, space) for a power of two, without pattern.
func permute(i, space uint64) uint64 {
	mask := space - 1
	for range 3 {
		i = (i*0x9E3779B97F4A7C15 + 0x1234567) & mask
		i ^= i >> 13
	}
	return i & mask
}

// exceptions makes the store that is written in that order, with an area's chunk after every 256.
func exceptions(order int, n uint64) []ondisk.Exception {
	o := orders[order]
	space := o.space
	if space == 0 {
		space = n
	}
	es := make([]ondisk.Exception, n)
	for i := range es {
		i := uint64(i)
		es[i] = ondisk.Exception{Old: ondisk.OriginChunk(o.old(i, space)), New: ondisk.COWChunk(i + 2 + i/256)}
	}
	return es
}

// heap is the memory in use; three rounds free what pools keep.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkBuild fills a map from nothing: time an exception, and heap bytes an exception afterwards.
func BenchmarkBuild(b *testing.B) {
	for i, o := range orders {
		for _, n := range []uint64{million, 16 * million} {
			if n > million && testing.Short() {
				continue
			}
			es := exceptions(i, n)
			b.Run(fmt.Sprintf("one-by-one/%s/%dM", o.name, n/million), func(b *testing.B) {
				build(b, es, func(m *Map) {
					for _, e := range es {
						m.Insert(e)
					}
				})
			})
			b.Run(fmt.Sprintf("by-a-million/%s/%dM", o.name, n/million), func(b *testing.B) {
				build(b, es, func(m *Map) {
					for part := range slices.Chunk(es, million) {
						m.InsertAll(part)
					}
				})
			})
		}
	}
}

func build(b *testing.B, es []ondisk.Exception, fill func(*Map)) {
	before := heap()
	var m *Map
	for b.Loop() {
		m = new(Map)
		fill(m)
	}
	n := float64(len(es))
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/exception")
	b.ReportMetric(float64(heap()-before)/n, "B/exception")
	runtime.KeepAlive(m)
	runtime.KeepAlive(es)
}

// BenchmarkGet looks up exceptions and, as often, chunks without one.
func BenchmarkGet(b *testing.B) {
	for i, o := range orders {
		for _, n := range []uint64{million / 16, million, 16 * million} {
			if n > million && testing.Short() {
				continue
			}
			es := exceptions(i, n)
			var m Map
			for _, e := range es {
				m.Insert(e)
			}
			rand.New(rand.NewPCG(0, 0)).Shuffle(len(es), func(i, j int) { es[i], es[j] = es[j], es[i] })
			b.Run(fmt.Sprintf("hit/%s/%dK", o.name, n/1024), func(b *testing.B) {
				i := 0
				for b.Loop() {
					if _, ok := m.Get(es[i&(len(es)-1)].Old); !ok {
						b.Fatal("miss")
					}
					i++
				}
			})
			b.Run(fmt.Sprintf("miss/%s/%dK", o.name, n/1024), func(b *testing.B) {
				i := 0
				for b.Loop() {
					m.Get(es[i&(len(es)-1)].Old + 1<<30)
					i++
				}
			})
		}
	}
}

// BenchmarkGetBesideInserts looks up on all processors while one goroutine inserts and deletes.
func BenchmarkGetBesideInserts(b *testing.B) {
	es := exceptions(3, million)
	var m Map
	for _, e := range es {
		m.Insert(e)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			e := es[i&(len(es)-1)]
			m.Delete(e.Old)
			m.Insert(e)
		}
	}()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		i := rand.IntN(len(es))
		for pb.Next() {
			m.Get(es[i&(len(es)-1)].Old)
			i++
		}
	})
	close(stop)
	<-stopped
}

// BenchmarkLargeHomes has exceptions of every chunk, scattered, in COW chunks that need the wide forms.
func BenchmarkLargeHomes(b *testing.B) {
	es := make([]ondisk.Exception, million/8)
	for i := range es {
		es[i] = ondisk.Exception{Old: ondisk.OriginChunk(permute(uint64(i), million/8)), New: ondisk.COWChunk(1<<56 - 1 - i)}
	}
	fill := func(m *Map) {
		for _, e := range es {
			m.Insert(e)
		}
	}
	b.Run("build", func(b *testing.B) { build(b, es, fill) })
	b.Run("get", func(b *testing.B) {
		var m Map
		fill(&m)
		for i := 0; b.Loop(); i++ {
			if _, ok := m.Get(es[i*7919&(len(es)-1)].Old); !ok {
				b.Fatal("miss")
			}
		}
	})
}
