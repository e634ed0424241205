// Package inline helps to execute requests on the goroutine that receives them. To hand a request to another goroutine
// means to wake one, mostly on another processor, which costs more than a request that takes microseconds.
//
// Which requests are quick is measured: a Trial counts those of one kind. Since any request can block, on a disk or because
// a snapshot is full, a Watchdog runs meanwhile: when a request is overdue, another goroutine receives the next ones.
package inline

import (
	"sync/atomic"
	"time"
)

const (
	// QuickTime is what a quick request takes at most.
	QuickTime = 200 * time.Microsecond
	// Overdue is how long a request executed inline may take before the watchdog calls.
	Overdue = 2 * time.Millisecond
	// TrialLength is how many requests in a row have to be quick.
	TrialLength = 64
)

// A Trial counts the quick requests of a kind in a row, up to TrialLength. Its zero value is ready, and its methods may be called
// concurrently.
type Trial struct{ quick atomic.Int32 }

// Passed reports whether the last TrialLength requests were quick.
func (t *Trial) Passed() bool { return t.quick.Load() >= TrialLength }

// Took records how long a request took.
//
// Two goroutines that record at the same time may lose one of two quick requests, or of a slow and a quick one the slow
// one; neither matters.
func (t *Trial) Took(d time.Duration) {
	switch v := t.quick.Load(); {
	case d > QuickTime:
		t.quick.Store(0)
	case v < TrialLength:
		t.quick.Store(v + 1)
	}
}

// A Watchdog calls a function when a request that is executed inline is overdue. One request at a time is watched.
type Watchdog struct {
	overdue func()

	// mark is odd while a request is executed inline. Both Disarm and the watchdog, when the request is overdue, make it even
	// by compare and swap: the one that succeeds receives the next requests.
	mark    atomic.Uint64
	watched atomic.Bool // the timer runs
	timer   *time.Timer
	seen    uint64 // mark at the last run of the watchdog; only the watchdog uses it
}

// NewWatchdog returns a watchdog that calls overdue, in a goroutine of its own, for each overdue request.
func NewWatchdog(overdue func()) *Watchdog {
	w := &Watchdog{overdue: overdue}
	w.timer = time.AfterFunc(time.Hour, w.run)
	w.timer.Stop() // until a request is executed inline
	return w
}

// Arm begins to watch a request, until Disarm with the mark that it returns.
func (w *Watchdog) Arm() (mark uint64) {
	mark = w.mark.Add(1)
	if !w.watched.Load() {
		w.start()
	}
	return mark
}

// Disarm reports false when overdue was called for the request, or will be at once.
func (w *Watchdog) Disarm(mark uint64) bool { return w.mark.CompareAndSwap(mark, mark+1) }

func (w *Watchdog) start() {
	if w.watched.CompareAndSwap(false, true) {
		w.timer.Reset(Overdue)
	}
}

// run checks whether the same request is executed inline as at its last run. It runs every Overdue, and stops when
// nothing was executed inline since: what is idle costs nothing.
//
// The races considered: a request that arms the watchdog while it decides to stop either finds watched false, and starts
// it again, or has changed mark before the watchdog checks a second time. And a request that is disarmed while it is found
// overdue: one of the two swaps fails.
func (w *Watchdog) run() {
	mark := w.mark.Load()
	switch {
	case mark != w.seen:
		w.seen = mark
	case mark%2 == 1:
		if w.mark.CompareAndSwap(mark, mark+1) {
			w.overdue()
		}
	default:
		w.watched.Store(false)
		if w.mark.Load() != mark {
			w.start()
		}
		return
	}
	w.timer.Reset(Overdue)
}
