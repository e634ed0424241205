package chunkmap

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

// model is a Map that is slow and evidently right.
type model map[ondisk.OriginChunk]ondisk.COWChunk

// pair keeps a Map and its model together.
type pair struct {
	t testing.TB
	Map
	model
}

func newPair(t testing.TB) *pair { return &pair{t: t, model: model{}} }

func (p *pair) insert(old ondisk.OriginChunk, new ondisk.COWChunk) {
	p.t.Helper()
	_, there := p.model[old]
	if !there {
		p.model[old] = new
	}
	if got := p.Insert(ondisk.Exception{Old: old, New: new}); got == there {
		p.t.Fatalf("Insert(%d, %d) = %v", old, new, got)
	}
	p.get(old)
}

func (p *pair) delete(old ondisk.OriginChunk) {
	p.t.Helper()
	_, there := p.model[old]
	delete(p.model, old)
	if got := p.Delete(old); got != there {
		p.t.Fatalf("Delete(%d) = %v", old, got)
	}
	p.get(old)
}

func (p *pair) get(old ondisk.OriginChunk) {
	p.t.Helper()
	want, there := p.model[old]
	if new, ok := p.Get(old); ok != there || ok && new != want {
		p.t.Fatalf("Get(%d) = %d, %v; want %d, %v", old, new, ok, want, there)
	}
}

// run is what Run(old, max) has to answer, given the mapped chunks in order.
func (m model) run(olds []ondisk.OriginChunk, old ondisk.OriginChunk, max uint64) (new ondisk.COWChunk, n uint64, mapped bool) {
	new, mapped = m[old]
	i, _ := slices.BinarySearch(olds, old)
	if !mapped {
		if i < len(olds) {
			return 0, min(max, uint64(olds[i]-old)), false
		}
		return 0, min(max-1, math.MaxUint64-uint64(old)) + 1, false
	}
	// Cut after longestRun more pages than the first.
	max = min(max-1, (uint64(old)|(pageChunks-1))+longestRun*pageChunks-uint64(old)) + 1
	for n = 1; n < max && i+int(n) < len(olds); n++ {
		if next := olds[i+int(n)]; next != old+ondisk.OriginChunk(n) || m[next] != new+ondisk.COWChunk(n) {
			break
		}
	}
	return new, n, true
}

// check compares everything; Run at some places around at most 100 of the exceptions.
func (p *pair) check(r *rand.Rand) {
	p.t.Helper()
	if got := p.Len(); got != uint64(len(p.model)) {
		p.t.Fatalf("Len = %d, want %d", got, len(p.model))
	}
	olds := slices.Sorted(maps.Keys(p.model))
	last, ok := p.Max()
	if ok != (len(olds) > 0) || ok && last != olds[len(olds)-1] {
		p.t.Fatalf("Max = %d, %v", last, ok)
	}
	i := 0
	var previous Run
	for run := range p.All() {
		if run.Count == 0 || i+int(run.Count) > len(olds) {
			p.t.Fatalf("All: %+v, of %d exceptions", run, len(olds))
		}
		if previous.Count > 0 && previous.Old+ondisk.OriginChunk(previous.Count) == run.Old && previous.New+ondisk.COWChunk(previous.Count) == run.New {
			p.t.Fatalf("All: %+v continues %+v", run, previous)
		}
		previous = run
		for j := range run.Count {
			old, new := run.Old+ondisk.OriginChunk(j), run.New+ondisk.COWChunk(j)
			if olds[i] != old || p.model[old] != new {
				p.t.Fatalf("All: %d -> %d, want %d -> %d", old, new, olds[i], p.model[olds[i]])
			}
			i++
		}
	}
	if i != len(olds) {
		p.t.Fatalf("All yields %d exceptions of %d", i, len(olds))
	}
	step := 1 + len(olds)/100
	for i := 0; i < len(olds); i += 1 + r.IntN(step) {
		for _, old := range []ondisk.OriginChunk{olds[i] - 1, olds[i], olds[i] + 1, olds[i] &^ (pageChunks - 1), olds[i] | (pageChunks - 1), olds[i] - ondisk.OriginChunk(r.Uint64N(1<<r.UintN(40)))} {
			p.get(old)
			for _, max := range []uint64{1, 2, 1 + r.Uint64N(5000), 1 << 40, math.MaxUint64} {
				new, n, mapped := p.Run(old, max)
				wantNew, wantN, wantMapped := p.model.run(olds, old, max)
				if new != wantNew || n != wantN || mapped != wantMapped {
					p.t.Fatalf("Run(%d, %d) = %d, %d, %v; want %d, %d, %v", old, max, new, n, mapped, wantNew, wantN, wantMapped)
				}
			}
		}
	}
	p.checkPages()
}

// checkPages looks for what the methods don't show: pages that hold nothing, lists out of order, in
// pieces, or larger than they may be.
func (p *pair) checkPages() {
	p.t.Helper()
	for i := range p.shards {
		d := &p.shards[i].dir
		used := 0
		for j := range d.slots {
			g := &d.slots[j]
			if g.form() == free {
				continue
			}
			used++
			if len(g.words) == 0 {
				p.t.Fatalf("page %d is empty", g.number())
			}
			if g.form() >= narrowTable {
				continue
			}
			n := g.runs()
			if n > 2*maxRuns {
				p.t.Fatalf("page %d is a list of %d runs", g.number(), n)
			}
			for k := 1; k < n; k++ {
				a, b := g.run(k-1), g.run(k)
				if a.end() > b.first || a.end() == b.first && a.new+uint64(a.count) == b.new {
					p.t.Fatalf("page %d has %+v before %+v", g.number(), a, b)
				}
			}
		}
		if used != d.used {
			p.t.Fatalf("shard %d has %d pages, counts %d", i, used, d.used)
		}
	}
}

// TestAgainstModel inserts in many orders, deletes in the middle, and compares with a built-in map.
func TestAgainstModel(t *testing.T) {
	const n = 4000
	// news gives each pattern small numbers, numbers around the limits of the narrow forms, and the
	// largest there may be.
	for _, base := range []ondisk.COWChunk{0, 2, 1<<32 - n/2, 1<<44 - n/2, 1<<56 - 1 - 3*n} {
		patterns := map[string]func(r *rand.Rand, p *pair){
			"ascending": func(r *rand.Rand, p *pair) {
				for i := range n {
					p.insert(ondisk.OriginChunk(i+500), base+ondisk.COWChunk(i+i/256))
				}
			},
			"descending": func(r *rand.Rand, p *pair) {
				for i := range n {
					p.insert(ondisk.OriginChunk(n-i), base+ondisk.COWChunk(i))
				}
			},
			"both descending": func(r *rand.Rand, p *pair) {
				for i := range n {
					p.insert(ondisk.OriginChunk(n-i), base+ondisk.COWChunk(n-i))
				}
			},
			"scattered, dense": func(r *rand.Rand, p *pair) {
				for i, old := range r.Perm(n) {
					p.insert(ondisk.OriginChunk(old), base+ondisk.COWChunk(i))
				}
			},
			"scattered, consecutive homes": func(r *rand.Rand, p *pair) {
				for _, old := range r.Perm(n) {
					p.insert(ondisk.OriginChunk(old), base+ondisk.COWChunk(old))
				}
			},
			"scattered, sparse": func(r *rand.Rand, p *pair) {
				for i := range n {
					p.insert(ondisk.OriginChunk(r.IntN(16*n)), base+ondisk.COWChunk(i))
				}
			},
			"scattered over everything": func(r *rand.Rand, p *pair) {
				for i := range n {
					p.insert(ondisk.OriginChunk(r.Uint64()>>r.UintN(60)), base+ondisk.COWChunk(i))
				}
			},
			"huge stride": func(r *rand.Rand, p *pair) {
				for i := range n {
					p.insert(ondisk.OriginChunk(i)<<45, base+ondisk.COWChunk(i))
				}
			},
			"homes anywhere": func(r *rand.Rand, p *pair) {
				for range n {
					p.insert(ondisk.OriginChunk(r.IntN(2*n)), ondisk.COWChunk(r.Uint64N(1<<(1+r.UintN(56)))))
				}
			},
			"at the end of the numbers": func(r *rand.Rand, p *pair) {
				for i := range n {
					p.insert(math.MaxUint64-ondisk.OriginChunk(r.IntN(2*n)), base+ondisk.COWChunk(i))
				}
				p.insert(math.MaxUint64, base)
			},
			"interleaved runs": func(r *rand.Rand, p *pair) {
				var at [8]int
				for i := range n {
					w := r.IntN(len(at))
					p.insert(ondisk.OriginChunk(w*3*n+at[w]), base+ondisk.COWChunk(w*n/8+at[w]))
					if at[w]++; at[w] == n/8 {
						return
					}
					_ = i
				}
			},
		}
		for name, fill := range patterns {
			t.Run(fmt.Sprintf("%s from %d", name, base), func(t *testing.T) {
				t.Parallel()
				r := rand.New(rand.NewPCG(1, 2))
				p := newPair(t)
				fill(r, p)
				p.check(r)
				olds := slices.Sorted(maps.Keys(p.model))
				for range n / 3 {
					i := r.IntN(len(olds))
					p.delete(olds[i]) // some twice
				}
				p.check(r)
				for i := range n / 3 {
					p.insert(olds[r.IntN(len(olds))], base+ondisk.COWChunk(n+i))
				}
				p.check(r)
				// As a merge does, from the end; the rest in any order.
				for i := range len(olds) / 2 {
					p.delete(olds[len(olds)-1-i])
				}
				p.check(r)
				for _, i := range r.Perm(len(olds)) {
					p.delete(olds[i])
				}
				p.check(r)
				for i := range p.shards {
					if p.shards[i].dir.slots != nil {
						t.Fatal("an empty map keeps memory")
					}
				}
			})
		}
	}
}

// TestFewPages works on so few pages that they take every form again and again.
func TestFewPages(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for seed := range uint64(5) {
		r := rand.New(rand.NewPCG(seed, 0))
		p := newPair(t)
		next := ondisk.COWChunk(0)
		for range 30 {
			start := ondisk.OriginChunk(r.IntN(3 * pageChunks))
			length := 1 + r.IntN(1500)
			if r.IntN(8) == 0 {
				next = ondisk.COWChunk(r.Uint64N(1 << (10 + r.UintN(46))))
			}
			switch r.IntN(4) {
			case 0: // a run
				for i := range length {
					p.insert(start+ondisk.OriginChunk(i), next)
					next++
				}
			case 1: // scattered
				for range length {
					p.insert(ondisk.OriginChunk(r.IntN(3*pageChunks)), next)
					next++
				}
			case 2: // a hole
				for i := range length {
					p.delete(start + ondisk.OriginChunk(i))
				}
			case 3: // holes
				for range length {
					p.delete(ondisk.OriginChunk(r.IntN(3 * pageChunks)))
				}
			}
			p.check(r)
		}
	}
}

// TestTableLimit turns lists into tables that hold the largest home of a narrow one, and one more.
func TestTableLimit(t *testing.T) {
	for _, last := range []ondisk.COWChunk{math.MaxUint32 - 1, math.MaxUint32} {
		p := newPair(t)
		p.insert(1, last)
		for i := range ondisk.OriginChunk(pageChunks / 2) {
			p.insert(2*i+2, ondisk.COWChunk(i)*3)
		}
		table := p.page(0).form() >= narrowTable
		if table != (last < math.MaxUint32) {
			t.Errorf("with a home of %d: table is %v", last, table)
		}
		for i := range ondisk.OriginChunk(pageChunks/2 - 1) {
			p.insert(2*i+3, ondisk.COWChunk(i)*3)
		}
		if p.page(0).form() < narrowTable {
			t.Errorf("with a home of %d: a full page is a list", last)
		}
		p.check(rand.New(rand.NewPCG(0, 0)))
	}
}

// page returns the page of a number.
func (p *pair) page(number uint64) *page {
	h := hash(number)
	return p.shardOf(h).dir.find(h, number)
}

// FuzzMap replays four bytes an operation: what, page, chunk, home.
func FuzzMap(f *testing.F) {
	f.Add([]byte("i0a0i0b1i0c2d0b1"))
	f.Add([]byte{0, 255, 255, 255, 1, 255, 255, 255, 2, 0, 3, 200, 3, 0, 3, 250})
	f.Fuzz(func(t *testing.T, ops []byte) {
		p := newPair(t)
		for ; len(ops) >= 4; ops = ops[4:] {
			old := ondisk.OriginChunk(ops[1])<<(ops[1]%55) + ondisk.OriginChunk(ops[2])*5
			new := ondisk.COWChunk(ops[3]) << (ops[3] % 49)
			switch ops[0] % 4 {
			case 0:
				p.insert(old, new)
			case 1:
				p.delete(old)
			case 2: // a run
				for i := range ondisk.COWChunk(ops[0]) * 4 {
					p.insert(old+ondisk.OriginChunk(i), new+i)
				}
			case 3: // scattered
				for i := range ondisk.COWChunk(ops[0]) * 4 {
					p.insert(old+ondisk.OriginChunk(i)*3, new+i)
				}
			}
		}
		p.check(rand.New(rand.NewPCG(0, 0)))
	})
}
