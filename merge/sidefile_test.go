package merge_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// sideOrigin is a file that side files are made beside; what it holds is of no matter to them.
func sideOrigin(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 4096), 0o640); err != nil {
		t.Fatal(err)
	}
	return path
}

// Cut after any operation on the devices: whenever the origin has changed, and until the merge is durable, the side file
// is there, refuses another store, and lets this one continue.
func TestSideFileWhileTheOriginIsAMixture(t *testing.T) {
	errCut := errors.New("cut off")
	for n := 0; ; n++ {
		w, other, path := newWorld(t, 20, 8), newWorld(t, 20, 8), sideOrigin(t)
		before := string(w.origin.Bytes())
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
			if op.Kind == blocktest.Write && op.Device == "origin" {
				if s, err := merge.ReadSideFile(path); s == nil || err != nil {
					t.Fatalf("the origin is written to, and the side file is %v, %v", s, err)
				}
			}
			return nil
		}
		offline := func(origin, cow block.Device) error {
			s, err := merge.Begin(path, "cow", cow, nil, nil, false)
			if err != nil {
				return err
			}
			_, err = merge.Offline(t.Context(), origin, cow, merge.Options{Window: 4 * chunk,
				Completed: func() error { return s.End(path) }})
			return err
		}
		err := offline(blocktest.NewFaulty(w.origin, func(op blocktest.Op) error { op.Device = "origin"; return cut(op) }), blocktest.NewFaulty(w.cow, cut))
		half, readErr := merge.ReadSideFile(path)
		if readErr != nil {
			t.Fatal(readErr)
		}
		if err == nil {
			if half != nil || n < 10 {
				t.Fatalf("complete after %d operations: %v", n, half)
			}
			return
		}
		if !errors.Is(err, errCut) {
			t.Fatalf("cut after %d operations: %v", n, err)
		}
		if half == nil && string(w.origin.Bytes()) != before {
			t.Fatalf("cut after %d operations: a mixture without a side file", n)
		}
		if half != nil {
			if err := half.Check(other.cow); !errors.Is(err, merge.ErrUnfinished) {
				t.Fatalf("another store: %v", err)
			}
			if _, err := merge.Begin(path, "other", other.cow, nil, nil, false); !errors.Is(err, merge.ErrUnfinished) {
				t.Fatalf("another store: %v", err)
			}
		}
		if err := offline(w.origin, w.cow); err != nil {
			t.Fatalf("after a cut at operation %d: %v", n, err)
		}
		if half, err := merge.ReadSideFile(path); half != nil || err != nil {
			t.Fatalf("complete: %v, %v", half, err)
		}
		w.wantMerged(t)
	}
}

// TestOtherSnapshotWithoutAnID: a live merge is refused when another snapshot, which preserves what it overwrites, can't be given the id by which it
// is accepted afterwards. One that is lost has nothing to preserve.
func TestOtherSnapshotWithoutAnID(t *testing.T) {
	path, w := sideOrigin(t), newWorld(t, 20, 8)
	o := snapshot.NewOrigin(w.origin)
	s, err := o.Attach(w.cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	memory := block.NewMemory(w.cow.Size())
	faulty := blocktest.NewFaulty(memory, nil)
	if _, err := store.Create(memory, ondisk.Layout{ChunkSectors: 8}, false); err != nil {
		t.Fatal(err)
	}
	other, err := o.Attach(faulty, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	begin := func() error {
		m, err := s.BeginMergeAfter(func() error {
			_, err := merge.BeginLive(path, "cow", s, []*snapshot.Snapshot{other}, false)
			return err
		})
		if err == nil {
			err = m.Close()
		}
		return err
	}
	faulty.Set(blocktest.FailKind(blocktest.Read, syscall.EIO))
	if err := begin(); !errors.Is(err, syscall.EIO) {
		t.Errorf("its header can't be read: %v", err)
	}
	if half, err := merge.ReadSideFile(path); half != nil || err != nil {
		t.Errorf("its header can't be read: the side file is %v, %v", half, err)
	}
	faulty.Set(nil)
	if err := begin(); err != nil {
		t.Fatal(err)
	}
	half, err := merge.ReadSideFile(path)
	if err != nil || half == nil || half.Check(memory) != nil {
		t.Errorf("the other snapshot is not accepted: %v, %v", half, err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
}

// An origin that is no regular file has no side file. An undo store that the merge goes on without is known by the merged store.
func TestNoSideFileOfADevice(t *testing.T) {
	if s, err := merge.ReadSideFile("/dev/null"); s != nil || err != nil {
		t.Errorf("%v, %v", s, err)
	}
	w := newUndoWorld(t, rand.New(rand.NewPCG(1, 1)), 700, 8, 20, snapshot.Persistent)
	undo := w.undoStore(t)
	for _, kept := range []*merge.UndoStore{{Path: "undo", Device: undo}, nil} {
		if _, err := merge.Begin("/dev/null", "cow", w.cow, nil, kept, false); !errors.Is(err, merge.ErrNoSideFile) {
			t.Errorf("%v", err)
		}
		if err := merge.CheckUndo(w.origin, w.cow, undo); errors.Is(err, merge.ErrNotUndo) != (kept == nil) {
			t.Errorf("with the undo store %v: %v", kept, err)
		}
	}
}
