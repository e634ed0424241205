package check

import (
	"encoding/binary"
	"iter"
	"math/bits"

	"github.com/dmsnap/dmsnap/internal/chunkmap"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A set holds chunk numbers of one side. It is made for tens of millions of them, at some nanoseconds each, and for any
// content of a disk, in bounded memory.
//
// Numbers below 2^31, which is every chunk of 4 KiB on a device of 8 TiB, are bits; the bits come in
// segments of 64 KiB that are made when they are needed, so that they take 256 MiB at most. Larger ones
// go to a chunkmap, which is slower, and takes a hundred bytes for a number at the very worst.
type set struct {
	segments []*segment
	large    chunkmap.Map
}

const (
	segmentBits = 19 // a segment holds 2^19 numbers
	flatBits    = 31
)

type segment [1 << segmentBits / 64]uint64

// add puts number in the set, or returns false when it is there.
func (s *set) add(number uint64) bool {
	at := number >> segmentBits
	if at >= uint64(len(s.segments)) || s.segments[at] == nil {
		if number >= 1<<flatBits {
			return s.addLarge(number)
		}
		s.makeSegment(at)
	}
	word, bit := &s.segments[at][number>>6%(1<<segmentBits/64)], uint64(1)<<(number&63)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}

// fetch reads the words in which add will look for the origin chunks of slots b, and discards them. They are scattered
// over memory, with a latency of a few hundred nanoseconds each; a loop as short as this has many such reads in flight
// at once, which the long loop that checks slots has not. BenchmarkRun/scattered with 2 Mi exceptions: 2.5 to 3.2 million a
// second of processor time with it, 1.7 to 2.1 without (docs/benchmarks.md).
func (s *set) fetch(b []byte) (sum uint64) {
	for ; len(b) >= ondisk.SlotSize; b = b[ondisk.SlotSize:] {
		number := binary.LittleEndian.Uint64(b)
		if at := number >> segmentBits; at < uint64(len(s.segments)) && s.segments[at] != nil {
			sum += s.segments[at][number>>6%(1<<segmentBits/64)]
		}
	}
	return sum
}

func (s *set) addLarge(number uint64) bool {
	// The same number on both sides makes consecutive ones a single run.
	return s.large.Insert(ondisk.Exception{Old: ondisk.OriginChunk(number), New: ondisk.COWChunk(number % (1 << 55))})
}

func (s *set) makeSegment(at uint64) {
	if grow := int(at) + 1 - len(s.segments); grow > 0 {
		s.segments = append(s.segments, make([]*segment, grow)...)
	}
	s.segments[at] = new(segment)
}

// range is count consecutive numbers from first on.
type stretch struct{ first, count uint64 }

// all yields the numbers, ascending, as ranges, which may be adjacent.
func (s *set) all() iter.Seq[stretch] {
	return func(yield func(stretch) bool) {
		for at, seg := range s.segments {
			if seg != nil && !seg.all(uint64(at)<<segmentBits, yield) {
				return
			}
		}
		for r := range s.large.All() {
			if !yield(stretch{uint64(r.Old), r.Count}) {
				return
			}
		}
	}
}

// all yields the ranges of a segment whose first number is base.
func (g *segment) all(base uint64, yield func(stretch) bool) bool {
	run := stretch{}
	for i, word := range g {
		first := base + uint64(i)*64
		if word == ^uint64(0) && run.count > 0 && run.first+run.count == first {
			run.count += 64
			continue
		}
		for word != 0 {
			from := uint64(bits.TrailingZeros64(word))
			n := uint64(bits.TrailingZeros64(^(word >> from)))
			word &^= (1<<n - 1) << from
			if run.count > 0 && run.first+run.count == first+from {
				run.count += n
				continue
			}
			if run.count > 0 && !yield(run) {
				return false
			}
			run = stretch{first + from, n}
		}
	}
	return run.count == 0 || yield(run)
}
