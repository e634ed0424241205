package gate

import (
	"fmt"
	"sync"
	"testing"
)

// withOthers runs f beside so many owners and readers of other chunks.
func withOthers(b *testing.B, f func(g *Gate)) {
	for _, n := range []int{0, 100, 5000} {
		b.Run(fmt.Sprintf("others=%d", n), func(b *testing.B) {
			var g Gate
			for i := range uint64(n) {
				g.Own(Span{1000 + i, 1000 + i})
				g.Enter(Span{1000 + i, 1000 + i})
			}
			b.ReportAllocs()
			for b.Loop() {
				f(&g)
			}
		})
	}
}

func BenchmarkOwn(b *testing.B) {
	withOthers(b, func(g *Gate) { g.Own(Span{5, 5}).Release() })
}

func BenchmarkEnter(b *testing.B) {
	withOthers(b, func(g *Gate) { g.Enter(Span{5, 5}).Leave() })
}

func BenchmarkDrain(b *testing.B) {
	withOthers(b, func(g *Gate) { g.Drain(Span{5, 5}) })
}

// BenchmarkOwnWindow owns 10,000 spans beside a hundred small owners.
func BenchmarkOwnWindow(b *testing.B) {
	var g Gate
	window := make([]Span, 10_000)
	for i := range window {
		window[i] = Span{uint64(i) * 10, uint64(i)*10 + 4}
	}
	for i := range uint64(100) {
		g.Own(Span{i*20 + 5, i*20 + 9})
	}
	for b.Loop() {
		g.Own(window...).Release()
	}
}

// BenchmarkContended has every processor ask for one of two chunks.
func BenchmarkContended(b *testing.B) {
	var g Gate
	var mu sync.Mutex
	next := uint64(0)
	b.RunParallel(func(pb *testing.PB) {
		mu.Lock()
		next++
		i := next
		mu.Unlock()
		for ; pb.Next(); i++ {
			g.Own(Span{i % 2, i % 2}).Release()
		}
	})
}
