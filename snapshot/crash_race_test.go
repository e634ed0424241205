package snapshot_test

import (
	"runtime"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
)

// Scenarios in which two things happen at once: one operation is held on its disk while others go past it,
// or must not. The fault tests leave them out: which of two calls a fault hits is not theirs to say.
var races = []scenario{
	{"writes while a step flushes", writesDuringStep, 40},
	{"origin write while a batch is written", originWriteDuringSync, 32},
	{"origin writes while a chunk is copied", originWritesDuringCopy, 32},
	{"flush of a snapshot while a chunk is copied", flushDuringCopy, 32},
}

// meanwhile starts something that may have to wait for what is being held, and gives it time to do wrong.
// (A fault may be missed by that, none is seen that is not there.)
func meanwhile(do func()) (wait func()) {
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	for range 2000 {
		runtime.Gosched()
	}
	return func() { <-done }
}

func isFlush(op blocktest.Op) bool { return op.Kind == blocktest.Flush }

func writesDuringStep(t *testing.T, l *lab) {
	s, other := l.cow(64, persistent(2)), l.cow(80, persistent(8))
	s.attach()
	other.attach()
	s.write(4, 6)
	s.write(20, 8)
	s.beginMerge()
	for range 3 {
		hold := l.faulty.Hold(isFlush)
		stepped := held(hold, func() { l.step(2) })
		l.read()
		other.read()
		l.write(35, 2) // a chunk of no snapshot
		l.write(4, 1)  // in the COW device, not in the window
		back := meanwhile(func() {
			l.write(24, 4)
			l.write(20, 2)
		})
		hold.Release()
		stepped()
		back()
		l.read()
	}
	l.flush()
	l.finish(1)
	l.read()
	l.closeMerge()
	other.read()
	other.close()
}

func originWriteDuringSync(t *testing.T, l *lab) {
	for _, c := range []uint32{1, 8} {
		s := l.cow(96, persistent(c))
		s.attach()
		for _, at := range []int64{4, 18} {
			s.write(at, 3)
			hold := s.faulty.Hold(isFlush) // of the data
			flushed := held(hold, s.flush)
			past := meanwhile(func() { l.write(at+1, 1) }) // its exception is there, and not durable
			hold.Release()
			flushed()
			past()
			l.write(at, 8)
		}
		s.read()
		l.flush()
		s.close()
	}
}

func originWritesDuringCopy(t *testing.T, l *lab) {
	s, small := l.cow(96, persistent(8)), l.cow(96, persistent(1))
	s.attach()
	small.attach()
	hold := s.faulty.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Write })
	first := held(hold, func() { l.write(3, 2) })
	s.read() // does not wait
	second := meanwhile(func() { l.write(6, 1) })
	third := meanwhile(func() { l.write(17, 1) }) // another chunk
	hold.Release()
	first()
	second()
	third()
	s.read()
	small.read()
	l.flush()
	s.close()
	small.close()
}

func flushDuringCopy(t *testing.T, l *lab) {
	s := l.cow(96, persistent(8))
	s.attach()
	hold := s.faulty.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Write })
	copied := held(hold, func() { l.write(3, 2) })
	s.write(20, 1)
	flushed := meanwhile(s.flush) // its exception comes after the one that is being made
	hold.Release()
	copied()
	flushed()
	s.write(21, 1)
	s.writeAs(9, 1, durable)
	s.read()
	l.flush()
	s.close()
}
