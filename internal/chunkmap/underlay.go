package chunkmap

import (
	"iter"
	"math"

	"github.com/dmsnap/dmsnap/ondisk"
)

// Underlay adds those exceptions of runs whose origin chunks have none in m. runs ascends, as that of All does. Each
// page is made in its smallest form, without space for more: it is the way to make a map that does not change. It is
// several times as fast as Insert.
func (m *Map) Underlay(runs iter.Seq[Run]) {
	u := underlay{to: m}
	for r := range runs {
		for r.Count > 0 {
			number, at := split(r.Old)
			if number != u.number {
				u.flush()
				u.number = number
			}
			n := min(r.Count, uint64(pageChunks-at))
			u.runs = append(u.runs, run{at, int(n), uint64(r.New)})
			r = Run{r.Old + ondisk.OriginChunk(n), r.New + ondisk.COWChunk(n), r.Count - n}
		}
	}
	u.flush()
}

// An underlay gathers the runs of one page.
type underlay struct {
	to           *Map
	number       uint64
	runs         []run
	above, whole []run // scratch
}

// flush adds what was gathered.
func (u *underlay) flush() {
	if len(u.runs) == 0 {
		return
	}
	h := hash(u.number)
	s := u.to.shardOf(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	u.above = u.above[:0]
	p := s.dir.find(h, u.number)
	if p == nil {
		p = s.dir.add(h, u.number)
		if u.to.order.wanted.Load() {
			u.to.order.add(u.number)
		}
	} else {
		u.above = p.appendTo(u.above)
	}
	u.whole = overlay(u.whole[:0], u.above, u.runs)
	p.fill(u.whole)
	u.to.n.Add(chunks(u.whole) - chunks(u.above))
	u.runs = u.runs[:0]
}

// chunks is the number of chunks in runs.
func chunks(runs []run) (n uint64) {
	for _, r := range runs {
		n += uint64(r.count)
	}
	return n
}

// overlay appends to whole the runs of upper, and what they leave of the runs of lower, in ascending order.
func overlay(whole, upper, lower []run) []run {
	pos := 0 // everything before is done
	for _, l := range lower {
		for pos = max(pos, l.first); pos < l.end(); {
			end := l.end()
			if len(upper) > 0 && upper[0].first <= pos {
				pos = max(pos, upper[0].end())
				whole, upper = appendRun(whole, upper[0]), upper[1:]
				continue
			} else if len(upper) > 0 {
				end = min(end, upper[0].first)
			}
			whole = appendRun(whole, run{pos, end - pos, l.new + uint64(pos-l.first)})
			pos = end
		}
	}
	for _, r := range upper {
		whole = appendRun(whole, r)
	}
	return whole
}

// appendRun appends r to ascending runs, joined with the last one where it continues that on both sides.
func appendRun(runs []run, r run) []run {
	if k := len(runs) - 1; k >= 0 && runs[k].end() == r.first && runs[k].new+uint64(runs[k].count) == r.new {
		runs[k].count += r.count
		return runs
	}
	return append(runs, r)
}

// fill makes the page hold runs, which are ascending and at least one, and nothing else, in its smallest form.
func (p *page) fill(runs []run) {
	largest := uint64(0)
	for _, r := range runs {
		largest = max(largest, r.new+uint64(r.count))
	}
	if largest > 1<<56 {
		panic("chunkmap: COW chunk of more than 56 bits")
	}
	table := narrowTable
	if largest > math.MaxUint32 {
		table = wideTable
	}
	list, k := narrowList, 1
	if largest > 1<<homeBits {
		list, k = wideList, 2
	}
	if table == narrowTable && len(runs) > maxRuns || len(runs) > 2*maxRuns {
		p.become(table, make([]uint64, pageChunks/2*(1+table-narrowTable)))
		for _, r := range runs {
			for j := range r.count {
				p.setEntry(r.first+j, r.new+uint64(j)+1)
			}
		}
		return
	}
	p.become(list, make([]uint64, 0, k*len(runs)))
	for _, r := range runs {
		p.words = append(p.words, pack(r))
		if list == wideList {
			p.words = append(p.words, r.new)
		}
	}
}
