package store_test

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

func TestCounters(t *testing.T) {
	s, mem, _, _ := newStore(t, 8, 8192)
	if got := s.Counters(); got != (store.Counters{}) {
		t.Errorf("a new store: %+v", got)
	}
	for _, n := range []uint64{1, 3} {
		r, err := s.Reserve(ondisk.OriginChunk(10*n), n)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	c := s.Counters()
	if c.Exceptions != 4 || c.Syncs != 2 || c.Rounds.Count != 2 || c.Rounds.Total <= 0 || c.CopyWaits.Count != 0 {
		t.Errorf("after 4 exceptions and 2 syncs: %+v", c)
	}
	again := reopen(t, mem)
	if c := again.Counters(); c.Exceptions != 0 || c.Syncs != 0 || again.Len() != 4 {
		t.Errorf("a loaded store of %d exceptions: %+v", again.Len(), c)
	}
}

// TestCountersOfSyncsThatMeet has ten Syncs come while a flush is under way: they share rounds.
func TestCountersOfSyncsThatMeet(t *testing.T) {
	s, _, faults, _ := newStore(t, 8, 8192)
	hold := faults.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Flush })
	var all sync.WaitGroup
	for range 11 {
		all.Go(func() { s.Sync() })
	}
	for s.Counters().Syncs < 11 {
		runtime.Gosched()
	}
	hold.Release()
	all.Wait()
	if c := s.Counters(); c.Syncs != 11 || c.Rounds.Count < 2 || c.Rounds.Count == 11 {
		t.Errorf("11 Syncs, 10 of them during the first: %d in %d rounds", c.Syncs, c.Rounds.Count)
	}
}

// TestCountersOfCopyWaits has a Sync wait for an older reservation.
func TestCountersOfCopyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, _, _ := newStore(t, 8, 8192)
		older, err := s.Reserve(1, 1)
		if err != nil {
			t.Fatal(err)
		}
		newer, err := s.Reserve(2, 1)
		if err != nil {
			t.Fatal(err)
		}
		newer.Commit()
		done := make(chan error)
		go func() { done <- s.Sync() }()
		synctest.Wait()
		older.Commit()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if c := s.Counters(); c.CopyWaits.Count != 1 || c.Rounds.Count != 1 {
			t.Errorf("one Sync that waited for a copy: %+v", c)
		}
	})
}
