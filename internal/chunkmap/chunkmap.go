// Package chunkmap maps origin chunks to chunks of the COW device: tens of millions of exceptions, in a few bytes each.
//
// The origin is cut into pages of 1024 chunks. A page that holds something is found by its number in
// one of 64 hash tables, each with a lock of its own:
//
//	         number of the page, hashed
//	                   |
//	shard 0  shard 1  …|…  shard 63
//	                   v
//	directory   [number form words] [free] [number form words] …      32 bytes a slot
//	                          |
//	                          v
//	list        [first count new] [first count new] …                 8 bytes a run
//	table       new[0]+1 new[1]+1 … new[1023]+1                       4 bytes a chunk
//
// A list has the runs of the page, ascending: consecutive chunks with consecutive homes are one run. When
// a list has a third as many runs as the page has chunks, it becomes a table, in which 0 means no
// exception. Both have a wide variant, of twice the size, for homes with large numbers: a run from 2^44
// on, a table's chunk from 2^32-1 on.
//
// So an exception costs about 10 bytes when they are scattered (12 at the point where a list becomes a table, 4 in a
// full table), a tenth of a byte when they are in order, and about 90 where each has a page of its own: no more,
// whatever numbers are on a hostile disk. The hash is seeded, so that such a disk can't choose pages that collide
// either.
package chunkmap

import (
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/ondisk"
)

const (
	shards     = 64
	longestRun = 64 // pages that Run looks at behind the first
)

// A Map is ready in its zero value. All methods may be called concurrently. They lock one page's shard
// at a time: a lookup waits at most for one insertion or deletion in the same shard, and shows every one
// that returned before.
type Map struct {
	n      atomic.Uint64
	_      [56]byte // n changes often, the shards' words are read often
	shards [shards]shard
	order  order
}

// A shard has a cache line to itself, so that lookups on different processors don't slow each other.
type shard struct {
	mu  sync.RWMutex
	dir directory
	_   [8]byte
}

// A Run is Count consecutive origin chunks from Old on, stored in as many COW chunks from New on.
type Run struct {
	Old   ondisk.OriginChunk
	New   ondisk.COWChunk
	Count uint64
}

func split(old ondisk.OriginChunk) (number uint64, at int) {
	return uint64(old) >> pageShift, int(old & (pageChunks - 1))
}

func (m *Map) shardOf(hash uint64) *shard { return &m.shards[hash%shards] }

// Len is the number of exceptions.
func (m *Map) Len() uint64 { return m.n.Load() }

// Get returns the COW chunk of old.
func (m *Map) Get(old ondisk.OriginChunk) (ondisk.COWChunk, bool) {
	number, at := split(old)
	h := hash(number)
	s := m.shardOf(h)
	s.mu.RLock()
	var new uint64
	ok := false
	if p := s.dir.find(h, number); p != nil {
		new, ok = p.get(at)
	}
	s.mu.RUnlock()
	return ondisk.COWChunk(new), ok
}

// Insert adds e and reports true, or false, with nothing changed, when e.Old has an exception. e.New is
// below 2^56, the most that the format can name.
func (m *Map) Insert(e ondisk.Exception) bool {
	number, at := split(e.Old)
	h := hash(number)
	s := m.shardOf(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !m.insert(s, h, number, at, e.New) {
		return false
	}
	m.n.Add(1)
	return true
}

// insert adds chunk at of a page to shard s, whose lock is held, or returns false when it is there.
func (m *Map) insert(s *shard, h, number uint64, at int, new ondisk.COWChunk) bool {
	pages := s.dir.used
	if !s.dir.insert(h, number, at, new) {
		return false
	}
	if s.dir.used > pages && m.order.wanted.Load() {
		m.order.add(number)
	}
	return true
}

// Delete removes the exception of old and reports whether there was one.
func (m *Map) Delete(old ondisk.OriginChunk) bool {
	number, at := split(old)
	h := hash(number)
	s := m.shardOf(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.dir.find(h, number)
	if p == nil || !p.delete(at) {
		return false
	}
	if len(p.words) == 0 {
		s.dir.remove(p)
	}
	m.n.Add(^uint64(0))
	return true
}

// Run describes the longest uniform range of at most max ≥ 1 origin chunks from old on: either all in consecutive COW
// chunks from new on, or all without an exception. It ends at the largest number there is. Pages are looked at one
// after the other; a change meanwhile may show in a later one. A range with exceptions is cut after 64 pages, so that a
// caller who uses it in small parts does not measure it to its end each time.
func (m *Map) Run(old ondisk.OriginChunk, max uint64) (new ondisk.COWChunk, n uint64, mapped bool) {
	if max == 0 {
		panic("chunkmap: a run of no chunks")
	}
	max = min(max-1, uint64(lastChunk-old)) + 1
	number, at := split(old)
	start, n, mapped := m.runInPage(number, at, max)
	if n < max && at+int(n) == pageChunks { // up to the page's end: it may go on
		last, _ := split(old + ondisk.OriginChunk(max-1))
		if mapped {
			n += m.continued(number+1, min(last, number+longestRun), start+n)
		} else {
			next := m.nextPage(number+1, last)
			n += (next - number - 1) << pageShift
			if next <= last {
				if _, k, mapped := m.runInPage(next, 0, max-n); !mapped {
					n += k
				}
			}
		}
	}
	return ondisk.COWChunk(start), min(n, max), mapped
}

// runInPage describes the uniform range from chunk at of a page on. It is not measured past max chunks.
func (m *Map) runInPage(number uint64, at int, max uint64) (new, n uint64, mapped bool) {
	h := hash(number)
	s := m.shardOf(h)
	s.mu.RLock()
	defer s.mu.RUnlock()
	p := s.dir.find(h, number)
	if p == nil {
		return 0, uint64(pageChunks - at), false
	}
	new, k, mapped := p.uniform(at, int(min(max, pageChunks)))
	return new, uint64(k), mapped
}

// continued returns how many chunks from the start of page number on are in consecutive COW chunks from
// new on, looking no further than page last.
func (m *Map) continued(number, last, new uint64) (n uint64) {
	for ; number <= last; number++ {
		start, k, mapped := m.runInPage(number, 0, pageChunks)
		if !mapped || start != new+n {
			break
		}
		n += k
		if k < pageChunks {
			break
		}
	}
	return n
}

// All yields the exceptions in ascending order of Old, joined to runs as long as possible. No lock is held while it
// yields: it copies one page at a time, so a page is consistent, and changes meanwhile may or may not show.
func (m *Map) All() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		var last Run
		var runs []run
		for _, number := range m.pageNumbers() {
			runs = m.pageRuns(runs[:0], number)
			first := ondisk.OriginChunk(number << pageShift)
			for _, r := range runs {
				old, new := first+ondisk.OriginChunk(r.first), ondisk.COWChunk(r.new)
				if last.Count > 0 && last.Old+ondisk.OriginChunk(last.Count) == old && last.New+ondisk.COWChunk(last.Count) == new {
					last.Count += uint64(r.count)
					continue
				}
				if last.Count > 0 && !yield(last) {
					return
				}
				last = Run{old, new, uint64(r.count)}
			}
		}
		if last.Count > 0 {
			yield(last)
		}
	}
}

func (m *Map) pageNumbers() []uint64 {
	var numbers []uint64
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.RLock()
		numbers = slices.AppendSeq(numbers, s.dir.numbers)
		s.mu.RUnlock()
	}
	slices.Sort(numbers)
	return numbers
}

// pageRuns appends the runs of a page to runs.
func (m *Map) pageRuns(runs []run, number uint64) []run {
	h := hash(number)
	s := m.shardOf(h)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if p := s.dir.find(h, number); p != nil {
		runs = p.appendTo(runs)
	}
	return runs
}

// Max returns the largest origin chunk with an exception.
func (m *Map) Max() (ondisk.OriginChunk, bool) {
	for {
		largest, any := uint64(0), false
		for i := range m.shards {
			s := &m.shards[i]
			s.mu.RLock()
			for n := range s.dir.numbers {
				largest, any = max(largest, n), true
			}
			s.mu.RUnlock()
		}
		if !any {
			return 0, false
		}
		// Empty when its last exception was deleted meanwhile: then look again.
		if runs := m.pageRuns(nil, largest); len(runs) > 0 {
			return ondisk.OriginChunk(largest<<pageShift) + ondisk.OriginChunk(runs[len(runs)-1].end()-1), true
		}
	}
}
