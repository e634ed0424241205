package chunkmap

import (
	"math"
	"slices"
	"sort"

	"github.com/dmsnap/dmsnap/ondisk"
)

// A page is 512 consecutive origin chunks. At most one of its three forms is in use.
type page struct {
	runs   []pageRun
	narrow *[pageChunks]uint32
	wide   *[pageChunks]uint64
}

// pageRun is count chunks from first on, in as many COW chunks from low|high<<32 on.
type pageRun struct {
	low, high    uint32
	first, count uint16
}

func newRun(first int, count int, new ondisk.COWChunk) pageRun {
	return pageRun{uint32(new), uint32(new >> 32), uint16(first), uint16(count)}
}

func (r pageRun) new() ondisk.COWChunk { return ondisk.COWChunk(r.low) | ondisk.COWChunk(r.high)<<32 }
func (r pageRun) end() int             { return int(r.first) + int(r.count) }

// maxRuns is where a table is smaller than runs.
const maxRuns = pageChunks * 4 / 12

func (p *page) empty() bool { return len(p.runs) == 0 && p.narrow == nil && p.wide == nil }

// at returns a table's entry: the COW chunk plus one, because a transient store uses chunk 0; or 0.
func (p *page) at(i int) uint64 {
	if p.narrow != nil {
		return uint64(p.narrow[i])
	}
	return p.wide[i]
}

// find returns the index of the first run that ends after at.
func (p *page) find(at int) int {
	return sort.Search(len(p.runs), func(i int) bool { return p.runs[i].end() > at })
}

// run describes the uniform stretch from chunk at on, within the page.
func (p *page) run(at int) (new ondisk.COWChunk, n int, mapped bool) {
	if p.narrow != nil || p.wide != nil {
		return p.tableRun(at)
	}
	i := p.find(at)
	if i == len(p.runs) {
		return 0, pageChunks - at, false
	}
	r := p.runs[i]
	if in := at - int(r.first); in >= 0 {
		return r.new() + ondisk.COWChunk(in), r.end() - at, true
	}
	return 0, int(r.first) - at, false
}

func (p *page) tableRun(at int) (new ondisk.COWChunk, n int, mapped bool) {
	entry := p.at(at)
	for n = 1; at+n < pageChunks; n++ {
		next := p.at(at + n)
		if entry == 0 && next != 0 || entry != 0 && next != entry+uint64(n) {
			break
		}
	}
	if entry == 0 {
		return 0, n, false
	}
	return ondisk.COWChunk(entry - 1), n, true
}

// insert adds chunk at, false when it is there.
func (p *page) insert(at int, new ondisk.COWChunk) bool {
	if p.narrow != nil || p.wide != nil {
		if p.at(at) != 0 {
			return false
		}
		p.set(at, uint64(new)+1)
		return true
	}
	i := p.find(at)
	if i < len(p.runs) && int(p.runs[i].first) <= at {
		return false
	}
	joinsLeft := i > 0 && p.runs[i-1].end() == at && p.runs[i-1].new()+ondisk.COWChunk(p.runs[i-1].count) == new
	joinsRight := i < len(p.runs) && int(p.runs[i].first) == at+1 && p.runs[i].new() == new+1
	switch {
	case joinsLeft && joinsRight:
		p.runs[i-1].count += 1 + p.runs[i].count
		p.runs = slices.Delete(p.runs, i, i+1)
	case joinsLeft:
		p.runs[i-1].count++
	case joinsRight:
		p.runs[i] = newRun(at, int(p.runs[i].count)+1, new)
	case len(p.runs) >= maxRuns:
		p.toTable()
		p.set(at, uint64(new)+1)
	default:
		p.grow()
		p.runs = slices.Insert(p.runs, i, newRun(at, 1, new))
	}
	return true
}

// grow makes room for one more run, a quarter at a time: append would double.
func (p *page) grow() {
	if len(p.runs) < cap(p.runs) {
		return
	}
	runs := make([]pageRun, len(p.runs), len(p.runs)+1+len(p.runs)/4)
	copy(runs, p.runs)
	p.runs = runs
}

// set writes a table's entry, and makes the table wide when it must.
func (p *page) set(at int, entry uint64) {
	if p.narrow != nil && entry > math.MaxUint32 {
		p.wide = new([pageChunks]uint64)
		for i, n := range p.narrow {
			p.wide[i] = uint64(n)
		}
		p.narrow = nil
	}
	if p.narrow != nil {
		p.narrow[at] = uint32(entry)
	} else {
		p.wide[at] = entry
	}
}

// toTable changes the form from runs to a table.
func (p *page) toTable() {
	p.narrow = new([pageChunks]uint32)
	for _, r := range p.runs {
		for i := range int(r.count) {
			p.set(int(r.first)+i, uint64(r.new())+uint64(i)+1)
		}
	}
	p.runs = nil
}

// delete removes chunk at, false when it isn't there. A table that empties is given up; one that
// becomes sparse stays a table, as deleting is the way to a page's end.
func (p *page) delete(at int) bool {
	if p.narrow != nil || p.wide != nil {
		if p.at(at) == 0 {
			return false
		}
		p.set(at, 0)
		if _, n, mapped := p.tableRun(0); !mapped && n == pageChunks {
			*p = page{}
		}
		return true
	}
	i := p.find(at)
	if i == len(p.runs) || int(p.runs[i].first) > at {
		return false
	}
	r := p.runs[i]
	left, right := at-int(r.first), r.end()-at-1
	switch {
	case left == 0 && right == 0:
		p.runs = slices.Delete(p.runs, i, i+1)
	case right == 0:
		p.runs[i].count--
	case left == 0:
		p.runs[i] = newRun(at+1, right, r.new()+1)
	default:
		p.runs[i].count = uint16(left)
		p.grow()
		p.runs = slices.Insert(p.runs, i+1, newRun(at+1, right, r.new()+ondisk.COWChunk(left+1)))
	}
	return true
}
