package snapshot_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

func TestCounters(t *testing.T) {
	r, _, s := standard(t, 1024, 8192)
	write := func(dev interface {
		WriteAt(p []byte, off int64) (int, error)
	}, n, off int64) {
		t.Helper()
		if _, err := dev.WriteAt(make([]byte, n), off); err != nil {
			t.Fatal(err)
		}
	}
	write(r.origin, 512, 0)     // one chunk is copied
	write(r.origin, 512, 1024)  // the same: nothing
	write(r.origin, 8192, 6144) // three chunks
	c := s.Counters()
	if want := (snapshot.Copies{Chunks: 4, Bytes: 4 * 4096}); c.Preserved != want || c.Written != (snapshot.Copies{}) {
		t.Errorf("origin writes: preserved %+v, written %+v; want %+v, nothing", c.Preserved, c.Written, want)
	}
	if o := r.origin.Counters(); o.SyncWaits.Count != 2 || o.SyncWaits.Total <= 0 || o.WriteBacks != 0 {
		t.Errorf("two origin writes that waited for exceptions: %+v", o)
	}
	if c.Store.Exceptions != 4 || c.Store.Syncs != 2 || c.Store.Rounds.Count != 2 {
		t.Errorf("the store made %d exceptions in %d syncs, %d rounds; want 4 in 2, 2", c.Store.Exceptions, c.Store.Syncs, c.Store.Rounds.Count)
	}
	write(s, 4096, 40960) // a whole chunk: nothing is copied
	write(s, 1000, 49000) // a part of one
	write(s, 512, 49152)  // in place
	write(s, 512, 0)      // in place
	c = s.Counters()
	if want := (snapshot.Copies{Chunks: 3, Bytes: 2*4096 - 1000}); c.Written != want || c.Preserved.Chunks != 4 {
		t.Errorf("snapshot writes: written %+v, preserved %d; want %+v, 4", c.Written, c.Preserved.Chunks, want)
	}
	if c.OwnerWaits.Count != 0 || c.ReaderWaits.Count != 0 || c.NoRoom != 0 {
		t.Errorf("nobody waited, and there was space: %+v", c)
	}
	m, err := s.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	if c := s.Counters(); c.Written.Chunks != 3 || c.Store.Exceptions != 0 {
		t.Errorf("after its store was handed over: %+v", c)
	}
	if c := m.Counters(); c.Store.Exceptions != 7 || c.StepWaits.Count != 0 {
		t.Errorf("the merge has the store, with its counters: %+v", c)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestCountersOfWaits holds a read of the origin's device: an origin write waits for that reader, and a second one for
// the first one's chunk.
func TestCountersOfWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _, s := standard(t, 1024, 8192)
		hold := r.disk.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Read })
		go s.ReadAt(make([]byte, 512), 0)
		synctest.Wait()
		go r.origin.WriteAt(make([]byte, 512), 0)
		synctest.Wait()
		time.Sleep(time.Second)
		hold.Release()
		synctest.Wait()
		if c := s.Counters(); c.ReaderWaits.Count != 1 || c.ReaderWaits.Total < time.Second || c.OwnerWaits.Count != 0 {
			t.Errorf("one write waited a second for a reader: %+v, for owners %+v", c.ReaderWaits, c.OwnerWaits)
		}
		hold = r.disk.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Read })
		for range 2 {
			go s.WriteAt(make([]byte, 512), 8192)
			synctest.Wait()
		}
		hold.Release()
		synctest.Wait()
		if c := s.Counters(); c.OwnerWaits.Count != 1 || c.Written.Chunks != 1 {
			t.Errorf("the second of two writes to a chunk waited: %+v, chunks written %d", c.OwnerWaits, c.Written.Chunks)
		}
	})
}

func TestCountersOfNoRoomAndWriteBack(t *testing.T) {
	r := newRig(t, 1024, snapshot.WriteBack(1<<20, time.Hour))
	s := r.attach(r.cow("COW", 4*8), snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail})
	if _, err := r.origin.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if o := r.origin.Counters(); o.WriteBacks != 1 || o.SyncWaits.Count != 0 {
		t.Errorf("one write in memory: %+v", o)
	}
	if err := r.origin.Flush(); err != nil {
		t.Fatal(err)
	}
	if o := r.origin.Counters(); o.WriteBacks != 1 || o.SyncWaits.Count != 1 {
		t.Errorf("one write that was written out: %+v", o)
	}
	for range 3 {
		if _, err := r.origin.WriteAt(make([]byte, 3*4096), 8192); err == nil {
			t.Fatal("three chunks fit into a COW device of two")
		}
	}
	if c := s.Counters(); c.NoRoom != 3 {
		t.Errorf("three writes without space: %+v", c)
	}
}
