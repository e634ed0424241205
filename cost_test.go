package dmsnap_test

import (
	"io"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/dump"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/rescue"
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
		// list, map and status load the store and ask its exceptions.
		"list, map, status": {1 << 20, func() error {
			st, err := store.OpenToRead(c)
			if err != nil {
				return err
			}
			runs := 0
			for range st.Exceptions() {
				runs++
			}
			if runs != writes {
				t.Errorf("%d runs", runs)
			}
			return st.Err()
		}},
		"diff": {1 << 20, func() error {
			d, err := differences(o, c)
			if err != nil {
				return err
			}
			n := 0
			for range d.Extents() {
				n++
			}
			if n != writes {
				t.Errorf("diff: %d extents", n)
			}
			return nil
		}},
		"diff, verified": {2*writes*piece + 1<<20, // both sides
			func() error {
				d, err := differences(o, c)
				if err != nil {
					return err
				}
				for _, err := range d.Verified(t.Context()) {
					if err != nil {
						return err
					}
				}
				return nil
			}},
		"dump":          {1 << 20, func() error { return dump.Text(t.Context(), io.Discard, c, dump.Options{}) }},
		"dump, as JSON": {1 << 20, func() error { return dump.JSON(t.Context(), io.Discard, c, dump.Options{}) }},
		"dump, packed":  {1 << 20, func() error { return dump.Pack(t.Context(), io.Discard, c, dump.Options{}) }},
		"dump with data": {writes*piece + 1<<20, func() error {
			return dump.Text(t.Context(), io.Discard, c, dump.Options{Data: true})
		}},
		"repair": {writes*piece + 1<<20, func() error {
			p, err := repair.NewPlan(t.Context(), c, repair.Options{})
			if err != nil {
				return err
			}
			return p.Fresh(t.Context(), block.NewMemory(p.Size()))
		}},
		"repair in place": {1 << 20, func() error {
			p, err := repair.NewPlan(t.Context(), c, repair.Options{})
			if err != nil {
				return err
			}
			changed, err := p.InPlace(t.Context(), nil)
			if changed {
				t.Error("repair: a sound store was changed")
			}
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

func differences(origin, cow block.Device) (*diff.Diff, error) {
	st, err := store.OpenToRead(cow)
	if err != nil {
		return nil, err
	}
	return diff.New(origin, st)
}

// Nor is a hole in a stored chunk read when it is copied.
func TestHolesOfChunksAreNotRead(t *testing.T) {
	const chunk, count = 16 << 20, 64
	origin, cow := block.NewMemory(count*chunk), block.NewMemory((count+10)*chunk)
	st, err := store.Create(cow, ondisk.Layout{ChunkSectors: chunk / 512}, false)
	if err != nil {
		t.Fatal(err)
	}
	for i := range ondisk.OriginChunk(count) {
		r, err := st.Reserve(i, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cow.WriteAt(blocktest.Pattern(4096, uint64(i)), st.Layout().COWOffset(r.New)+chunk/2); err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Sync(); err != nil {
		t.Fatal(err)
	}
	var log blocktest.Log
	o, c := log.Record("origin", origin), log.Record("COW", cow)
	tasks := map[string]func() error{
		"export": func() error {
			v, err := store.NewView(o, st)
			if err != nil {
				return err
			}
			return block.Copy(block.NewMemory(count*chunk), 0, v, 0, count*chunk, block.IntoZeros, nil)
		},
		"rescue": func() error {
			r, err := rescue.Open(t.Context(), o, c, rescue.Options{})
			if err != nil {
				return err
			}
			_, err = r.Write(t.Context(), block.NewMemory(count*chunk), nil)
			return err
		},
		"compact": func() error {
			p, err := compact.NewPlan(t.Context(), c, compact.Options{Origin: o})
			if err != nil {
				return err
			}
			dst := block.NewMemory(p.Size())
			if _, err := p.Write(t.Context(), dst); err != nil {
				return err
			}
			if dst.Allocated() > count*8192 {
				t.Errorf("compact: %d bytes of space", dst.Allocated())
			}
			return nil
		},
		"repair": func() error {
			p, err := repair.NewPlan(t.Context(), c, repair.Options{})
			if err != nil {
				return err
			}
			return p.Fresh(t.Context(), block.NewMemory(p.Size()))
		},
		"merge": func() error { // the last: the store is empty after it
			_, err := merge.Offline(t.Context(), block.NewMemory(count*chunk), c, merge.Options{})
			return err
		},
	}
	for _, name := range []string{"export", "rescue", "compact", "repair", "merge"} {
		log.Clear()
		if err := tasks[name](); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		read := int64(0)
		for _, op := range log.Ops() {
			if op.Kind == blocktest.Read {
				read += op.Len
			}
		}
		if read > 2*chunk+count*8192 { // the area is as large as a chunk
			t.Errorf("%s: %d bytes read", name, read)
		}
	}
}
