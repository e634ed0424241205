package snapshot_test

import (
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/snapshot"
)

// The runs of operations that the crash tests cut and the fault tests fail. Small, so that every moment can
// be looked at: chunks of one sector have 32 exceptions an area, so that areas are crossed at once.

// A scenario is a run of operations in a lab.
type scenario struct {
	name string
	run  func(t *testing.T, l *lab)
	size int // of the origin in sectors
}

func persistent(c uint32) snapshot.Options { return snapshot.Options{ChunkSectors: c} }

func always(c uint32) snapshot.Options {
	return snapshot.Options{ChunkSectors: c, Sync: snapshot.SyncAlways}
}

var scenarios = []scenario{
	{"create and first writes", firstWrites, 32},
	{"always durable", alwaysDurable, 32},
	{"batches over areas", batchesOverAreas, 80},
	{"origin writes", originWrites, 48},
	{"writes on both sides", bothSides, 40},
	{"reloads", reloads, 80},
	{"overflow by the origin", overflowByOrigin, 48},
	{"overflow by the snapshot", overflowBySnapshot, 40},
	{"discards", discards, 32},
	{"grow", growing, 72},
	{"merge by runs", mergeByRuns, 40},
	{"merge over areas", mergeOverAreas, 104},
	{"merge beside others", mergeBesideOthers, 40},
	{"merge across a restart", mergeAcrossRestart, 72},
	{"short last chunk", shortLastChunk, 43},
}

// writeBackScenarios are those whose origin writes are held in memory, as far as they may be. What fails then is
// reported to a later call, so the fault tests leave them out.
var writeBackScenarios = []scenario{
	{"origin writes, written back", writingBack(1<<20, originWrites), 48},
	{"origin writes, written back for want of space only", writingBack(8<<10, originWrites), 48},
	{"writes on both sides, written back", writingBack(1<<20, bothSides), 40},
	{"reloads, written back", writingBack(1<<20, reloads), 80},
	{"overflow by the origin, written back", writingBack(1<<20, overflowByOrigin), 48},
	{"merge beside others, written back", writingBack(1<<20, mergeBesideOthers), 40},
	{"merge across a restart, written back", writingBack(1<<20, mergeAcrossRestart), 72},
	{"short last chunk, written back", writingBack(1<<20, shortLastChunk), 43},
}

// writingBack is a scenario's run with origin writes in memory until something asks for them, or there are limit bytes.
func writingBack(limit int64, run func(*testing.T, *lab)) func(*testing.T, *lab) {
	return func(t *testing.T, l *lab) {
		l.origin = snapshot.NewOrigin(l.faulty, snapshot.WriteBack(limit, time.Hour))
		run(t, l)
	}
}

func firstWrites(t *testing.T, l *lab) {
	for _, c := range []uint32{1, 2, 8} {
		s := l.cow(96, persistent(c))
		s.attach()
		s.write(3, 1)
		s.flush()
		s.write(3, 1) // in place
		s.write(9, 4)
		s.read()
		s.writeAs(20, 2, durable)
		s.write(21, 5)
		s.writeAs(28, 3, zeroed)
		s.flush()
		s.flush()
		s.close()
	}
}

func alwaysDurable(t *testing.T, l *lab) {
	for _, c := range []uint32{1, 8} {
		s := l.cow(96, always(c))
		s.attach()
		s.write(0, 1)
		s.write(5, 9)
		s.writeAs(5, 2, zeroed)
		s.write(30, 2)
		l.write(0, 8)
		l.flush()
		s.read()
		s.close()
	}
}

// batchesOverAreas makes batches that end in the middle of a block, at the end of an area, in the next one,
// and two areas on.
func batchesOverAreas(t *testing.T, l *lab) {
	s := l.cow(140, persistent(1))
	s.attach()
	s.write(0, 30)
	s.flush()
	s.write(30, 2) // fills area 0
	s.flush()
	s.write(32, 1)
	s.flush()
	s.write(40, 40) // over area 1 into area 2
	s.write(33, 5)
	s.flush()
	s.read()
	s.close()
	b := l.cow(96, persistent(1))
	b.attach()
	b.write(0, 70) // three areas in one batch
	b.flush()
	b.close()
}

func originWrites(t *testing.T, l *lab) {
	a, b, c := l.cow(96, persistent(1)), l.cow(96, persistent(2)), l.cow(96, persistent(8))
	a.attach()
	b.attach()
	l.write(5, 1)
	l.write(5, 2)
	l.flush()
	c.attach()
	l.write(4, 9)
	l.writeAs(20, 3, durable)
	l.writeAs(30, 2, zeroed)
	l.flush()
	l.write(10, 36) // over the edge of a's first area
	a.read()
	b.read()
	c.read()
	a.flush()
	l.write(47, 1)
	l.read()
	c.close()
	b.close()
	a.close()
}

func bothSides(t *testing.T, l *lab) {
	a, b := l.cow(80, persistent(1)), l.cow(80, persistent(8))
	a.attach()
	b.attach()
	a.write(4, 3)
	b.write(10, 1)
	l.write(6, 6) // what a wrote is not durable yet
	a.write(5, 1)
	b.write(8, 10)
	l.write(9, 12)
	b.flush()
	a.writeAs(11, 1, durable)
	l.flush()
	a.write(11, 20)
	l.write(0, 40)
	a.read()
	b.read()
	a.flush()
	l.flush()
	a.close()
	b.close()
}

func reloads(t *testing.T, l *lab) {
	s := l.cow(140, persistent(1))
	s.attach()
	for i, n := range []int64{5, 26, 1, 1, 31} { // to areas' edges and over them
		s.write(int64(i)*11, n)
		s.flush()
		s.write(int64(i)*11+2, n/2)
		s.close()
		s.attach()
		l.write(int64(i)*11+3, 3)
	}
	s.read()
	s.close()
}

func overflowByOrigin(t *testing.T, l *lab) {
	small, large := l.cow(20, persistent(1)), l.cow(96, persistent(8))
	small.attach()
	large.attach()
	small.write(0, 4)
	small.flush()
	small.write(2, 6)
	l.write(6, 8)
	l.overflows(20, 10, small)
	l.write(3, 1)
	small.flush()
	large.write(40, 1)
	large.read()
	l.flush()
	l.read()
	small.close()
	large.close()
}

func overflowBySnapshot(t *testing.T, l *lab) {
	invalid := l.cow(14, persistent(1))
	overflow := l.cow(40, snapshot.Options{Store: snapshot.PersistentOverflow, ChunkSectors: 8})
	invalid.attach()
	overflow.attach()
	invalid.write(0, 6)
	invalid.flush()
	invalid.overflow(4, 30)
	overflow.write(3, 1)
	overflow.write(16, 8)
	overflow.flush()
	overflow.overflow(15, 25)
	overflow.flush()
	overflow.read()
	l.write(3, 14) // these have exceptions
	overflow.read()
	l.overflows(32, 1, overflow)
	l.flush()
	invalid.close()
	overflow.close()
}

func discards(t *testing.T, l *lab) {
	o := persistent(2)
	o.DiscardZeroesCOW = true
	s := l.cow(64, o)
	s.attach()
	s.write(0, 12)
	s.flush()
	s.discard(2, 4)
	s.discard(7, 2) // parts of two chunks
	s.discard(11, 9)
	s.read()
	l.write(4, 10)
	s.discard(4, 4)
	s.flush()
	s.write(5, 2)
	s.flush()
	s.read()
	s.close()
}

func growing(t *testing.T, l *lab) {
	s := l.cow(20, snapshot.Options{Store: snapshot.PersistentOverflow, ChunkSectors: 1})
	s.attach()
	s.write(0, 18)
	s.flush()
	s.grow(34)
	s.write(18, 10)
	s.flush()
	s.overflow(30, 10) // the next area has no space, and so the slot before it has none
	s.flush()
	s.close()
	s.grow(96)
	s.attach()
	s.write(30, 30)
	l.write(50, 20)
	s.flush()
	s.read()
	s.close()
}

func mergeByRuns(t *testing.T, l *lab) {
	s := l.cow(64, persistent(2))
	s.attach()
	s.write(6, 1)
	s.write(2, 4)
	s.write(20, 8)
	l.write(10, 3)
	l.flush()
	s.write(30, 1)
	s.beginMerge()
	l.read()
	l.step(0)
	l.write(20, 4) // in the COW device still
	l.write(30, 2) // on the origin
	l.step(0)
	l.writeAs(3, 2, durable)
	l.flush()
	l.write(22, 1)
	l.step(0)
	l.read()
	l.finish(0)
	l.write(4, 1)
	l.closeMerge()
	l.read()
	s.attach() // an empty store, for the next life
	s.write(1, 1)
	l.write(2, 2)
	s.close()
}

func mergeOverAreas(t *testing.T, l *lab) {
	s := l.cow(160, persistent(1))
	s.attach()
	for at := int64(100); at >= 0; at -= 4 { // against the order of the origin
		s.write(at, 3)
	}
	s.flush()
	s.beginMerge()
	l.step(5)
	l.step(14) // back into area 1
	l.write(40, 3)
	l.step(40) // area 1 and back into area 0
	l.write(41, 1)
	l.flush()
	l.finish(9)
	l.closeMerge()
	l.read()
}

func mergeBesideOthers(t *testing.T, l *lab) {
	a, b, m := l.cow(80, persistent(1)), l.cow(96, persistent(8)), l.cow(64, persistent(2))
	a.attach()
	m.attach()
	m.write(0, 6)
	m.write(17, 2)
	l.write(25, 3)
	l.flush()
	b.attach()
	m.write(33, 3)
	m.beginMerge()
	l.write(2, 1)
	l.step(2)
	a.write(16, 2)
	l.write(20, 1)
	a.read()
	b.read()
	l.finish(20)
	l.read()
	l.closeMerge()
	a.read()
	b.read()
	l.write(1, 1)
	a.close()
	b.close()
}

func mergeAcrossRestart(t *testing.T, l *lab) {
	s, other := l.cow(140, persistent(1)), l.cow(140, persistent(8))
	s.attach()
	other.attach()
	s.write(0, 20)
	s.write(40, 30)
	s.beginMerge()
	l.step(10)
	l.write(5, 1)
	l.closeMerge()
	l.resumeMerge()
	l.write(45, 2)
	l.step(10)
	l.step(25)
	l.closeMerge()
	l.resumeMerge()
	other.read()
	l.read()
	l.finish(64)
	l.closeMerge()
	l.resumeMerge()
	l.read()
	other.close()
}

func shortLastChunk(t *testing.T, l *lab) {
	a, m := l.cow(96, persistent(8)), l.cow(96, persistent(8))
	a.attach()
	m.attach()
	l.write(42, 1)
	m.write(41, 2)
	m.write(3, 1)
	m.flush()
	m.beginMerge()
	l.write(40, 1)
	l.step(1)
	l.write(41, 2)
	l.finish(8)
	l.closeMerge()
	a.read()
	a.close()
}
