package stack

import (
	"slices"
	"weak"

	"github.com/dmsnap/dmsnap/internal/chunkmap"
)

// Compact does one step to make the index smaller, or returns false when there is none: it merges adjacent segments, or
// takes over what another chain with the same layers has merged. Reads go on meanwhile. A step takes a time and memory in
// proportion to the exceptions in the segments, about 50 ns and 12 bytes each.
//
// Of two chains, one of which has the layers of the other and more, compact the smaller one first: then the other one
// shares what was merged.
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
	if first, n := worthMerging(index); n > 1 {
		c.replace(index, first, n, join(index[first:first+n]))
		return true
	}
	return false
}

// replace replaces n segments of the index from i on by one.
func (c *Chain) replace(index []*segment, i, n int, by *segment) {
	next := slices.Concat(index[:i], []*segment{by}, index[i+n:])
	c.index.Store(&next)
}

const (
	// growth is by how much a segment must be larger than all newer ones together to stay as it is. The larger it is,
	// the fewer segments there are, and the more often each exception is merged.
	growth = 4

	// smallSegment is how many exceptions are always merged: in less than a millisecond.
	smallSegment = 4096
)

// worthMerging returns the oldest segments of the index that should be one, n from first on; n is 0 when there are none.
// What is merged is a segment and all newer ones with chunks of its size.
func worthMerging(index []*segment) (first, n int) {
	for end := len(index); end > 0; end = first {
		first = end - 1
		for first > 0 && index[first-1].layout == index[first].layout {
			first--
		}
		newer := make([]uint64, end-first) // exceptions in newer segments
		for i := 1; i < end-first; i++ {
			newer[i] = newer[i-1] + index[first+i-1].len()
		}
		for i := end - first - 1; i > 0; i-- {
			if k := index[first+i].len(); newer[i] >= k/growth || newer[i]+k <= smallSegment {
				return first, i + 1
			}
		}
	}
	return 0, 0
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

// join returns the merged segment of adjacent ones, and has other chains take it over. Concurrent calls of several chains
// merge once.
func join(segments []*segment) *segment {
	top := segments[0].parts
	l := top[len(top)-1].layer
	l.merging.Lock()
	defer l.merging.Unlock()
	if joined, n := segments[0].takeOver(segments[1:]); n == len(segments)-1 {
		return joined
	}
	joined := merge(segments)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.merged = append(l.merged, weak.Make(joined))
	return joined
}

// merge makes a segment of adjacent ones. Where several have an origin chunk, the newest counts.
func merge(segments []*segment) *segment {
	s := &segment{layout: segments[0].layout, merged: new(chunkmap.Map)}
	bases := make([]uint64, len(segments))
	for i, older := range slices.Backward(segments) {
		bases[i] = s.end
		for _, p := range older.parts {
			p.base += s.end
			s.parts = append(s.parts, p)
		}
		s.end += older.end
	}
	for i, t := range segments {
		s.merged.Underlay(t.runs(bases[i]))
	}
	return s
}
