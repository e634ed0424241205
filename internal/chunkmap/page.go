package chunkmap

import (
	"math"
	"slices"
)

const (
	pageShift  = 10
	pageChunks = 1 << pageShift
	lastChunk  = math.MaxUint64
)

// A page is 1024 consecutive origin chunks, in the smallest form that holds them. words is nil when it is empty.
type page struct {
	tag   uint64 // number of the page << pageShift | form
	words []uint64
}

// The forms of a page. In a table, entry i is the home of chunk i plus one, or 0.
const (
	free        = iota // an unused slot of the directory
	narrowList         // a word a run: first chunk, 10 bits; count-1, 10 bits; home, 44 bits
	wideList           // two words a run: as above, with an unused home; home
	narrowTable        // two entries a word, the even one in the low half
	wideTable          // an entry a word
)

const (
	homeBits  = 64 - 2*pageShift
	firstBits = 64 - pageShift

	// maxRuns is where a list becomes a narrow table, which costs 12 bytes a run there. A list of
	// single chunks would be smaller up to 512 of them, but the larger it is the more must be moved
	// for each. A wide table pays at twice as many.
	maxRuns = pageChunks / 3
)

// A run is count chunks of the page from first on, stored in as many COW chunks from new on.
type run struct {
	first, count int
	new          uint64
}

func (r run) end() int { return r.first + r.count }

func newPage(number uint64) page { return page{tag: number<<pageShift | narrowList} }

func (p *page) number() uint64 { return p.tag >> pageShift }
func (p *page) form() int      { return int(p.tag & (pageChunks - 1)) }

func (p *page) become(form int, words []uint64) {
	p.tag, p.words = p.number()<<pageShift|uint64(form), words
}

// get returns the COW chunk of chunk at.
func (p *page) get(at int) (new uint64, mapped bool) {
	if p.form() >= narrowTable {
		e := p.entry(at)
		return e - 1, e != 0
	}
	if i := p.find(at); i >= 0 {
		if r := p.run(i); at < r.end() {
			return r.new + uint64(at-r.first), true
		}
	}
	return 0, false
}

// uniform describes the longest uniform range from chunk at on, within the page. A table is not measured past max chunks.
func (p *page) uniform(at, max int) (new uint64, n int, mapped bool) {
	if p.form() >= narrowTable {
		return p.tableUniform(at, max)
	}
	i := p.find(at)
	if i >= 0 {
		if r := p.run(i); at < r.end() {
			return r.new + uint64(at-r.first), r.end() - at, true
		}
	}
	if i+1 < p.runs() {
		return 0, p.run(i+1).first - at, false
	}
	return 0, pageChunks - at, false
}

// appendTo appends the runs of the page to runs, in ascending order.
func (p *page) appendTo(runs []run) []run {
	if p.form() < narrowTable {
		for i := range p.runs() {
			runs = append(runs, p.run(i))
		}
		return runs
	}
	for at := 0; at < pageChunks; {
		new, n, mapped := p.tableUniform(at, pageChunks)
		if mapped {
			runs = append(runs, run{at, n, new})
		}
		at += n
	}
	return runs
}

// insert adds chunk at, or returns false when it is there.
func (p *page) insert(at int, new uint64) bool {
	if p.form() >= narrowTable {
		if p.entry(at) != 0 {
			return false
		}
		p.setEntry(at, new+1)
		return true
	}
	i := p.find(at)
	var left, right run // the adjacent runs
	if i >= 0 {
		left = p.run(i)
		if at < left.end() {
			return false
		}
	}
	if i+1 < p.runs() {
		right = p.run(i + 1)
	}
	joinsLeft := left.count > 0 && left.end() == at && left.new+uint64(left.count) == new
	joinsRight := right.count > 0 && right.first == at+1 && right.new == new+1
	switch {
	case joinsLeft && joinsRight:
		p.setRun(i, run{left.first, left.count + 1 + right.count, left.new})
		p.dropRun(i + 1)
	case joinsLeft:
		p.setRun(i, run{left.first, left.count + 1, left.new})
	case joinsRight:
		p.setRun(i+1, run{at, right.count + 1, new})
	case p.runs() == maxRuns && p.toTable(narrowTable), p.runs() >= 2*maxRuns && p.toTable(wideTable):
		p.setEntry(at, new+1)
	default:
		p.addRun(i+1, run{at, 1, new})
	}
	return true
}

// delete removes chunk at, or returns false when it isn't there. An empty table is removed; one that becomes sparse
// stays a table, since a merge deletes all entries soon.
func (p *page) delete(at int) bool {
	if p.form() >= narrowTable {
		if p.entry(at) == 0 {
			return false
		}
		p.setEntry(at, 0)
		if !slices.ContainsFunc(p.words, func(w uint64) bool { return w != 0 }) {
			p.words = nil
		}
		return true
	}
	i := p.find(at)
	if i < 0 {
		return false
	}
	r := p.run(i)
	if at >= r.end() {
		return false
	}
	left := run{r.first, at - r.first, r.new}
	right := run{at + 1, r.end() - at - 1, r.new + uint64(left.count) + 1}
	switch {
	case left.count == 0 && right.count == 0:
		p.dropRun(i)
	case right.count == 0:
		p.setRun(i, left)
	case left.count == 0:
		p.setRun(i, right)
	default:
		p.setRun(i, left)
		p.addRun(i+1, right)
	}
	return true
}
