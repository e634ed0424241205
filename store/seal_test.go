package store_test

import (
	"errors"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// TestSeal: a sealed store shows what it did, and takes nothing more, also after it was opened again. The mark of an
// invalid store keeps the label.
func TestSeal(t *testing.T) {
	s, mem, _, _ := newStore(t, 8, 1024)
	add(t, s, 7, 3)
	refused := func(s *store.Store) {
		t.Helper()
		if _, err := s.Reserve(100, 1); !errors.Is(err, ondisk.ErrSealed) {
			t.Errorf("reserve: %v", err)
		}
		if _, err := s.Last(1); !errors.Is(err, ondisk.ErrSealed) {
			t.Errorf("last of a merge: %v", err)
		}
		if s.Len() != 3 || !s.Sealed() || s.Err() != nil {
			t.Errorf("%d exceptions, sealed %v, %v", s.Len(), s.Sealed(), s.Err())
		}
	}
	if s.Sealed() || store.CheckUnsealed(mem) != nil {
		t.Error("sealed before it was")
	}
	for range 2 {
		if err := s.Seal(); err != nil {
			t.Fatal(err)
		}
	}
	mustSync(t, s)
	refused(s)
	refused(reopen(t, mem))
	if err := store.CheckUnsealed(mem); !errors.Is(err, ondisk.ErrSealed) {
		t.Errorf("device: %v", err)
	}
	again := reopen(t, mem)
	if err := again.Invalidate(errDisk); err != nil {
		t.Fatal(err)
	}
	if again = reopen(t, mem); !again.Sealed() || !errors.Is(again.Err(), store.ErrInvalid) {
		t.Errorf("invalid: sealed %v, %v", again.Sealed(), again.Err())
	}
	if err := again.Seal(); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("seal of an invalid store: %v", err)
	}
	if err := store.NewTransient(block.NewMemory(1<<20), ondisk.Layout{ChunkSectors: 8}).Seal(); !errors.Is(err, store.ErrNoMerge) {
		t.Errorf("seal of a transient store: %v", err)
	}
}
