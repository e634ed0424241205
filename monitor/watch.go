package monitor

import (
	"context"
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// A Watcher makes reports of a server again and again, for several readers.
type Watcher struct {
	tree    func() (api.Tree, error)
	version func() any
	alert   func(Alert)
	events  <-chan struct{}
	every   time.Duration
	seldom  time.Duration // without subscribers

	stepping sync.Mutex // sampler, alerts and seen
	sampler  Sampler
	alerts   Alerts
	seen     any // the version of the last report, nil: none

	mu      sync.Mutex
	latest  Report
	err     error
	readers map[chan struct{}]bool
	wake    chan struct{} // a reader came
}

// WatchOptions are what a Watcher does.
type WatchOptions struct {
	Thresholds Thresholds
	Alert      func(Alert) // called for each alert, from one goroutine at a time; nil: none. It must not block.

	// Version is called before a report is made that nobody reads. As long as what it returns is equal to what it was before the
	// last one, and nothing filled then, the tree has changed in nothing that alerts depend on, and none is made. nil: it is not known.
	Version func() any

	// Events has a report made at once, whose alerts are delivered, instead of with the next one: something happened. Of a
	// flood, one in a second is. nil: there are none.
	Events <-chan struct{}
}

// Events are the value of WatchOptions.Events, for those who send.
type Events chan struct{}

// NewEvents returns Events.
func NewEvents() Events { return make(Events, 1) }

// Happened has a report made. It does not block.
func (e Events) Happened() {
	select {
	case e <- struct{}{}:
	default:
	}
}

// NewWatcher returns a Watcher of the server whose tree the function returns.
func NewWatcher(tree func() (api.Tree, error), o WatchOptions) *Watcher {
	if o.Alert == nil {
		o.Alert = func(Alert) {}
	}
	return &Watcher{tree: tree, version: o.Version, alert: o.Alert, events: o.Events, every: time.Second, seldom: 5 * time.Second, alerts: Alerts{Thresholds: o.Thresholds},
		readers: map[chan struct{}]bool{}, wake: make(chan struct{}, 1)}
}

// Step makes a report, and has its alerts delivered. An error is that of the server; the latest report stays then.
func (w *Watcher) Step(now time.Time) error {
	w.stepping.Lock()
	defer w.stepping.Unlock()
	w.seen = nil
	var version any
	if w.version != nil {
		version = w.version()
	}
	t, err := w.tree()
	if err != nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.err = err
		w.publish()
		return err
	}
	r := w.sampler.Step(now, t)
	for _, a := range w.alerts.Step(r) {
		w.alert(a)
	}
	w.seen = version
	w.mu.Lock()
	defer w.mu.Unlock()
	w.latest, w.err = r, nil
	w.publish()
	return nil
}

// idle reports whether a report would say what the last one said: nothing changed since, and nothing filled then.
func (w *Watcher) idle(now time.Time) bool {
	w.stepping.Lock()
	defer w.stepping.Unlock()
	return w.seen != nil && w.version() == w.seen && w.sampler.Same(now)
}

// publish notifies the readers that there is a new report. mu is held.
func (w *Watcher) publish() {
	for c := range w.readers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Latest returns the last report, and the error of a later step. The report is not changed any more; it is shared.
func (w *Watcher) Latest() (Report, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.latest, w.err
}

// Recent is Latest, after a step of its own where the last report is older than age.
func (w *Watcher) Recent(age time.Duration) (Report, error) {
	if r, err := w.Latest(); err == nil && time.Since(r.At) < age {
		return r, nil
	}
	if err := w.Step(time.Now()); err != nil {
		return Report{}, err
	}
	return w.Latest()
}

// Subscribe returns a channel that gets a value after each report, unless one is waiting there; end ends that. While
// there are subscribers, reports are made each second, otherwise every 5 seconds or as WatchOptions.Version says.
func (w *Watcher) Subscribe() (reports <-chan struct{}, end func()) {
	c := make(chan struct{}, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.readers[c] = true
	select {
	case w.wake <- struct{}{}:
	default:
	}
	return c, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.readers, c)
	}
}

// afterEvent is when a second report is made after an event: what it says may come before what follows from it.
const afterEvent = 250 * time.Millisecond

// Run makes reports until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	rest := func(long time.Duration) {
		if long <= 0 {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(long):
		}
	}
	var event time.Time // of the last report for one
	read := true
	for ctx.Err() == nil {
		if now := time.Now(); read || !w.idle(now) {
			w.Step(now) // readers see the error
		}
		w.mu.Lock()
		pause := w.seldom
		if read = len(w.readers) > 0; read {
			pause = w.every
		}
		w.mu.Unlock()
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-w.wake:
			read = true
			rest(min(w.every, leastStep)) // rates need some time between two reports
		case <-w.events:
			rest(time.Until(event.Add(w.every)))
			event = time.Now()
			w.Step(event)
			rest(min(w.every, afterEvent))
		case <-t.C:
		}
		t.Stop()
	}
}
