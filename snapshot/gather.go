package snapshot

import (
	"sync"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/gate"
	"github.com/dmsnap/dmsnap/store"
)

// gathered are the pieces of reads by the device that holds them, so that each device gets all of its pieces at once.
type gathered struct {
	cow, origin gatheredPieces
	readers     []gate.Reader
	missing     []bool // by read: some piece was not done
}

// gatheredPieces are pieces on one device, and which read each is of.
type gatheredPieces struct {
	reads []block.Read
	of    []int
}

var gatheredPool = sync.Pool{New: func() any { return new(gathered) }}

func getGathered() *gathered { return gatheredPool.Get().(*gathered) }

// put gives g back, without the memory that was read to.
func (g *gathered) put() {
	g.cow.clear()
	g.origin.clear()
	clear(g.readers)
	g.readers, g.missing = g.readers[:0], g.missing[:0]
	gatheredPool.Put(g)
}

func (x *gatheredPieces) clear() {
	clear(x.reads)
	x.reads, x.of = x.reads[:0], x.of[:0]
}

func (x *gatheredPieces) add(p []byte, off int64, of int) {
	x.reads = append(x.reads, block.Read{P: p, Off: off})
	x.of = append(x.of, of)
}

// add looks up the pieces of read i, of len(p) > 0 bytes at off.
func (g *gathered) add(st *store.Store, p []byte, off int64, i int) {
	for len(p) > 0 {
		pc := nextPiece(st, off, int64(len(p)))
		if pc.mapped {
			g.cow.add(p[:pc.n], pc.cow, i)
		} else {
			g.origin.add(p[:pc.n], pc.off, i)
		}
		p, off = p[pc.n:], off+pc.n
	}
}

// ReadCached executes those reads whose bytes are in memory, of the COW device and of the origin; see [block.CacheReader].
func (s *Snapshot) ReadCached(reads []block.Read) (done int) {
	s.life.RLock()
	defer s.life.RUnlock()
	if s.usable() != nil {
		return 0
	}
	g := getGathered()
	defer g.put()
	defer func() {
		for _, r := range g.readers {
			r.Leave()
		}
	}()
	for i := range reads {
		g.missing = append(g.missing, !s.gather(g, reads[i], i))
	}
	block.ReadCached(s.cow, g.cow.reads)
	block.ReadCached(s.origin.dev, g.origin.reads)
	for k, r := range g.cow.reads {
		if !r.Done || s.store.CheckData(r.Off, int64(len(r.P))) != nil {
			g.missing[g.cow.of[k]] = true
		}
	}
	for k, r := range g.origin.reads {
		if !r.Done {
			g.missing[g.origin.of[k]] = true
		}
	}
	for i := range reads {
		if !g.missing[i] {
			reads[i].Done = true
			done++
		}
	}
	return done
}

// gather adds the pieces of a read, with a gate reader unless it is in the COW device as a whole. It reports false when the
// read has to be left to ReadAt. life is held.
func (s *Snapshot) gather(g *gathered, r block.Read, i int) bool {
	n := int64(len(r.P))
	if r.Done || n == 0 || block.CheckRange("read", r.Off, n, s.size) != nil {
		return false
	}
	if pc := nextPiece(s.store, r.Off, n); pc.mapped && pc.n == n {
		g.cow.add(r.P, pc.cow, i)
		return true
	}
	reader, err := s.enter(r.Off, n)
	if err != nil {
		return false
	}
	g.readers = append(g.readers, reader)
	g.add(s.store, r.P, r.Off, i)
	return true
}
