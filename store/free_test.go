package store_test

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// TestFree: what Free says can be reserved, and no more, in stores of every small size that were used and in part merged.
func TestFree(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 1))
	for sectors := uint32(1); sectors <= 4; sectors *= 2 {
		l := ondisk.Layout{ChunkSectors: sectors}
		for chunks := int64(2); chunks < 3*int64(l.SlotsPerArea())+9; chunks++ {
			dev := block.NewMemory(chunks*l.ChunkBytes() + 100)
			st, err := store.Create(dev, l, false)
			if err != nil {
				t.Fatal(err)
			}
			fill(t, st, r.Uint64N(uint64(chunks)), 0)
			if err := st.Sync(); err != nil {
				t.Fatal(err)
			}
			if n := r.Uint64N(st.Len() + 1); n > 0 {
				last, err := st.Last(n)
				if err == nil {
					err = st.DropLast(last)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if r.IntN(2) == 0 {
				if st, err = store.Open(dev); err != nil {
					t.Fatal(err)
				}
			}
			want, had := st.Free(), st.Len()
			if got := fill(t, st, 1<<40, 1<<20); got != want {
				t.Fatalf("%d chunks of %d sectors, %d exceptions: Free says %d, %d were reserved", chunks, sectors, had, want, got)
			}
			if err := st.Sync(); err != nil {
				t.Fatal(err)
			}
			if again, err := store.Open(dev); err != nil || again.Err() != nil || again.Len() != had+want {
				t.Fatalf("%d chunks of %d sectors: %v, %v", chunks, sectors, again, err)
			}
		}
	}
}

// fill adds at most n exceptions, for the chunks from first on, until the store is full.
func fill(t *testing.T, st *store.Store, n uint64, first ondisk.OriginChunk) (added uint64) {
	t.Helper()
	for added < n {
		res, err := st.Reserve(first+ondisk.OriginChunk(added), 1+n%7)
		if errors.Is(err, store.ErrFull) {
			return added
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := res.Commit(); err != nil {
			t.Fatal(err)
		}
		added += res.Count
	}
	return added
}
