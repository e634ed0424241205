package merge

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/snapshot"
)

// ErrStopped reports a merge whose driver was stopped before it was complete.
var ErrStopped = errors.New("merge stopped before it was complete")

// State is what a Driver is doing, in one word.
type State string

const (
	Running State = "running"
	Paused  State = "paused"
	Failed  State = "failed" // a step failed; Resume tries it again
	Done    State = "done"
	Stopped State = "stopped"
)

// A Driver merges in the background while the origin is in use. Its methods may be called
// concurrently.
//
//	running ⇄ paused      Pause, Resume
//	running → failed      a step failed; Resume tries again
//	running → done        complete; the Merging is closed, the origin is itself again
//	any but done → stopped  Stop; the Merging stays loaded
type Driver struct {
	loop     *loop
	progress func(Progress)
	complete func() error    // nil, or Options.Completed
	ctx      context.Context // canceled by Stop, which ends a step that waits for space
	cancel   context.CancelFunc
	ended    chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex
	state   State
	err     error         // of state Failed, or of closing in state Done
	changed chan struct{} // closed and replaced when state changes
}

// Start drives m, which must have been resumed, until it is complete or Stop is called. Stop must be called eventually,
// so that the Driver's goroutine ends.
func Start(m *snapshot.Merging, o Options) *Driver {
	d := &Driver{loop: newLoop(m, o), progress: o.Progress, complete: o.Completed, state: Running,
		ended: make(chan struct{}), changed: make(chan struct{})}
	if l := d.loop; o.Window <= 0 {
		l.window = uint64(max(1, LeastWindow/l.chunk))
		l.next = func(took time.Duration, requests uint64) uint64 {
			return liveWindow(l.window, took, requests, uint64(l.chunk))
		}
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	go d.run()
	return d
}

// run makes steps until the merge is complete or stopped.
func (d *Driver) run() {
	defer close(d.ended)
	defer d.cancel()
	for d.proceed() {
		if d.progress != nil {
			d.progress(d.loop.progress())
		}
		began, before := time.Now(), d.loop.m.Requests()
		done, err := d.loop.step(d.ctx)
		rest := restAfter(time.Since(began), d.loop.m.Requests()-before)
		switch {
		case err != nil:
			d.move(Failed, err, Running, Paused)
		case done:
			// The race considered: Stop between the last step and here. The merge is complete anyway, and that is its
			// state.
			err := d.loop.m.Close()
			if err == nil && d.complete != nil {
				err = d.complete()
			}
			d.move(Done, err, Running, Paused, Stopped)
			return
		case rest > 0:
			d.rest(rest)
		}
	}
}

// restAfter is how long to pause after a step that took that long, when clients made requests meanwhile: as long as the
// step, so that clients have the disks and processors for half of the time.
func restAfter(took time.Duration, requests uint64) time.Duration {
	if requests == 0 {
		return 0
	}
	return min(took, time.Second)
}

// rest waits, at most until the driver is paused or stopped.
func (d *Driver) rest(long time.Duration) {
	state, changed, _ := d.look()
	if state != Running {
		return
	}
	enough := time.NewTimer(long)
	defer enough.Stop()
	select {
	case <-enough.C:
	case <-changed:
	}
}

// proceed waits while the driver is paused or failed. It returns false when it was stopped.
func (d *Driver) proceed() bool {
	for {
		state, changed, _ := d.look()
		switch state {
		case Running:
			return true
		case Stopped:
			return false
		}
		<-changed
	}
}

// look returns the state, a channel that is closed when it changes, and the error of a merge that ended with one.
func (d *Driver) look() (State, <-chan struct{}, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state, d.changed, d.err
}

// move changes to a state from one of those given, and does nothing in any other.
func (d *Driver) move(to State, err error, from ...State) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range from {
		if d.state == s {
			d.state, d.err = to, err
			close(d.changed)
			d.changed = make(chan struct{})
			return
		}
	}
}

// Pause stops merging after the current step. The origin still shows the merged content.
func (d *Driver) Pause() { d.move(Paused, nil, Running) }

// Resume continues merging, also after a step failed.
func (d *Driver) Resume() { d.move(Running, nil, Paused, Failed) }

// Stop ends the driver after the current step, or while it waits for space in the COW device of another snapshot, and
// waits until it has ended. The Merging stays loaded unless it was complete: close it, or start another driver.
func (d *Driver) Stop() {
	d.move(Stopped, ErrStopped, Running, Paused, Failed)
	d.cancel()
	<-d.ended
}

// State returns what the driver is doing. The error is why the merge failed, or why the devices could not be flushed
// when it was complete.
func (d *Driver) State() (State, error) {
	state, _, err := d.look()
	return state, err
}

// Progress returns how far the merge is.
func (d *Driver) Progress() Progress { return d.loop.progress() }

// Wait waits until the merge is complete (nil), failed (its error) or stopped (ErrStopped), or until ctx ends (the
// cause of that). It keeps waiting while the merge is paused.
func (d *Driver) Wait(ctx context.Context) error {
	for {
		state, changed, err := d.look()
		if state != Running && state != Paused {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
