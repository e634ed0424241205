package kernel_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
)

// TestUndoStores: the kernel goes on with a merge for which dmsnap made an undo store, and the two still
// belong together; it shows the origin of before through the undo store, and merges it back.
func TestUndoStores(t *testing.T) {
	need(t)
	for seed := range rounds(t) {
		s := mergeCase(uint64(seed + 100))
		t.Run(fmt.Sprintf("seed=%d", s.seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(s.seed, 2))
			b, want := built(t, s)
			before := slices.Clone(b.disk)
			origin, cow := block.MemoryFrom(b.disk), block.MemoryFrom(b.cows[0])
			work, err := merge.Plan(origin, cow)
			if err != nil {
				t.Fatal(err)
			}
			undo := block.NewMemory(work.UndoBytes)
			if err := merge.WriteUndo(t.Context(), origin, cow, undo, merge.Options{}); err != nil {
				t.Fatal(err)
			}
			k := newKernel(t, sharedMachine(t))
			b.cows[0] = cow.Bytes()
			b = k.mergeTurn(s, b, 5+r.Int64N(60), want)
			t.Logf("the kernel left %d of %d exceptions", exceptionsLeft(t, b), work.Chunks)
			origin, cow = block.MemoryFrom(b.disk), block.MemoryFrom(b.cows[0])
			if err := merge.CheckUndo(origin, cow, undo); err != nil {
				t.Fatal(err)
			}
			_, err = merge.Offline(t.Context(), origin, cow, merge.Options{})
			if err := errors.Join(err, merge.CheckUndo(origin, cow, undo)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(origin.Bytes(), want) {
				t.Errorf("merged origin differs first at byte %d", firstDifference(origin.Bytes(), want))
			}

			back := s
			back.snaps = slices.Clone(s.snaps)
			back.snaps[0].cowSectors = undo.Size() / block.SectorSize
			b.disk, b.cows[0] = origin.Bytes(), undo.Bytes()
			for turns := 0; exceptionsLeft(t, b) > 0; turns++ {
				b = k.mergeTurn(back, b, 20+r.Int64N(200), before)
			}
			if !bytes.Equal(b.disk, before) {
				t.Errorf("what the kernel took back differs first at byte %d", firstDifference(b.disk, before))
			}
		})
	}
}
