package chunkmap

import (
	"math"
	"slices"
)

// stride is the number of words of a run.
func (p *page) stride() int {
	if p.form() == wideList {
		return 2
	}
	return 1
}

// runs is the number of runs of a list.
func (p *page) runs() int { return len(p.words) / p.stride() }

// run returns run i of a list.
func (p *page) run(i int) run {
	if p.form() == wideList {
		r := unpack(p.words[2*i])
		r.new = p.words[2*i+1]
		return r
	}
	return unpack(p.words[i])
}

func pack(r run) uint64 {
	return uint64(r.first)<<firstBits | uint64(r.count-1)<<homeBits | r.new&(1<<homeBits-1)
}

func unpack(w uint64) run {
	return run{int(w >> firstBits), int(w>>homeBits)&(pageChunks-1) + 1, w & (1<<homeBits - 1)}
}

// find returns the index of the last run of a list that begins at or before chunk at, or -1.
//
// A long list is far from any cache, and the runs of one lie more or less evenly. So the search begins
// where the run would be if they did, goes from there in growing steps until it has passed the run, and
// halves what is left: mostly in one cache line.
func (p *page) find(at int) int {
	k := p.stride()
	n := len(p.words) / k
	if n == 0 {
		return -1
	}
	after := uint64(at)<<firstBits | (1<<firstBits - 1) // the largest word of a run that begins at at
	from, to := -1, n                                   // run from is at or before, run to behind
	guess, step := at*n>>pageShift, 1
	if p.words[guess*k] <= after {
		for from = guess; from+step < n; step *= 2 {
			if p.words[(from+step)*k] > after {
				to = from + step
				break
			}
			from += step
		}
	} else {
		for to = guess; to-step >= 0; step *= 2 {
			if p.words[(to-step)*k] <= after {
				from = to - step
				break
			}
			to -= step
		}
	}
	for to-from > 1 {
		half := int(uint(from+to) / 2)
		if p.words[half*k] <= after {
			from = half
		} else {
			to = half
		}
	}
	return from
}

// setRun replaces run i of a list.
func (p *page) setRun(i int, r run) {
	p.widenFor(r)
	if p.form() == wideList {
		p.words[2*i], p.words[2*i+1] = pack(r), r.new
	} else {
		p.words[i] = pack(r)
	}
}

// addRun inserts a run into a list, as its i-th.
func (p *page) addRun(i int, r run) {
	p.widenFor(r)
	k, n := p.stride(), len(p.words)
	if n+k > cap(p.words) {
		// A quarter more at a time, and what the allocator rounds that up to: a plain append would
		// double.
		words := append([]uint64(nil), make([]uint64, n+k+n/4)...)
		copy(words, p.words)
		p.words = words
	}
	p.words = p.words[:n+k]
	copy(p.words[(i+1)*k:], p.words[i*k:n])
	p.setRun(i, r)
}

// dropRun removes run i of a list.
func (p *page) dropRun(i int) {
	k := p.stride()
	p.words = slices.Delete(p.words, i*k, (i+1)*k)
	if len(p.words) == 0 {
		p.words = nil
	}
}

// widenFor makes a narrow list wide if the home of r does not fit.
func (p *page) widenFor(r run) {
	if r.new < 1<<homeBits || p.form() == wideList {
		return
	}
	words := make([]uint64, 0, 2*(len(p.words)+1))
	for _, w := range p.words {
		words = append(words, w, unpack(w).new)
	}
	p.become(wideList, words)
}

// toTable makes a list a table of the form, or returns false when a home does not fit into the table.
func (p *page) toTable(form int) bool {
	t := page{words: make([]uint64, pageChunks/2)}
	if form == wideTable {
		t.words = make([]uint64, pageChunks)
	}
	t.become(form, t.words)
	for i := range p.runs() {
		r := p.run(i)
		if form == narrowTable && r.new+uint64(r.count) > math.MaxUint32 {
			return false
		}
		for j := range r.count {
			t.setEntry(r.first+j, r.new+uint64(j)+1)
		}
	}
	p.become(form, t.words)
	return true
}

// entry returns entry i of a table.
func (p *page) entry(i int) uint64 {
	if p.form() == wideTable {
		return p.words[i]
	}
	return uint64(uint32(p.words[i/2] >> (i % 2 * 32)))
}

// setEntry writes entry i of a table, which becomes wide when it must.
func (p *page) setEntry(i int, e uint64) {
	if p.form() == narrowTable && e > math.MaxUint32 {
		words := make([]uint64, pageChunks)
		for j := range words {
			words[j] = p.entry(j)
		}
		p.become(wideTable, words)
	}
	if p.form() == wideTable {
		p.words[i] = e
		return
	}
	shift := i % 2 * 32
	p.words[i/2] = p.words[i/2]&^(math.MaxUint32<<shift) | e<<shift
}

// tableUniform is uniform for a table.
func (p *page) tableUniform(at, max int) (new uint64, n int, mapped bool) {
	first := p.entry(at)
	for n = 1; n < max && at+n < pageChunks; n++ {
		e := p.entry(at + n)
		if first == 0 && e != 0 || first != 0 && e != first+uint64(n) {
			break
		}
	}
	if first == 0 {
		return 0, n, false
	}
	return first - 1, n, true
}
