package chunkmap

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/ondisk"
)

// InsertAll inserts the exceptions and returns how many: all, or those before the first whose Old has one already, be
// it from before or by an earlier one of es. In the second case it may have inserted later ones too, never in the place
// of an earlier one: a store with an origin chunk twice is detected, and its Map is discarded.
//
// It is the way to load a store. Scattered exceptions go in several times as fast as by Insert when they
// come in large parts; a million of them are 16 MiB here and as much again for sorting. Lookups may wait
// a millisecond for it.
func (m *Map) InsertAll(es []ondisk.Exception) int {
	sorted, _ := scratch.Get().(*[]ondisk.Exception)
	if sorted == nil {
		sorted = new([]ondisk.Exception)
	}
	defer scratch.Put(sorted)
	*sorted = slices.Grow((*sorted)[:0], len(es))[:len(es)]
	start := sortByPart(*sorted, es)

	var next, inserted atomic.Int64
	var mu sync.Mutex
	refused := len(es)
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 1+len(es)/perWorker) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < shards; i = next.Add(1) - 1 {
				for part := int(i) * partsPerShard; part < int(i+1)*partsPerShard; part++ {
					of := (*sorted)[start[part]:start[part+1]]
					n := m.insertPart(&m.shards[i], of)
					inserted.Add(int64(n))
					if n < len(of) {
						mu.Lock()
						refused = min(refused, nthOf(es, part, n))
						mu.Unlock()
					}
				}
			}
		})
	}
	workers.Wait()
	m.n.Add(uint64(inserted.Load()))
	return refused
}

const (
	// partsPerShard is into how many parts InsertAll sorts a shard's exceptions, so that the pages of a
	// part stay in a processor's own cache: where a million exceptions go to as many pages as the largest
	// maps have, a part's are a few hundred KiB. So a page comes from memory, 300 ns away, once for
	// all of its exceptions.
	partBits      = 3
	partsPerShard = 1 << partBits
	parts         = shards * partsPerShard

	perWorker = 16384 // exceptions that are worth another goroutine
)

var scratch sync.Pool // of *[]ondisk.Exception

// partOf returns the part that old is sorted into: by shard, then by the place of its page in the directory.
func partOf(old ondisk.OriginChunk) int {
	number, _ := split(old)
	h := hash(number)
	return int(h%shards*partsPerShard + h>>(64-partBits))
}

// sortByPart copies es to sorted, part after part, each in the order of es, and returns where they start.
func sortByPart(sorted, es []ondisk.Exception) (start [parts + 1]int) {
	for _, e := range es {
		start[partOf(e.Old)+1]++
	}
	for i := range parts {
		start[i+1] += start[i]
	}
	end := start
	for _, e := range es {
		part := partOf(e.Old)
		sorted[end[part]] = e
		end[part]++
	}
	return start
}

// nthOf returns the index in es of the n-th exception of a part, from 0.
func nthOf(es []ondisk.Exception, part, n int) int {
	return slices.IndexFunc(es, func(e ondisk.Exception) bool {
		if partOf(e.Old) == part {
			n--
		}
		return n < 0
	})
}

// insertPart adds exceptions of shard s up to the first that is there, and returns how many.
func (m *Map) insertPart(s *shard, es []ondisk.Exception) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range es {
		number, at := split(e.Old)
		if !m.insert(s, hash(number), number, at, e.New) {
			return i
		}
	}
	return len(es)
}
