package chunkmap

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

// TestConcurrent has writers insert and delete, each in ranges of its own that share pages, while readers look. What an
// insertion has returned for must be found, by everybody, where it was put; every chunk has one home of which it is
// known in advance.
func TestConcurrent(t *testing.T) {
	const (
		writers = 3
		chunks  = 10000
	)
	// Ranges of seven consecutive homes, and those of the writers by turns.
	home := func(old ondisk.OriginChunk) ondisk.COWChunk {
		return ondisk.COWChunk(old/7*1000 + old%7 + 2)
	}
	var m Map
	var stable [writers]atomic.Uint64 // chunks below are there permanently
	var writing, reading sync.WaitGroup
	var done atomic.Bool
	for w := range writers {
		writing.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 0))
			for i := ondisk.OriginChunk(0); i < chunks; i++ {
				old := i*writers + ondisk.OriginChunk(w)
				if !m.Insert(ondisk.Exception{Old: old, New: home(old)}) {
					t.Errorf("chunk %d is there before it was inserted", old)
				}
				stable[w].Store(uint64(i) + 1)
				// Something to come and go beyond.
				far := ondisk.OriginChunk(writers*chunks + r.IntN(chunks)*writers + w)
				if !m.Insert(ondisk.Exception{Old: far, New: home(far)}) {
					m.Delete(far)
				}
			}
		})
	}
	for range 2 {
		reading.Go(func() {
			r := rand.New(rand.NewPCG(0, 0))
			for !done.Load() {
				w := r.IntN(writers)
				below := stable[w].Load()
				old := ondisk.OriginChunk(r.Uint64N(2*chunks)*writers + uint64(w))
				new, ok := m.Get(old)
				if ok && new != home(old) || !ok && uint64(old/writers) < below {
					t.Errorf("Get(%d) = %d, %v", old, new, ok)
				}
				new, n, mapped := m.Run(old, 1+r.Uint64N(5000))
				if mapped && (new != home(old) || n > 7) {
					t.Errorf("Run(%d) = %d, %d, %v", old, new, n, mapped)
				}
			}
		})
	}
	reading.Go(func() {
		for !done.Load() {
			var last Run
			for r := range m.All() {
				if r.New != home(r.Old) || last.Count > 0 && r.Old < last.Old+ondisk.OriginChunk(last.Count) {
					t.Errorf("All: %+v after %+v", r, last)
				}
				last = r
			}
			m.Max()
		}
	})
	writing.Wait()
	done.Store(true)
	reading.Wait()
	n := uint64(0)
	for r := range m.All() {
		n += r.Count
	}
	if n != m.Len() {
		t.Errorf("Len = %d, All yields %d", m.Len(), n)
	}
}

// TestInsertAll loads stores of several sizes in parts, beside readers, and finds the first exception of
// an origin chunk that has one.
func TestInsertAll(t *testing.T) {
	for _, n := range []int{0, 1, 100, 100_000} {
		r := rand.New(rand.NewPCG(uint64(n), 0))
		p := newPair(t)
		var es []ondisk.Exception
		for i := range n {
			e := ondisk.Exception{Old: ondisk.OriginChunk(r.IntN(100 * n)), New: ondisk.COWChunk(i + 2)}
			if i > 0 && r.IntN(2) == 0 {
				e.Old = es[len(es)-1].Old + 1
			}
			if _, there := p.model[e.Old]; !there {
				p.model[e.Old] = e.New
				es = append(es, e)
			}
		}
		var reading sync.WaitGroup
		loaded := make(chan struct{})
		reading.Go(func() {
			for {
				for _, e := range es {
					if new, ok := p.Get(e.Old); ok && new != e.New {
						t.Errorf("Get(%d) = %d, want %d", e.Old, new, e.New)
					}
				}
				select {
				case <-loaded:
					return
				default:
				}
			}
		})
		cut := len(es) / 3
		if got := p.InsertAll(es[:cut]); got != cut {
			t.Fatalf("InsertAll of %d = %d", cut, got)
		}
		if got := p.InsertAll(es[cut:]); got != len(es)-cut {
			t.Fatalf("InsertAll of %d = %d", len(es)-cut, got)
		}
		close(loaded)
		reading.Wait()
		p.check(r)
	}
}

func TestInsertAllFindsTheFirstTwice(t *testing.T) {
	const n = 50000
	r := rand.New(rand.NewPCG(3, 0))
	for range 20 {
		var m Map
		es := make([]ondisk.Exception, n)
		for i, old := range r.Perm(n) {
			es[i] = ondisk.Exception{Old: ondisk.OriginChunk(old * 9), New: ondisk.COWChunk(i + 2)}
		}
		first := n
		for range 1 + r.IntN(5) {
			a, b := r.IntN(n), r.IntN(n)
			if a == b {
				continue
			}
			es[max(a, b)].Old = es[min(a, b)].Old
		}
		seen := model{}
		for i, e := range es {
			if _, there := seen[e.Old]; there {
				first = i
				break
			}
			seen[e.Old] = e.New
		}
		if got := m.InsertAll(es); got != first {
			t.Fatalf("InsertAll = %d, want %d", got, first)
		}
		for old, new := range seen {
			if got, ok := m.Get(old); ok && got != new {
				t.Fatalf("Get(%d) = %d after a refusal, want the first, %d", old, got, new)
			}
		}
		if first < n {
			if got, ok := m.Get(es[first].Old); !ok || got != seen[es[first].Old] {
				t.Fatalf("Get(%d) = %d, %v: the first is missing", es[first].Old, got, ok)
			}
		}
		count := uint64(0)
		for r := range m.All() {
			count += r.Count
		}
		if m.Len() != count {
			t.Fatalf("Len = %d, All yields %d", m.Len(), count)
		}
	}
}
