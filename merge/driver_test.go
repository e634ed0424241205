package merge_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
)

// begin starts the live merge of a world and returns the origin, which shows the merged content.
func (w world) begin(t *testing.T, origin block.Device) (*snapshot.Origin, *snapshot.Merging) {
	t.Helper()
	o := snapshot.NewOrigin(origin)
	snap := attach(t, o, w.cow)
	m, err := snap.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	return o, m
}

func wantState(t *testing.T, d *merge.Driver, want merge.State) {
	t.Helper()
	if got, err := d.State(); got != want {
		t.Errorf("state %s (%v), want %s", got, err, want)
	}
}

func TestDriverMergesWhileTheOriginIsUsed(t *testing.T) {
	w := newWorld(t, 300, 200)
	o, m := w.begin(t, w.origin)
	if !bytes.Equal(readAll(t, o), w.want) {
		t.Fatal("the origin does not show the merged content at once")
	}
	d := merge.Start(m, merge.Options{Window: 2 * chunk})
	defer d.Stop()
	var clients sync.WaitGroup
	for i := range 3 {
		clients.Go(func() {
			for n := range 50 {
				off := int64(i*100+n*2)*chunk + 100
				p := bytes.Repeat([]byte{byte(i + 1)}, 200)
				if _, err := o.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				copy(w.want[off:], p)
			}
		})
	}
	clients.Wait()
	if err := d.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantState(t, d, merge.Done)
	if o.Merging() != nil {
		t.Error("the merge still plays the origin's part")
	}
	w.wantMerged(t)
	if p := d.Progress(); p.MergedChunks != p.TotalChunks || p.Percent() != 100 {
		t.Errorf("progress %+v at the end", p)
	}
}

// stepper makes a driver go one step at a time: it waits in Progress until the test continues it.
type stepper struct{ at, on chan struct{} }

func newStepper() stepper { return stepper{make(chan struct{}), make(chan struct{})} }

func (s stepper) progress(merge.Progress) {
	s.at <- struct{}{}
	<-s.on
}

func TestDriverPausesBetweenSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 60, 20)
		o, m := w.begin(t, w.origin)
		s := newStepper()
		d := merge.Start(m, merge.Options{Window: chunk, Progress: s.progress})
		<-s.at
		d.Pause()
		d.Pause() // once more changes nothing
		s.on <- struct{}{}
		synctest.Wait() // the step has been made and the driver waits
		wantState(t, d, merge.Paused)
		p := d.Progress()
		if p.MergedChunks != 1 {
			t.Errorf("paused after %d chunks, want the one of the step under way", p.MergedChunks)
		}
		if !bytes.Equal(readAll(t, o), w.want) {
			t.Error("the origin of a paused merge does not show the merged content")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := d.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Wait on a paused merge: %v", err)
		}
		d.Resume()
		<-s.at
		wantState(t, d, merge.Running)
		go func() {
			for range s.at {
				s.on <- struct{}{}
			}
		}()
		s.on <- struct{}{}
		if err := d.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.Stop() // of what is done
		close(s.at)
		wantState(t, d, merge.Done)
		w.wantMerged(t)
	})
}

func TestDriverStopsAndAnotherGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 60, 20)
		_, m := w.begin(t, w.origin)
		s := newStepper()
		d := merge.Start(m, merge.Options{Window: chunk, Progress: s.progress})
		<-s.at
		waited := make(chan error)
		go func() { waited <- d.Wait(t.Context()) }()
		go d.Stop()
		if err := <-waited; !errors.Is(err, merge.ErrStopped) {
			t.Errorf("Wait: %v, want ErrStopped", err)
		}
		s.on <- struct{}{}
		synctest.Wait() // fails the test if the driver's goroutine went on
		wantState(t, d, merge.Stopped)
		d.Resume() // too late
		wantState(t, d, merge.Stopped)
		if n := d.Progress().MergedChunks; n != 1 {
			t.Errorf("%d chunks merged, want the one of the step under way", n)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		w.wantLoadable(t)
		_, m = w.begin(t, w.origin)
		d = merge.Start(m, merge.Options{})
		if err := d.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.Stop()
		w.wantMerged(t)
	})
}

func TestDriverGoesOnAfterAFailedStep(t *testing.T) {
	w := newWorld(t, 60, 20)
	broken := errors.New("unplugged")
	var fail atomic.Bool
	origin := blocktest.NewFaulty(w.origin, func(op blocktest.Op) error {
		if fail.Load() && op.Kind == blocktest.Write {
			return broken
		}
		return nil
	})
	o, m := w.begin(t, origin)
	fail.Store(true)
	d := merge.Start(m, merge.Options{Window: 3 * chunk})
	defer d.Stop()
	if err := d.Wait(t.Context()); !errors.Is(err, broken) || !errors.Is(err, snapshot.ErrMergeFailed) {
		t.Fatalf("Wait: %v", err)
	}
	wantState(t, d, merge.Failed)
	if !bytes.Equal(readAll(t, o), w.want) {
		t.Error("the origin of a failed merge does not show the merged content")
	}
	fail.Store(false)
	d.Resume()
	if err := d.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantMerged(t)
}

// waiting makes a merge whose steps wait for space in the COW device of another snapshot, for ever.
func waiting(t *testing.T) *snapshot.Merging {
	t.Helper()
	w := newWorld(t, 64, 32)
	o := snapshot.NewOrigin(w.origin)
	snap := attach(t, o, w.cow)
	other, err := o.Attach(block.NewMemory(2*chunk), snapshot.Options{ChunkSectors: chunk / block.SectorSize, OnFull: snapshot.FullPause})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	m, err := snap.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// TestRunEndsWhileItWaits: the end of its context ends Run, and Stop a Driver, while a step waits for space elsewhere.
func TestRunEndsWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := waiting(t)
		cause := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		running := errors.New("still running")
		err := running
		go func() { err = merge.Run(ctx, m, merge.Options{}) }()
		synctest.Wait()
		if err != running {
			t.Fatalf("Run does not wait: %v", err)
		}
		cancel(cause)
		synctest.Wait()
		if err != cause {
			t.Errorf("Run returned %v", err)
		}
		d := merge.Start(m, merge.Options{})
		synctest.Wait()
		wantState(t, d, merge.Running)
		began := time.Now()
		d.Stop()
		wantState(t, d, merge.Stopped)
		if took := time.Since(began); took != 0 {
			t.Errorf("Stop took %v", took)
		}
	})
}
