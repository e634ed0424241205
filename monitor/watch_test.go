package monitor

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

func TestWatcher(t *testing.T) {
	noFileSystems(t)
	var sectors atomic.Uint64
	var fail atomic.Bool
	var alerts []Alert
	w := NewWatcher(func() (api.Tree, error) {
		if fail.Load() {
			return api.Tree{}, errors.New("no server")
		}
		return node(sectors.Load()), nil
	}, WatchOptions{Alert: func(a Alert) { alerts = append(alerts, a) }})
	reports, end := w.Subscribe()
	for i := range 6 {
		sectors.Store(uint64(i) * 1000)
		if err := w.Step(at(float64(i))); err != nil {
			t.Fatal(err)
		}
	}
	<-reports
	select {
	case <-reports:
		t.Error("reports pile up")
	default:
	}
	if r, err := w.Latest(); err != nil || *r.Find("vm1").Rates.SecondsToFull != 1995 {
		t.Errorf("%+v, %v", r.Find("vm1"), err)
	}
	if len(alerts) != 1 || alerts[0].Kind != AlertTimeToFull {
		t.Errorf("%+v", alerts)
	}
	// The report is of another time than this test: a recent one is a new one.
	sectors.Store(77)
	if r, err := w.Recent(time.Minute); err != nil || r.Find("vm1").Figures.SectorsAllocated != 77 {
		t.Errorf("recent: %+v, %v", r.Find("vm1"), err)
	}
	sectors.Store(78)
	if r, err := w.Recent(time.Hour); err != nil || r.Find("vm1").Figures.SectorsAllocated != 77 {
		t.Errorf("recent again: %+v, %v", r.Find("vm1"), err)
	}
	fail.Store(true)
	if err := w.Step(at(7)); err == nil {
		t.Error("an error was lost")
	}
	<-reports
	if r, err := w.Latest(); err == nil || r.Find("vm1") == nil {
		t.Error("after an error the latest report is gone, or the error is")
	}
	end()
}

// Run makes reports until its context ends, and sooner when somebody reads them.
func TestWatcherRuns(t *testing.T) {
	noFileSystems(t)
	w := NewWatcher(func() (api.Tree, error) { return node(0), nil }, WatchOptions{})
	w.every, w.seldom = time.Millisecond, time.Hour
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	reports, end := w.Subscribe()
	for range 5 {
		<-reports
	}
	end()
	stop()
	<-done
}

// Without readers no report is made of a tree that stays the same, unless something was filling.
func TestNoReportsOfWhatStaysTheSame(t *testing.T) {
	noFileSystems(t)
	var sectors, version, asked, steps atomic.Uint64
	w := NewWatcher(func() (api.Tree, error) {
		steps.Add(1)
		return node(sectors.Load()), nil
	}, WatchOptions{Version: func() any {
		asked.Add(1)
		return version.Load()
	}})
	w.every, w.seldom = time.Millisecond, time.Millisecond
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	defer func() { stop(); <-done }()
	limit := time.Now().Add(30 * time.Second)
	until := func(n *atomic.Uint64, least uint64) {
		t.Helper()
		for ; n.Load() < least; time.Sleep(time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("%d after 30 seconds, want %d", n.Load(), least)
			}
		}
	}
	until(&asked, 20)
	if n := steps.Load(); n != 1 {
		t.Errorf("%d reports of a tree that stays the same", n)
	}
	sectors.Store(1000)
	version.Add(1)
	until(&steps, 10) // since it was filling in the last one
	if r, _ := w.Latest(); r.Find("vm1").Figures.SectorsAllocated != 1000 || r.Find("vm1").Rates.FillBytes == 0 {
		t.Errorf("%+v", r.Find("vm1"))
	}
	sectors.Store(0) // a new window, which grows no more
	version.Add(1)
	n := uint64(0)
	for now := steps.Load(); now != n; now = steps.Load() {
		n = now
		until(&asked, asked.Load()+20)
	}
	_, end := w.Subscribe()
	until(&steps, n+5)
	end()
}

// An event has a report made at once, and one when what follows from it is to be seen. A flood of events has few made.
func TestEventsAreReportedAtOnce(t *testing.T) {
	noFileSystems(t)
	var sectors, steps atomic.Uint64
	alerts := make(chan Alert, 10)
	events := NewEvents()
	w := NewWatcher(func() (api.Tree, error) {
		if steps.Add(1) == 3 { // the second one after the event
			sectors.Store(1_900_000)
		}
		return node(sectors.Load()), nil
	}, WatchOptions{Alert: func(a Alert) { alerts <- a }, Events: events, Thresholds: Thresholds{TimeToFull: -1}})
	w.every, w.seldom = 100*time.Millisecond, time.Hour
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	defer func() { stop(); <-done }()
	events.Happened()
	for _, percent := range []float64{80, 90, 95} {
		select {
		case a := <-alerts:
			if a.Kind != AlertFill || a.Threshold != percent {
				t.Errorf("alert %+v, want of %v percent", a, percent)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("no alert")
		}
	}
	began, before := time.Now(), steps.Load()
	for time.Since(began) < 500*time.Millisecond {
		events.Happened()
		time.Sleep(time.Millisecond)
	}
	passed := time.Since(began)
	if n, most := steps.Load()-before, 4+4*uint64(passed/w.every); n == 0 || n > most {
		t.Errorf("%d reports in %v, want 1 to %d", n, passed, most)
	}
}
