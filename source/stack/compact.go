package stack

import (
	"slices"
	"weak"

	"github.com/dmsnap/dmsnap/internal/chunkmap"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Compact does one step to make the index smaller, or returns false when there is none: it merges two adjacent segments of
// like size, or takes over what another chain with the same layers has merged. Reads go on meanwhile. A step takes a time
// and memory in proportion to the exceptions in the two segments.
func (c *Chain) Compact() bool {
	c.compacting.Lock()
	defer c.compacting.Unlock()
	index := *c.index.Load()
	for i, s := range index {
		if joined, n := s.takeOver(index[i+1:]); joined != nil {
			c.replace(index, i, n+1, joined)
			return true
		}
	}
	// The oldest ones first: then what is merged of lower layers does not depend on what is above them, and is the same
	// in all chains that have them.
	for i := len(index) - 2; i >= 0; i-- {
		if newer, older := index[i], index[i+1]; newer.like(older) {
			c.replace(index, i, 2, newer.join(older))
			return true
		}
	}
	return false
}

// replace replaces n segments of the index from i on by one.
func (c *Chain) replace(index []*segment, i, n int, by *segment) {
	next := slices.Concat(index[:i], []*segment{by}, index[i+n:])
	c.index.Store(&next)
}

// like reports whether s is worth merging with an older segment: it has at least half as many exceptions.
func (s *segment) like(older *segment) bool {
	return s.layout == older.layout && s.len() >= older.len()/2
}

// takeOver returns the largest segment in use that has the layers of s and of n ≥ 1 segments beneath it, or nil.
func (s *segment) takeOver(beneath []*segment) (found *segment, n int) {
	l := s.parts[len(s.parts)-1].layer
	l.mu.Lock()
	defer l.mu.Unlock()
	l.merged = slices.DeleteFunc(l.merged, func(p weak.Pointer[segment]) bool { return p.Value() == nil })
	for _, p := range l.merged {
		if joined := p.Value(); joined != nil {
			if k := joined.covers(s, beneath); k > n {
				found, n = joined, k
			}
		}
	}
	return found, n
}

// covers returns how many segments beneath s make up j together with s; 0: none do.
func (j *segment) covers(s *segment, beneath []*segment) (n int) {
	left, ok := cutParts(j.parts, s.parts)
	for n = 0; ok && len(left) > 0 && n < len(beneath); n++ {
		left, ok = cutParts(left, beneath[n].parts)
	}
	if !ok || len(left) > 0 {
		return 0
	}
	return n
}

// cutParts returns all without the upper ones, if those are its uppermost.
func cutParts(all, upper []part) (left []part, ok bool) {
	n := len(all) - len(upper)
	ok = n >= 0 && slices.EqualFunc(all[n:], upper, func(a, b part) bool {
		return a.layer == b.layer && a.depth == b.depth && a.size == b.size
	})
	if !ok {
		return nil, false
	}
	return all[:n], true
}

// join returns the merged segment of s and the one beneath it, and has other chains take it over. Concurrent calls of
// several chains merge once.
func (s *segment) join(older *segment) *segment {
	l := s.parts[len(s.parts)-1].layer
	l.merging.Lock()
	defer l.merging.Unlock()
	if joined, _ := s.takeOver([]*segment{older}); joined != nil {
		return joined
	}
	joined := merge(s, older)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.merged = append(l.merged, weak.Make(joined))
	return joined
}

// insertAtOnce is the number of exceptions that are sorted at once, 1 MiB of them.
const insertAtOnce = 1 << 16

// merge makes a segment of two.
func merge(newer, older *segment) *segment {
	s := &segment{layout: older.layout, parts: slices.Clone(older.parts), merged: new(chunkmap.Map)}
	for _, p := range newer.parts {
		p.base += older.end
		s.parts = append(s.parts, p)
	}
	s.end = older.end + newer.end
	batch := make([]ondisk.Exception, 0, min(insertAtOnce, newer.len()+older.len()))
	flush := func() {
		if n := s.merged.InsertAll(batch); n < len(batch) {
			panic("stack: a segment has an origin chunk twice")
		}
		batch = batch[:0]
	}
	add := func(old ondisk.OriginChunk, virtual ondisk.COWChunk, n uint64) {
		for i := range n {
			if batch = append(batch, ondisk.Exception{Old: old + ondisk.OriginChunk(i), New: virtual + ondisk.COWChunk(i)}); len(batch) == cap(batch) {
				flush()
			}
		}
	}
	for r := range newer.runs() {
		add(r.Old, r.New+ondisk.COWChunk(older.end), r.Count)
	}
	for r := range older.runs() {
		for i := uint64(0); i < r.Count; {
			_, n, replaced := newer.run(r.Old+ondisk.OriginChunk(i), r.Count-i)
			if !replaced {
				add(r.Old+ondisk.OriginChunk(i), r.New+ondisk.COWChunk(i), n)
			}
			i += n
		}
	}
	flush()
	return s
}
