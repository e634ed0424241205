package merge_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

const chunk = 4096

// world is an origin with a snapshot that was written to here and there: the two devices, and what the
// snapshot shows, which is what a merge must make of the origin.
type world struct {
	origin, cow *block.Memory
	want        []byte
}

// newWorld makes a world whose origin ends within a chunk.
func newWorld(t *testing.T, chunks, writes int) world {
	t.Helper()
	r := rand.New(rand.NewPCG(1, uint64(chunks)))
	content := make([]byte, chunks*chunk-512)
	fill(r, content)
	w := world{origin: block.MemoryFrom(content), cow: block.NewMemory(int64(chunks+chunks/200+3) * chunk)}
	if _, err := store.Create(w.cow, ondisk.Layout{ChunkSectors: chunk / 512}, false); err != nil {
		t.Fatal(err)
	}
	snap := attach(t, snapshot.NewOrigin(w.origin), w.cow)
	for range writes {
		p := make([]byte, 1+r.IntN(3*chunk))
		fill(r, p)
		write(t, snap, p, r.Int64N(snap.Size()-int64(len(p))+1))
	}
	write(t, snap, []byte("last"), snap.Size()-4) // the short chunk
	w.want = readAll(t, snap)
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	return w
}

func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

func attach(t *testing.T, o *snapshot.Origin, cow block.Device) *snapshot.Snapshot {
	t.Helper()
	s, err := o.Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func write(t *testing.T, d block.Device, p []byte, off int64) {
	t.Helper()
	if _, err := d.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func readAll(t *testing.T, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// wantMerged checks that the origin has the snapshot's content and that the store is empty and valid.
func (w world) wantMerged(t *testing.T) {
	t.Helper()
	if !bytes.Equal(w.origin.Bytes(), w.want) {
		t.Error("the merged origin differs from what the snapshot showed")
	}
	st, err := store.Open(w.cow)
	if err != nil || st.Err() != nil || st.Len() != 0 {
		t.Errorf("store after the merge: %v, %v, want an empty one", st, err)
	}
}

// wantLoadable checks that a half-merged pair still shows the snapshot.
func (w world) wantLoadable(t *testing.T) {
	t.Helper()
	snap := attach(t, snapshot.NewOrigin(w.origin), w.cow)
	defer snap.Close()
	if !bytes.Equal(readAll(t, snap), w.want) {
		t.Error("the half-merged snapshot shows something else than before")
	}
}

func TestOfflineMergesAll(t *testing.T) {
	for _, window := range []int64{0, 1, 5 * chunk} {
		w := newWorld(t, 300, 200)
		plan, err := merge.Plan(w.origin, w.cow)
		if err != nil || plan.Chunks == 0 || plan.Runs == 0 || plan.Runs > plan.Chunks || plan.ChunkSectors != chunk/512 {
			t.Fatalf("plan %+v, %v", plan, err)
		}
		if want := int64(plan.Chunks)*chunk - 512; plan.Bytes != want {
			t.Errorf("plan has %d bytes, want %d: the last chunk overlaps the end by a sector", plan.Bytes, want)
		}
		var seen []merge.Progress
		did, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{Window: window,
			Progress: func(p merge.Progress) { seen = append(seen, p) }})
		if err != nil || did != plan {
			t.Fatalf("did %+v, %v; planned %+v", did, err, plan)
		}
		w.wantMerged(t)
		first, last := seen[0], seen[len(seen)-1]
		if first.MergedChunks != 0 || last.MergedChunks != plan.Chunks || last.TotalChunks != plan.Chunks || last.Percent() != 100 {
			t.Errorf("progress from %+v to %+v, want 0 to %d", first, last, plan.Chunks)
		}
		if window == 1 && uint64(len(seen)) != plan.Chunks+1 {
			t.Errorf("a window below a chunk: %d calls of Progress for %d chunks", len(seen), plan.Chunks)
		}
	}
}

func TestOfflineOfAnEmptyStore(t *testing.T) {
	w := newWorld(t, 10, 3)
	for range 2 {
		if _, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{}); err != nil {
			t.Fatal(err)
		}
		w.wantMerged(t)
	}
}

// A merge that ends after any step leaves a pair that shows the snapshot and can be merged on.
func TestOfflineStoppedAfterAnyStepGoesOn(t *testing.T) {
	reason := errors.New("the operator said so")
	for stopAt := uint64(0); ; stopAt++ {
		w := newWorld(t, 60, 20)
		ctx, cancel := context.WithCancelCause(t.Context())
		did, err := merge.Offline(ctx, w.origin, w.cow, merge.Options{Window: 3 * chunk, Progress: func(p merge.Progress) {
			if p.MergedChunks >= 3*stopAt {
				cancel(reason)
			}
		}})
		if 3*stopAt >= did.Chunks { // too late to stop anything
			if err != nil {
				t.Fatal(err)
			}
			w.wantMerged(t)
			return
		}
		if !errors.Is(err, reason) {
			t.Fatalf("stopped at %d: %v, want the cause", stopAt, err)
		}
		st, err := store.Open(w.cow)
		if err != nil || st.Len() != did.Chunks-3*stopAt {
			t.Fatalf("stopped at %d: %d of %d exceptions left, %v", stopAt, st.Len(), did.Chunks, err)
		}
		w.wantLoadable(t)
		if _, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{}); err != nil {
			t.Fatal(err)
		}
		w.wantMerged(t)
	}
}

// A merge whose devices fail from the n-th operation on, for every n, can be done again.
func TestOfflineCutAfterAnyOperationGoesOn(t *testing.T) {
	errCut := errors.New("cut off")
	for n := 0; ; n++ {
		w := newWorld(t, 20, 8)
		left := n
		var mu sync.Mutex // a window is copied while the one before is dropped
		cut := func(op blocktest.Op) error {
			if op.Kind == blocktest.Read {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			if left--; left < 0 {
				return errCut
			}
			return nil
		}
		_, err := merge.Offline(t.Context(), blocktest.NewFaulty(w.origin, cut), blocktest.NewFaulty(w.cow, cut), merge.Options{Window: 4 * chunk})
		if err == nil {
			if n < 10 {
				t.Fatalf("a merge with %d operations", n)
			}
			w.wantMerged(t)
			return
		}
		if !errors.Is(err, errCut) {
			t.Fatalf("cut after %d operations: %v", n, err)
		}
		w.wantLoadable(t)
		if _, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{}); err != nil {
			t.Fatalf("after a cut at operation %d: %v", n, err)
		}
		w.wantMerged(t)
	}
}

func TestRefusedMergesTouchNothing(t *testing.T) {
	tests := map[string]struct {
		spoil func(t *testing.T, w *world)
		want  func(error) bool
	}{
		"invalid store": {
			func(t *testing.T, w *world) {
				st, err := store.Open(w.cow)
				if err != nil {
					t.Fatal(err)
				}
				st.Invalidate(errors.New("for the test"))
			},
			func(err error) bool { return errors.Is(err, store.ErrInvalid) },
		},
		"no store": {
			func(t *testing.T, w *world) { w.cow = block.NewMemory(1 << 20) },
			func(err error) bool { return errors.Is(err, ondisk.ErrNoStore) },
		},
		"origin too small": {
			func(t *testing.T, w *world) { w.origin = block.MemoryFrom(w.origin.Bytes()[:10*chunk]) },
			func(err error) bool { return err != nil },
		},
		"the same device": {
			func(t *testing.T, w *world) { w.cow = w.origin },
			func(err error) bool { return errors.Is(err, snapshot.ErrSameDevice) },
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 60, 20)
			test.spoil(t, &w)
			var log blocktest.Log
			origin := log.Record("origin", w.origin)
			cow := block.Device(origin)
			if w.cow != w.origin {
				cow = log.Record("cow", w.cow)
			}
			if _, err := merge.Offline(t.Context(), origin, cow, merge.Options{}); !test.want(err) {
				t.Errorf("Offline: %v", err)
			}
			if _, err := merge.Plan(origin, cow); !test.want(err) {
				t.Errorf("Plan: %v", err)
			}
			for _, op := range log.Ops() {
				if op.Kind != blocktest.Read {
					t.Errorf("a refused merge did %v", op)
				}
			}
		})
	}
}
