package snapshot_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// failOnce fails the first operation of a kind, counted from now.
func failOnce(kind blocktest.Kind, err error) blocktest.Decide {
	failed := false
	return func(op blocktest.Op) error {
		if op.Kind == kind && !failed {
			failed = true
			return err
		}
		return nil
	}
}

// failChanges fails everything that changes a device, and its flushes.
func failChanges(op blocktest.Op) error {
	if op.Kind.Changes() || op.Kind == blocktest.Flush {
		return errDisk
	}
	return nil
}

// TestAFailedFlushMarksTheSnapshot: one failed flush of a COW device while an origin write is preserved, under each
// policy: the mark is on the COW device before the origin changes.
func TestAFailedFlushMarksTheSnapshot(t *testing.T) {
	for _, policy := range []snapshot.FullPolicy{snapshot.FullInvalidate, snapshot.FullFail, snapshot.FullPause} {
		r := newRig(t, 1024)
		c := r.cow("COW", 1024)
		s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: policy})
		write(t, s, 100, 1, 7)
		flush(t, s)
		c.faults.Set(failOnce(blocktest.Flush, errDisk))
		r.log.Clear()
		write(t, r.origin, 0, 8, 1)
		ops := r.ops()
		mark, change := strings.LastIndex(ops, "COW "), strings.Index(ops, "ORIGIN W 0+8")
		if mark < 0 || change < mark {
			t.Errorf("policy %d: the origin changed before the last operation on the COW device:\n%s", policy, ops)
		}
		wantHeader(t, c, headerInvalid)
		wantStatus(t, s, "Invalid")
		if err := s.Failure(); !errors.Is(err, errDisk) || errors.Is(err, snapshot.ErrUnmarked) {
			t.Errorf("policy %d: failure %v", policy, err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("policy %d: close: %v", policy, err)
		}
	}
}

// unmarkable is a snapshot with a durable exception at sector 80, whose COW device then takes no changes any more and
// which an origin write to sector 0 has needed.
func unmarkable(t *testing.T, policy snapshot.FullPolicy) (*rig, *cow, *snapshot.Snapshot, error) {
	r := newRig(t, 1024)
	c := r.cow("COW", 1024)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: policy})
	write(t, r.origin, 80, 1, 1)
	c.faults.Set(failChanges)
	_, err := r.origin.WriteAt(fill(8, 2), 0)
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerValid)
	if st := s.Status(); !st.Unmarked || !errors.Is(st.Err, errDisk) || !errors.Is(s.Failure(), snapshot.ErrUnmarked) {
		t.Errorf("unmarked %v, err %v, failure %v", st.Unmarked, st.Err, s.Failure())
	}
	return r, c, s, err
}

// TestUnmarkedUnderTheKernelsPolicy: an origin write never fails because a snapshot failed, even where that can't be
// marked. The mark is tried again when the snapshot is closed.
func TestUnmarkedUnderTheKernelsPolicy(t *testing.T) {
	for _, whole := range []bool{false, true} {
		r, c, s, err := unmarkable(t, snapshot.FullInvalidate)
		if err != nil {
			t.Fatalf("the origin write: %v", err)
		}
		write(t, r.origin, 200, 8, 3)
		if whole {
			c.faults.Set(nil)
		}
		err = s.Close()
		if whole {
			if err != nil {
				t.Errorf("close: %v", err)
			}
			wantHeader(t, c, headerInvalid)
		} else if !errors.Is(err, snapshot.ErrUnmarked) || !errors.Is(err, errDisk) {
			t.Errorf("close: %v", err)
		}
	}
}

// TestUnmarkedRefusesOriginWrites: where the snapshot is to be protected, origin writes that need it fail until it is
// marked or closed, and leave the origin as it is. Those that don't need it go on.
func TestUnmarkedRefusesOriginWrites(t *testing.T) {
	for _, policy := range []snapshot.FullPolicy{snapshot.FullFail, snapshot.FullPause} {
		r, c, s, err := unmarkable(t, policy)
		for range 2 {
			if !errors.Is(err, snapshot.ErrUnmarked) || !errors.Is(err, errDisk) {
				t.Fatalf("policy %d: the origin write: %v", policy, err)
			}
			if !bytes.Equal(r.memory.Bytes()[:8*sector], r.before[:8*sector]) {
				t.Fatalf("policy %d: the origin changed", policy)
			}
			err = fails(t, r.origin, 0, 8)
		}
		write(t, r.origin, 80, 8, 4) // its exception is durable
		if _, err := s.ReadAt(make([]byte, sector), 0); !isInvalid(err) {
			t.Errorf("policy %d: a read of the snapshot: %v", policy, err)
		}
		if policy == snapshot.FullFail {
			c.faults.Set(nil)
			write(t, r.origin, 0, 8, 5)
			wantHeader(t, c, headerInvalid)
			if s.Status().Unmarked {
				t.Error("the status still says that the mark is missing")
			}
			var kinds []snapshot.EventKind
			for _, e := range r.events {
				kinds = append(kinds, e.Kind)
			}
			if want := []snapshot.EventKind{snapshot.EventInvalid, snapshot.EventNotice}; !slices.Equal(kinds, want) {
				t.Errorf("events %v, want %v", kinds, want)
			}
			continue
		}
		if err := s.Close(); !errors.Is(err, snapshot.ErrUnmarked) {
			t.Errorf("close: %v", err)
		}
		write(t, r.origin, 0, 8, 5)
	}
}

// TestAFailedStoreShows: a store that found no space for its slots refuses writes and is protected; its status says so.
func TestAFailedStoreShows(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 1024)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail})
	c.faults.Set(noSpaceFor(8, 8))
	if err := fails(t, r.origin, 0, 8); !errors.Is(err, snapshot.ErrNoRoom) {
		t.Fatalf("the origin write: %v", err)
	}
	if st := s.Status(); st.State != snapshot.StateFailed || st.Err == nil {
		t.Errorf("state %s, %v", st.State, st.Err)
	}
	wantRead(t, s, 0, r.old(0, 8))
	wantHeader(t, c, headerValid)
}

// noSpaceFor fails writes to some sectors for want of space.
func noSpaceFor(from, n int64) blocktest.Decide {
	return func(op blocktest.Op) error {
		if op.Kind == blocktest.Write && op.Overlaps(from*sector, n*sector) {
			return syscall.ENOSPC
		}
		return nil
	}
}
