// Package merge merges the store of a snapshot into its origin, offline or while the origin is in use.
//
//	work, err := merge.Offline(ctx, origin, cow, merge.Options{})
//
//	m, err := vm1.BeginMerge()           // in use: vm1 is a *snapshot.Snapshot
//	d := merge.Start(m, merge.Options{})
//	defer d.Stop()
//	err = d.Wait(ctx)
//
// Guarantees: an exception is dropped after its data is durable on the origin. A merge that was stopped or killed
// continues when it is started again: merged chunks stay merged, and the others are still in the store.
//
// A merge copies the exceptions of a snapshot's store into the origin, the last ones first, and drops each from the store
// once its data is durable on the origin (docs/spec/dm-snapshot.md §7). One [snapshot.Merging.Step] does that for one
// window of exceptions and can be interrupted anywhere; this package has the loops around it, which stop between steps:
//
//   - [Offline] merges a store that nothing else uses, from beginning to end. [Plan] reports what it would do, and writes
//     nothing. [Prepare] is for callers who want both.
//   - [WriteUndo] saves what Offline is going to overwrite in a store that reverts the merge, and [CheckUndo] checks that
//     store.
//   - [Begin] makes the side file of an offline merge that is not complete, [ReadSideFile] finds it.
//   - [Driver] merges in the background while the origin is in use: pause, resume, wait, stop.
//   - [Run] is the plain loop, for callers that have a Merging.
package merge

import (
	"context"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
)

// DefaultWindow is how much one step merges by default, in bytes. Larger windows copy in larger pieces and flush less
// often; writes to a window wait while it is merged, so it should take no longer than clients can wait.
//
// Offline, where only an interruption waits, windows grow up to MaxWindow as long as a step is short, and shrink again
// when it is long. With a Driver they begin with LeastWindow, grow up to DefaultWindow while no client makes requests or
// steps are short, and shrink while clients would wait for long ones.
const (
	LeastWindow   = 1 << 20
	DefaultWindow = 32 << 20
	MaxWindow     = 256 << 20

	quickStep = 400 * time.Millisecond
	slowStep  = time.Second
	// clientStep is how long a step may take while clients make requests: some of them wait for it.
	clientStep = 10 * time.Millisecond
)

// Options are the options of a merge. The zero value is usable.
type Options struct {
	// Window is how much one step merges, in bytes; 0 means that it follows the time that steps take (see DefaultWindow).
	// A step merges at least one chunk.
	Window int64

	// Progress is called before the first step and after each, from the goroutine that makes the steps. It should
	// return quickly.
	Progress func(Progress)

	// Siblings are the other snapshots of the origin, which Offline has preserve what they show. With a Driver they are
	// attached to the origin.
	Siblings []Sibling

	// Completed is called once by Offline and by a Driver when everything is merged, durable and closed; the merge is
	// complete when it returns, with its error.
	Completed func() error
}

// Progress is how far a merge is. Total counts the exceptions at the start.
type Progress struct {
	MergedChunks uint64
	TotalChunks  uint64
	ChunkBytes   int64
}

// MergedBytes is MergedChunks in bytes.
func (p Progress) MergedBytes() int64 { return int64(p.MergedChunks) * p.ChunkBytes }

// TotalBytes is TotalChunks in bytes.
func (p Progress) TotalBytes() int64 { return int64(p.TotalChunks) * p.ChunkBytes }

// Percent is how much of the merge is done, from 0 to 100.
func (p Progress) Percent() float64 {
	if p.TotalChunks == 0 {
		return 100
	}
	return 100 * float64(p.MergedChunks) / float64(p.TotalChunks)
}

// loop is a merge with its counters.
type loop struct {
	m      *snapshot.Merging
	window uint64                                           // exceptions a step
	chunk  int64                                            // bytes
	total  uint64                                           // exceptions at the beginning
	next   func(took time.Duration, requests uint64) uint64 // the next window, after a full step; nil: the same
	ahead  bool                                             // nobody else uses the devices: steps copy the next window as well
	full   uint64                                           // how many exceptions the next step merges if there are as many
}

// newLoop returns the loop of a merge that has been resumed.
func newLoop(m *snapshot.Merging, o Options) *loop {
	window := o.Window
	if window <= 0 {
		window = DefaultWindow
	}
	st := m.Store()
	chunk := st.Layout().ChunkBytes()
	exceptions := uint64(max(1, window/chunk))
	return &loop{m: m, window: exceptions, full: exceptions, chunk: chunk, total: st.Len()}
}

// progress returns how far the merge is. The remaining exceptions are read from the store and not counted: after a
// failure the store may be loaded again, with what is on the disk.
func (l *loop) progress() Progress {
	left := min(l.m.Store().Len(), l.total)
	return Progress{MergedChunks: l.total - left, TotalChunks: l.total, ChunkBytes: l.chunk}
}

// step makes one step. done: nothing was left. While another snapshot has no space for chunks that it must keep, step
// waits until there may be space or ctx ends, and the caller repeats it.
func (l *loop) step(ctx context.Context) (done bool, err error) {
	began, before := time.Now(), l.m.Requests()
	ahead := uint64(0)
	if l.ahead {
		ahead = l.window
	}
	n, err := l.m.StepAhead(l.window, ahead)
	if changed := block.CanRetry(err); changed != nil {
		return false, block.AwaitRetry(ctx, changed)
	}
	if err != nil {
		return false, err
	}
	if l.next != nil && n == l.full {
		l.window = l.next(time.Since(began), l.m.Requests()-before)
	}
	l.full = l.window
	if l.ahead {
		l.full = ahead
		// Steps get shorter towards the end: nothing is copied beside the last flush.
		if l.next != nil {
			l.window = min(l.window, max(l.m.Store().Len()/2, uint64(max(1, DefaultWindow/l.chunk))))
		}
	}
	return n == 0, nil
}

// nextWindow is the next window, in exceptions, after a step with this window took that long.
func nextWindow(window uint64, took time.Duration, chunk uint64) uint64 {
	switch {
	case took < quickStep:
		return max(window, min(2*window, MaxWindow/chunk))
	case took > slowStep:
		return min(window, max(window/2, DefaultWindow/chunk, 1))
	}
	return window
}

// liveWindow is nextWindow of a merge beside clients, which made so many requests meanwhile.
func liveWindow(window uint64, took time.Duration, requests, chunk uint64) uint64 {
	switch {
	case requests == 0 || took < clientStep/2:
		return max(window, min(2*window, DefaultWindow/chunk))
	case took > clientStep:
		return min(window, max(window/2, LeastWindow/chunk, 1))
	}
	return window
}

// Run makes steps until the merge is complete (nil), a step fails (its error) or ctx ends (the cause of that), also
// while a step waits for space in the COW device of another snapshot. m must have been resumed; the caller closes it or
// runs it again.
func Run(ctx context.Context, m *snapshot.Merging, o Options) error { return run(ctx, m, o, false) }

// run is Run. With ahead, which is for a merge without clients, each step also copies the next window.
func run(ctx context.Context, m *snapshot.Merging, o Options, ahead bool) error {
	l := newLoop(m, o)
	l.ahead = ahead
	if o.Window <= 0 {
		l.next = func(took time.Duration, _ uint64) uint64 { return nextWindow(l.window, took, uint64(l.chunk)) }
	}
	for {
		p := l.progress()
		if o.Progress != nil {
			o.Progress(p)
		}
		if ctx.Err() != nil && p.MergedChunks < p.TotalChunks {
			return context.Cause(ctx)
		}
		if done, err := l.step(ctx); done || err != nil {
			return err
		}
	}
}
