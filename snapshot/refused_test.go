package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// TestMergeOfASnapshotThatIsLostMeanwhile: when a merge begins, what is in memory of the origin is written out, for which the snapshot's exceptions
// must be durable. They can't be, so the snapshot is lost, and the merge is refused: the origin would show itself, where its clients expect the
// snapshot's content. Another snapshot can be merged.
func TestMergeOfASnapshotThatIsLostMeanwhile(t *testing.T) {
	for _, begin := range []func(s *snapshot.Snapshot) (*snapshot.Merging, error){
		(*snapshot.Snapshot).BeginMerge,
		func(s *snapshot.Snapshot) (*snapshot.Merging, error) {
			return s.BeginMergeAfter(func() error { return nil })
		},
	} {
		r := newRig(t, 1024, snapshot.WriteBack(1<<20, time.Hour))
		c := r.cow("COW", 2048)
		s, other := r.attach(c, snapshot.Options{ChunkSectors: 8}), r.attach(r.cow("OTHER", 2048), snapshot.Options{ChunkSectors: 8})
		write(t, s, 0, 8, 7)
		write(t, other, 0, 8, 5)
		write(t, r.origin, 64, 8, 9) // stays in memory
		failed := false
		c.faults.Set(func(op blocktest.Op) error { // once: the snapshot can be marked invalid
			if op.Kind != blocktest.Flush || failed {
				return nil
			}
			failed = true
			return syscall.EIO
		})
		if m, err := begin(s); !errors.Is(err, store.ErrInvalid) || m != nil {
			t.Fatalf("merge of a snapshot whose flush failed: %v", err)
		}
		c.faults.Set(nil)
		wantRead(t, r.origin, 0, r.old(0, 8))
		wantRead(t, r.origin, 64, fill(8, 9))
		if _, err := s.ReadAt(make([]byte, 512), 0); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("a read of the snapshot: %v", err)
		}
		m, err := other.BeginMerge()
		if err != nil {
			t.Fatal(err)
		}
		wantRead(t, r.origin, 0, fill(8, 5))
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRefusedMergeChangesNothing: origin writes that are in memory can't be written out, so a merge is refused. The snapshot is not
// left suspended for the same reason, and the merge is possible as soon as there is space again.
func TestRefusedMergeChangesNothing(t *testing.T) {
	for _, suspended := range []bool{false, true} {
		r := newRig(t, 1024, snapshot.WriteBack(1<<20, time.Hour))
		s := r.attach(r.cow("COW", 2048), snapshot.Options{ChunkSectors: 8})
		write(t, s, 0, 8, 7)
		write(t, r.origin, 64, 8, 9) // stays in memory
		r.disk.Set(blocktest.FailKind(blocktest.Write, syscall.ENOSPC))
		if suspended {
			if err := s.Suspend(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.BeginMerge(); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("merge of a snapshot whose origin has no space: %v", err)
		}
		if suspended {
			done := make(chan struct{})
			go func() { defer close(done); s.Flush() }()
			select {
			case <-done:
				t.Error("the snapshot was resumed, although it was suspended before the refused merge")
			case <-time.After(10 * time.Millisecond):
			}
			if err := s.Resume(); err != nil {
				t.Fatal(err)
			}
			<-done
		}
		wantRead(t, s, 0, fill(8, 7))
		wantRead(t, s, 64, r.old(64, 8))
		write(t, s, 128, 8, 8)
		if err := s.Flush(); err != nil {
			t.Error(err)
		}
		wantStatus(t, s, "40/2048 16")
		r.disk.Set(nil)
		m := r.merging(s)
		finish(t, m)
		wantRead(t, r.origin, 0, fill(8, 7))
	}
}

// TestStepsReturnWithoutRoom: a step that would wait for space elsewhere returns, changes nothing, and says when to try
// again.
func TestStepsReturnWithoutRoom(t *testing.T) {
	r := newRig(t, 1024)
	main := r.attach(r.cow("COW", 1024), snapshot.Options{ChunkSectors: 8})
	c := r.cow("OTHER", 16)
	r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullPause})
	write(t, main, 64, 8, 1)
	m := r.merging(main)
	n, err := m.Step(1)
	if n != 0 || !errors.Is(err, snapshot.ErrNoRoom) || errors.Is(err, snapshot.ErrMergeFailed) {
		t.Fatalf("step: %d, %v", n, err)
	}
	wantStatus(t, m, "24/1024 16")
	changed := block.CanRetry(err)
	if changed == nil {
		t.Fatalf("step: %v is not to be waited for", err)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := block.AwaitRetry(ctx, changed); err != cause {
		t.Errorf("the wait ended with %v", err)
	}
	if err := c.memory.Grow(1024 * sector); err != nil {
		t.Fatal(err)
	}
	r.origin.RetryPaused()
	<-changed
	finish(t, m)
}

// TestNoSnapshotDuringAMerge: the origin's disk is a mixture until the merge is complete, so nothing is attached to it,
// and the COW device stays untouched.
func TestNoSnapshotDuringAMerge(t *testing.T) {
	r, _, s := standard(t, 1024, 1024)
	write(t, s, 0, 8, 1)
	other := r.attach(r.cow("OTHER", 1024), snapshot.Options{ChunkSectors: 8})
	early, err := r.origin.Load(r.cow("EARLY", 1024).dev, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	m := r.merging(s)
	late := block.NewMemory(1 << 20)
	if _, err := r.origin.Attach(late, snapshot.Options{ChunkSectors: 8}); !errors.Is(err, snapshot.ErrAlreadyMerging) {
		t.Errorf("attach: %v", err)
	}
	if !bytes.Equal(late.Bytes(), make([]byte, 1<<20)) {
		t.Error("the refused COW device was written to")
	}
	if err := early.Resume(); !errors.Is(err, snapshot.ErrAlreadyMerging) {
		t.Errorf("resume of a snapshot that was loaded before: %v", err)
	}
	// What was active before can be suspended, resumed, and handed over.
	if err := errors.Join(other.Suspend(), other.Resume()); err != nil {
		t.Error(err)
	}
	finish(t, m)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(early.Resume(), early.Close()); err != nil {
		t.Errorf("after the merge: %v", err)
	}
}
