package stack

import (
	"iter"
	"sort"
	"weak"

	"github.com/dmsnap/dmsnap/internal/chunkmap"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A segment is the index of some layers of a chain that follow each other. It is never changed and is shared by chains.
type segment struct {
	layout ondisk.Layout
	parts  []part // bottom-up
	end    uint64 // virtual chunks are below

	// One of these has the exceptions.
	single *store.Store
	merged *chunkmap.Map
}

// A part is a layer in a segment.
type part struct {
	layer *Layer
	depth int    // layers below it in the chain
	size  int64  // of the chain whose top it is, in bytes: it holds nothing behind
	base  uint64 // its virtual chunks begin there
}

// segment returns the segment of the layer alone, with depth layers below it.
func (l *Layer) segment(depth int, size int64) *segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := part{l, depth, size, 0}
	s, st := l.own.Value(), l.store.Load()
	if s != nil && s.parts[0] == own {
		return s
	}
	if s != nil {
		st = s.single
	}
	if st == nil {
		panic("stack: the layer is durable and in no chain any more")
	}
	s = &segment{layout: l.layout, parts: []part{own}, end: l.used, single: st}
	l.own = weak.Make(s)
	return s
}

// top is the depth of its uppermost layer.
func (s *segment) top() int { return s.parts[len(s.parts)-1].depth }

// len is the number of exceptions.
func (s *segment) len() uint64 {
	if s.single != nil {
		return s.single.Len()
	}
	return s.merged.Len()
}

// run is chunkmap.Map.Run of virtual chunks.
func (s *segment) run(old ondisk.OriginChunk, limit uint64) (virtual ondisk.COWChunk, n uint64, mapped bool) {
	if s.single != nil {
		return s.single.LookupRun(old, limit)
	}
	return s.merged.Run(old, limit)
}

// runs yields the exceptions in ascending order, in virtual chunks to which base is added.
func (s *segment) runs(base uint64) iter.Seq[chunkmap.Run] {
	return func(yield func(chunkmap.Run) bool) {
		if s.merged != nil {
			for r := range s.merged.All() {
				r.New += ondisk.COWChunk(base)
				if !yield(r) {
					return
				}
			}
			return
		}
		for r := range s.single.Exceptions() {
			r.New += ondisk.COWChunk(base)
			if !yield(chunkmap.Run(r)) {
				return
			}
		}
	}
}

// find returns the part that holds the byte at off, at which byte of its device, and how many of the n ≥ 1 bytes from off
// on follow there; or nil, and of how many bytes the segment has nothing.
func (s *segment) find(off, n int64) (p *part, at, follow int64) {
	l := s.layout
	first, last := l.OriginChunkAt(off), l.OriginChunkAt(off+n-1)
	virtual, count, mapped := s.run(first, uint64(last-first)+1)
	start, end := l.OriginRange(first, count, off+n)
	if !mapped {
		return nil, 0, end - off
	}
	// A run is in one layer: between the data chunks of two layers lies the upper one's header.
	p = &s.parts[0]
	if len(s.parts) > 1 {
		p = &s.parts[sort.Search(len(s.parts), func(i int) bool { return s.parts[i].base > uint64(virtual) })-1]
	}
	return p, l.COWOffset(virtual-ondisk.COWChunk(p.base)) + off - start, end - off
}
