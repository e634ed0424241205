package snapshot_test

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// TestLocksNeverMeet runs every method that takes a lock of the order in origin.go concurrently with every other:
// requests to both sides, suspending, handing over, attaching and closing, merging, pausing for want of space, and
// status. None may wait for ever. Other tests check what they return.
func TestLocksNeverMeet(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, seed := range seeds(t, 4) {
		var opts []snapshot.OriginOption
		if seed%2 == 1 {
			opts = append(opts, snapshot.WriteBack(32<<10, time.Millisecond))
		}
		r := newRig(t, 256, opts...)
		cows := [3]*cow{}
		for i, name := range []string{"A", "B", "C"} {
			cows[i] = r.cow(name, 200) // soon full
		}
		policies := []snapshot.FullPolicy{snapshot.FullPause, snapshot.FullFail, snapshot.FullInvalidate}
		var mu sync.Mutex
		var current [3]*snapshot.Snapshot
		load := func(i int) {
			s, err := r.origin.Attach(cows[i].dev, snapshot.Options{ChunkSectors: 1 << i, OnFull: policies[i]})
			if err != nil {
				return // a merge has the device, or another goroutine loads it
			}
			mu.Lock()
			defer mu.Unlock()
			current[i] = s
		}
		get := func(i int) *snapshot.Snapshot {
			mu.Lock()
			defer mu.Unlock()
			return current[i]
		}
		for i := range 3 {
			load(i)
		}
		allowed := func(err error) {
			for _, ok := range []error{store.ErrInvalid, store.ErrFailed, snapshot.ErrNoRoom, fs.ErrClosed, snapshot.ErrResumeSource,
				snapshot.ErrSourceRunning, snapshot.ErrPairing, snapshot.ErrAlreadyMerging, snapshot.ErrMergeFailed, snapshot.ErrHandoverCancelled} {
				if err == nil || errors.Is(err, ok) {
					return
				}
			}
			t.Errorf("seed %d: %v", seed, err)
		}
		ended := time.Now().Add(300 * time.Millisecond)
		var all sync.WaitGroup
		worker := func(k uint64, do func(rnd *rand.Rand, i int)) {
			all.Go(func() {
				rnd := rand.New(rand.NewPCG(seed, k))
				for time.Now().Before(ended) {
					do(rnd, rnd.IntN(3))
				}
			})
		}
		for k := range uint64(2) {
			worker(k, func(rnd *rand.Rand, i int) {
				_, err := get(i).WriteAt(fill(1+rnd.Int64N(8), 1), rnd.Int64N(240)*sector)
				allowed(err)
			})
			worker(10+k, func(rnd *rand.Rand, i int) {
				_, err := r.origin.WriteAt(fill(1+rnd.Int64N(8), 1), rnd.Int64N(240)*sector)
				allowed(err)
			})
		}
		worker(20, func(rnd *rand.Rand, i int) {
			_, err := get(i).ReadAt(make([]byte, 8*sector), rnd.Int64N(240)*sector)
			allowed(err)
			_, err = r.origin.ReadAt(make([]byte, 8*sector), rnd.Int64N(240)*sector)
			allowed(err)
		})
		worker(21, func(rnd *rand.Rand, i int) {
			allowed(get(i).Flush())
			allowed(r.origin.Flush())
			allowed(get(i).Discard(0, 64*sector))
		})
		worker(22, func(rnd *rand.Rand, i int) { // suspend, and resume or hand over
			s := get(i)
			allowed(s.Suspend())
			// Refused while somebody takes the store over: that ends, and the caller of Suspend must resume.
			err := s.Resume()
			for ; errors.Is(err, snapshot.ErrResumeSource); err = s.Resume() {
				runtime.Gosched()
			}
			allowed(err)
		})
		worker(23, func(rnd *rand.Rand, i int) { // close and load again
			allowed(get(i).Close())
			load(i)
		})
		worker(24, func(rnd *rand.Rand, i int) { // merge a little
			m, err := get(i).BeginMerge()
			if allowed(err); err != nil {
				return
			}
			for range rnd.IntN(5) {
				_, err := m.Step(uint64(rnd.IntN(4)))
				allowed(err)
				m.Status()
			}
			allowed(m.Close())
			load(i)
		})
		worker(25, func(rnd *rand.Rand, i int) {
			get(i).Status()
			r.origin.Snapshots()
			_, err := get(i).Changed(0, 64*sector)
			allowed(err)
			_, err = r.origin.Extents(0, 64*sector)
			allowed(err)
			r.origin.RetryPaused()
			runtime.Gosched()
		})
		done := make(chan struct{})
		go func() { all.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(60 * time.Second):
			stacks := make([]byte, 1<<20)
			t.Fatalf("seed %d: somebody waits for ever\n%s", seed, stacks[:runtime.Stack(stacks, true)])
		}
		for i := range 3 {
			allowed(get(i).Close())
			checkStore(t, cows[i].memory)
		}
	}
}
