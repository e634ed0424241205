package gate

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// log says in which order things happened, each in a goroutine of its own.
type log struct {
	mu   sync.Mutex
	done []string
}

func (l *log) add(what string) {
	l.mu.Lock()
	l.done = append(l.done, what)
	l.mu.Unlock()
}

// expect waits until nothing moves any more, and compares what has happened since the last call.
func (l *log) expect(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	slices.Sort(l.done)
	if !slices.Equal(l.done, want) {
		t.Fatalf("happened: %q, want %q", l.done, want)
	}
	l.done = nil
}

// own owns spans in a goroutine until release is called.
func own(g *Gate, l *log, name string, spans ...Span) (release func()) {
	c := make(chan struct{})
	go func() {
		o := g.Own(spans...)
		l.add(name)
		<-c
		o.Release()
	}()
	synctest.Wait()
	return func() { close(c) }
}

func TestOwnersExcludeEachOtherByChunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gate
		var l log
		a := own(&g, &l, "a", Span{10, 19})
		l.expect(t, "a")
		below := own(&g, &l, "below", Span{0, 9})
		above := own(&g, &l, "above", Span{20, 1<<64 - 1})
		l.expect(t, "above", "below")
		first := own(&g, &l, "first", Span{10, 10})
		last := own(&g, &l, "last", Span{19, 19})
		l.expect(t)
		a()
		l.expect(t, "first", "last")
		for _, release := range []func(){below, above, first, last} {
			release()
		}
		synctest.Wait()
		if n := len(g.owners.list); n != 0 {
			t.Errorf("%d owners are left", n)
		}
	})
}

// TestWindow: an owner of several spans gets all of them or none, in its turn, and the gaps between them
// are free.
func TestWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gate
		var l log
		a := own(&g, &l, "a", Span{5, 5})
		window := own(&g, &l, "window", Span{0, 9}, Span{20, 29}, Span{40, 49})
		l.expect(t, "a")
		gap := own(&g, &l, "gap", Span{10, 19})
		far := own(&g, &l, "far", Span{50, 99})
		l.expect(t, "far", "gap")
		// Behind the window, though its chunks are free: a stream of these would keep the window waiting.
		small := own(&g, &l, "small", Span{25, 25})
		behindSmall := own(&g, &l, "behind small", Span{25, 39})
		l.expect(t)
		a()
		l.expect(t, "window")
		other := own(&g, &l, "other window", Span{1, 1}, Span{45, 45}, Span{60, 60})
		window()
		l.expect(t, "small")
		far()
		l.expect(t, "other window")
		small()
		l.expect(t, "behind small")
		other()
		behindSmall()
		gap()
	})
}

// TestSameChunk: many who want the same chunk get it one after the other in the order in which they
// came, and each waits for one.
func TestSameChunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gate
		const n = 50
		var order []int
		held := g.Own(Span{7, 7})
		for i := range n {
			go func() {
				o := g.Own(Span{7, 7})
				order = append(order, i)
				o.Release()
			}()
			synctest.Wait()
		}
		for _, x := range g.owners.list {
			if len(x.behind) > 1 || x.waits > 1 {
				t.Fatalf("one of %d waits for %d, %d wait for it", n, x.waits, len(x.behind))
			}
		}
		held.Release()
		synctest.Wait()
		if len(order) != n || !slices.IsSorted(order) {
			t.Errorf("order %v", order)
		}
	})
}

func TestReadersNeverWait(t *testing.T) {
	var g Gate
	o := g.Own(Span{0, 9})
	a := g.Enter(Span{5, 5}) // would hang
	b := g.Enter(Span{0, 99})
	a.Leave()
	b.Leave()
	o.Release()
	c := g.Enter(Span{5, 5})
	g.Own(Span{5, 5}).Release() // nor does an owner wait for readers
	c.Leave()
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gate
		var l log
		g.Drain(Span{0, 1<<64 - 1}) // nobody there
		a, b := g.Enter(Span{0, 4}), g.Enter(Span{4, 8})
		elsewhere := g.Enter(Span{100, 200})
		drain := func(name string, s Span) {
			go func() {
				g.Drain(s)
				l.add(name)
			}()
			synctest.Wait()
		}
		drain("none", Span{9, 99})
		l.expect(t, "none")
		drain("a", Span{0, 3})
		drain("both", Span{4, 4})
		drain("all", Span{0, 1<<64 - 1})
		l.expect(t)
		later := g.Enter(Span{0, 8}) // the drains above don't wait for it
		drain("with later", Span{8, 8})
		a.Leave()
		l.expect(t, "a")
		b.Leave()
		l.expect(t, "both")
		elsewhere.Leave()
		l.expect(t, "all")
		drain("later", Span{0, 0})
		later.Leave()
		l.expect(t, "later", "with later")
		if n := len(g.readers.list); n != 0 {
			t.Errorf("%d readers are left", n)
		}
	})
}

func TestMisuse(t *testing.T) {
	for name, f := range map[string]func(g *Gate){
		"released twice": func(g *Gate) {
			o := g.Own(Span{1, 1})
			o.Release()
			o.Release()
		},
		"released twice, reused in between": func(g *Gate) {
			o := g.Own(Span{1, 1})
			o.Release()
			g.Own(Span{1, 1})
			o.Release()
		},
		"left twice": func(g *Gate) {
			r := g.Enter(Span{1, 1})
			r.Leave()
			g.Enter(Span{1, 1})
			r.Leave()
		},
		"never held":             func(g *Gate) { Owned{}.Release() },
		"no spans":               func(g *Gate) { g.Own() },
		"ascending and disjoint": func(g *Gate) { g.Own(Span{5, 6}, Span{6, 7}) },
		"ascending":              func(g *Gate) { g.Own(Span{6, 5}) },
	} {
		t.Run(name, func(t *testing.T) {
			var g Gate
			defer func() {
				what, _ := recover().(string)
				if !strings.Contains(what, strings.Split(name, ",")[0]) {
					t.Errorf("panic %q", what)
				}
				// The gate still works.
				g.Own(Span{2, 2}).Release()
				g.Enter(Span{2, 2}).Leave()
			}()
			f(&g)
			t.Error("no panic")
		})
	}
}

// TestStress has owners of one span and of many, readers and drainers meet on few chunks, and checks
// exclusion and drains by counters of their own.
func TestStress(t *testing.T) {
	const chunks, rounds = 64, 3000
	var g Gate
	var owner [chunks]atomic.Int32
	var made [chunks]atomic.Bool     // has an exception: the origin may change
	var reading [chunks]atomic.Int32 // from the origin, found unmade after Enter
	var all sync.WaitGroup
	for w := range 6 {
		all.Go(func() { // as the snapshot does for an origin write
			r := rand.New(rand.NewPCG(uint64(w), 0))
			for range rounds {
				var spans []Span
				for at := uint64(r.IntN(chunks)); at < chunks; at += 1 + r.Uint64N(20) {
					last := min(chunks-1, at+r.Uint64N(3))
					spans = append(spans, Span{at, last})
					at = last
					if r.IntN(4) > 0 {
						break
					}
				}
				o := g.Own(spans...)
				for _, s := range spans {
					for i := s.First; i <= s.Last; i++ {
						if n := owner[i].Add(1); n != 1 {
							t.Errorf("chunk %d has %d owners", i, n)
						}
						made[i].Store(true)
					}
					g.Drain(s)
					for i := s.First; i <= s.Last; i++ {
						if n := reading[i].Load(); n != 0 {
							t.Errorf("chunk %d has %d readers after the drain", i, n)
						}
						made[i].Store(false)
						owner[i].Add(-1)
					}
				}
				o.Release()
			}
		})
	}
	for w := range 4 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for range rounds {
				first := r.Uint64N(chunks)
				s := Span{first, min(chunks-1, first+r.Uint64N(4))}
				in := g.Enter(s)
				var mine []uint64
				for i := s.First; i <= s.Last; i++ {
					if !made[i].Load() {
						mine = append(mine, i)
					}
				}
				for _, i := range mine {
					reading[i].Add(1)
				}
				runtime.Gosched() // reads
				for _, i := range mine {
					reading[i].Add(-1)
				}
				in.Leave()
			}
		})
	}
	all.Wait()
	if len(g.owners.list) != 0 || len(g.readers.list) != 0 || g.entered.Load() != 0 {
		t.Errorf("%d owners and %d readers are left", len(g.owners.list), len(g.readers.list))
	}
}

// TestLargeWindow: a window of 10,000 spans with thousands of writers behind it, and thousands elsewhere,
// costs no more than a moment.
func TestLargeWindow(t *testing.T) {
	const spans, writers = 10_000, 5000
	synctest.Test(t, func(t *testing.T) {
		var g Gate
		window := make([]Span, spans)
		for i := range window {
			window[i] = Span{uint64(i) * 10, uint64(i)*10 + 4}
		}
		w := g.Own(window...)
		var behind, elsewhere sync.WaitGroup
		var through atomic.Int32
		for i := range uint64(writers) {
			behind.Go(func() {
				o := g.Own(Span{i*20 + 3, i*20 + 4})
				through.Add(1)
				o.Release()
			})
			elsewhere.Go(func() {
				g.Own(Span{i*20 + 5, i*20 + 9}).Release()
			})
		}
		elsewhere.Wait()
		synctest.Wait()
		if n := through.Load(); n != 0 {
			t.Errorf("%d got chunks of the window", n)
		}
		w.Release()
		behind.Wait()
		if n := through.Load(); n != writers {
			t.Errorf("%d of %d got through", n, writers)
		}
	})
}

// TestStream: a window is granted while small owners come without end.
func TestStream(t *testing.T) {
	var g Gate
	var done atomic.Bool
	var streams sync.WaitGroup
	for w := range uint64(8) {
		streams.Go(func() {
			for i := w; !done.Load(); i++ {
				o := g.Own(Span{i % 4, i % 4})
				runtime.Gosched()
				o.Release()
			}
		})
	}
	for range 500 {
		g.Own(Span{0, 1}, Span{3, 3}).Release() // would hang
	}
	done.Store(true)
	streams.Wait()
}

func TestAllocations(t *testing.T) {
	var g Gate
	for name, f := range map[string]func(){
		"Own":   func() { g.Own(Span{1, 5}).Release() },
		"Enter": func() { g.Enter(Span{1, 5}).Leave() },
		"Drain": func() { g.Drain(Span{1, 5}) },
	} {
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}
