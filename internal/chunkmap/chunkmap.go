// Package chunkmap holds which origin chunk lives in which chunk of the COW device: exceptions by the
// tens of millions, in a few bytes each.
//
// The space of origin chunks is cut into pages of 512. Pages that hold something are found through 64
// hash tables, each with a lock of its own. A page has one of two forms, whichever is smaller:
//
//	runs    [first count new] [first count new] …   12 bytes a run, ascending; consecutive
//	                                                chunks with consecutive homes are one run
//	table   new[0]+1 new[1]+1 … new[511]+1           4 bytes a chunk (8 when a COW chunk needs
//	                                                more than 32 bits); 0: no exception
//
// A store that was filled in order costs a run or two a page, one filled at random 12 bytes an
// exception at worst, and bytes from a hostile disk no more than that, whatever numbers they name.
package chunkmap

import (
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/ondisk"
)

const (
	pageShift  = 9
	pageChunks = 1 << pageShift
	shardBits  = 6
)

// A Map is ready in its zero value. All methods may be called concurrently; a lookup waits at most for
// one change of a page in the same shard.
type Map struct {
	n      atomic.Uint64
	shards [1 << shardBits]shard
}

type shard struct {
	mu    sync.RWMutex
	pages map[uint64]*page // by page number
}

// A Run is Count consecutive origin chunks from Old on, that live in as many from New on.
type Run struct {
	Old   ondisk.OriginChunk
	New   ondisk.COWChunk
	Count uint64
}

// shardOf spreads pages over shards; neighbours go to different ones.
func (m *Map) shardOf(page uint64) *shard {
	return &m.shards[page*0x9E3779B97F4A7C15>>(64-shardBits)]
}

func split(old ondisk.OriginChunk) (page uint64, at int) {
	return uint64(old) >> pageShift, int(old & (pageChunks - 1))
}

// Len is the number of exceptions.
func (m *Map) Len() uint64 { return m.n.Load() }

// Get returns where old lives.
func (m *Map) Get(old ondisk.OriginChunk) (ondisk.COWChunk, bool) {
	number, at := split(old)
	s := m.shardOf(number)
	s.mu.RLock()
	defer s.mu.RUnlock()
	p := s.pages[number]
	if p == nil {
		return 0, false
	}
	new, _, ok := p.run(at)
	return new, ok
}

// Run describes the longest uniform stretch of at most max ≥ 1 origin chunks from old on: either all in
// consecutive COW chunks from new on, or all without an exception. Pages are looked at one after the
// other; a change in between may show in a later one.
func (m *Map) Run(old ondisk.OriginChunk, max uint64) (new ondisk.COWChunk, n uint64, mapped bool) {
	number, at := split(old)
	new, n, mapped = m.runInPage(number, at)
	for uint64(at)+n == pageChunks && n < max { // up to the page's end: it may go on in the next
		number++
		more, k, ok := m.runInPage(number, 0)
		if ok != mapped || mapped && more != new+ondisk.COWChunk(n) || number == 0 {
			break
		}
		n += k
		at -= pageChunks
		if k < pageChunks {
			break
		}
	}
	return new, min(n, max), mapped
}

func (m *Map) runInPage(number uint64, at int) (ondisk.COWChunk, uint64, bool) {
	s := m.shardOf(number)
	s.mu.RLock()
	defer s.mu.RUnlock()
	p := s.pages[number]
	if p == nil {
		return 0, uint64(pageChunks - at), false
	}
	new, n, ok := p.run(at)
	return new, uint64(n), ok
}

// Insert adds e and reports true, or false, with nothing changed, when e.Old has an exception.
func (m *Map) Insert(e ondisk.Exception) bool {
	number, at := split(e.Old)
	s := m.shardOf(number)
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pages[number]
	if p == nil {
		if s.pages == nil {
			s.pages = make(map[uint64]*page)
		}
		p = new(page)
		s.pages[number] = p
	}
	if !p.insert(at, e.New) {
		return false
	}
	m.n.Add(1)
	return true
}

// Delete removes the exception of old and reports whether there was one.
func (m *Map) Delete(old ondisk.OriginChunk) bool {
	number, at := split(old)
	s := m.shardOf(number)
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pages[number]
	if p == nil || !p.delete(at) {
		return false
	}
	if p.empty() {
		delete(s.pages, number)
	}
	m.n.Add(^uint64(0))
	return true
}

// All yields the exceptions in ascending order of Old, joined to runs as long as they go. It copies one
// page at a time: changes meanwhile may or may not show.
func (m *Map) All() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		var last Run
		for _, number := range m.pageNumbers() {
			for _, r := range m.pageRuns(number) {
				if last.Count > 0 && last.Old+ondisk.OriginChunk(last.Count) == r.Old && last.New+ondisk.COWChunk(last.Count) == r.New {
					last.Count += r.Count
					continue
				}
				if last.Count > 0 && !yield(last) {
					return
				}
				last = r
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
		for n := range s.pages {
			numbers = append(numbers, n)
		}
		s.mu.RUnlock()
	}
	slices.Sort(numbers)
	return numbers
}

func (m *Map) pageRuns(number uint64) []Run {
	s := m.shardOf(number)
	s.mu.RLock()
	defer s.mu.RUnlock()
	p := s.pages[number]
	if p == nil {
		return nil
	}
	var runs []Run
	for at := 0; at < pageChunks; {
		new, n, ok := p.run(at)
		if ok {
			runs = append(runs, Run{ondisk.OriginChunk(number<<pageShift) + ondisk.OriginChunk(at), new, uint64(n)})
		}
		at += n
	}
	return runs
}

// Max returns the largest origin chunk with an exception.
func (m *Map) Max() (ondisk.OriginChunk, bool) {
	numbers := m.pageNumbers()
	for i := len(numbers) - 1; i >= 0; i-- {
		if runs := m.pageRuns(numbers[i]); len(runs) > 0 {
			r := runs[len(runs)-1]
			return r.Old + ondisk.OriginChunk(r.Count-1), true
		}
	}
	return 0, false
}
