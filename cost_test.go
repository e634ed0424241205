package dmsnap_test

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// What offline tasks read of a sparse disk of 16 TiB is bounded by its data and its store, not by its size.
func TestCostOfOfflineTasks(t *testing.T) {
	const size, writes, piece = 16 << 40, 50, 64 << 10
	origin, cow := block.NewMemory(size), block.NewMemory(64<<20)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(writes) {
		if _, err := s.WriteAt(blocktest.Pattern(piece, uint64(i)), i*(size/writes)&^4095); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var log blocktest.Log
	o, c := log.Record("origin", origin), log.Record("COW", cow)
	for name, task := range map[string]struct {
		most int64 // bytes read
		do   func() error
	}{
		"probe":         {1 << 20, func() error { _, err := image.Probe(o); return err }},
		"check":         {1 << 20, func() error { _, err := check.Run(t.Context(), c, check.Options{Origin: o}); return err }},
		"merge dry run": {1 << 20, func() error { _, err := merge.Plan(o, c); return err }},
		"export": {writes*piece + 1<<20, func() error {
			st, err := store.OpenToRead(c)
			if err != nil {
				return err
			}
			v, err := store.NewView(o, st)
			if err != nil {
				return err
			}
			return block.Copy(block.NewMemory(size), 0, v, 0, size, block.IntoZeros, nil)
		}},
		"compact": {3*writes*piece + 1<<20, // both views to compare them, and once more to copy
			func() error {
				p, err := compact.NewPlan(t.Context(), c, compact.Options{Origin: o, DropUnchanged: true})
				if err != nil {
					return err
				}
				_, err = p.Write(t.Context(), block.NewMemory(p.Size()))
				return err
			}},
	} {
		log.Clear()
		if err := task.do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		read, calls := int64(0), 0
		for _, op := range log.Ops() {
			if op.Kind == blocktest.Read {
				read, calls = read+op.Len, calls+1
			}
		}
		if read > task.most || calls > 40*writes {
			t.Errorf("%s: %d bytes in %d reads", name, read, calls)
		}
	}
}
