package snapshot_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
)

// The tests of this file are for the race detector, and for what only shows when many do things at once. Each
// writer has sectors of its own on each device and knows what they hold; neighbours share chunks.

// A writer writes to its sectors of one device: those whose number modulo the writers is its own.
type writer struct {
	dev     block.Device
	sectors []int64
	content map[int64]byte // what was written last; missing: nothing
	rnd     *rand.Rand
}

// some makes n requests.
func (w *writer) some(n int) error {
	for range n {
		at := w.sectors[w.rnd.IntN(len(w.sectors))]
		x := byte(w.rnd.IntN(256))
		var err error
		switch w.rnd.IntN(8) {
		case 0:
			x, err = 0, block.Zero(w.dev, at*sector, sector, 0)
		case 1:
			err = block.WriteDurable(w.dev, fill(1, x), at*sector)
		case 2:
			err = w.dev.Flush()
			x = w.content[at]
			if _, there := w.content[at]; !there {
				continue
			}
		case 3:
			b := make([]byte, sector)
			_, err = w.dev.ReadAt(b, at*sector)
			if want, there := w.content[at]; err == nil && there && !bytes.Equal(b, fill(1, want)) {
				return fmt.Errorf("sector %d reads %x, wrote %x", at, b[0], want)
			}
			continue
		default:
			_, err = w.dev.WriteAt(fill(1, x), at*sector)
		}
		if err != nil {
			return err
		}
		w.content[at] = x
	}
	return nil
}

// writers are k writers of one device.
func writers(dev block.Device, k int, seed uint64) (ws []*writer) {
	for i := range k {
		w := &writer{dev: dev, content: make(map[int64]byte), rnd: rand.New(rand.NewPCG(seed, uint64(i)))}
		for at := int64(i); at < dev.Size()/sector; at += int64(k) {
			w.sectors = append(w.sectors, at)
		}
		ws = append(ws, w)
	}
	return ws
}

// overlay puts what the writers wrote over a content.
func overlay(content []byte, ws []*writer) []byte {
	b := bytes.Clone(content)
	for _, w := range ws {
		for at, x := range w.content {
			copy(b[at*sector:], fill(1, x))
		}
	}
	return b
}

func TestStressMergeUnderLoad(t *testing.T) {
	for _, seed := range seeds(t, 6) {
		rnd := rand.New(rand.NewPCG(seed, 9))
		r := newRig(t, 300+rnd.Int64N(300))
		main := r.attach(r.cow("MAIN", 8192), snapshot.Options{ChunkSectors: 1 << rnd.IntN(6)})
		var others []*snapshot.Snapshot
		for i := range 3 {
			others = append(others, r.attach(r.cow(fmt.Sprint("OTHER", i), 8192), snapshot.Options{ChunkSectors: 1 << rnd.IntN(6), Sync: snapshot.SyncMode(i % 2)}))
		}
		prepare := writers(main, 1, seed)
		if err := prepare[0].some(200); err != nil {
			t.Fatal(err)
		}
		shown := readAll(t, main)
		m := r.merging(main)

		all := [][]*writer{writers(r.origin, 3, seed+100)}
		for i, s := range others {
			all = append(all, writers(s, 2, seed+uint64(i)+200))
		}
		var load sync.WaitGroup
		for _, ws := range all {
			for _, w := range ws {
				load.Go(func() {
					if err := w.some(150); err != nil {
						t.Errorf("seed %d: %v", seed, err)
					}
				})
			}
		}
		load.Go(func() { // somebody who looks at everything meanwhile
			for range 20 {
				m.Status()
				others[0].Status()
				others[1].Changed(0, others[1].Size())
				r.origin.Extents(0, r.origin.Size())
			}
		})
		for {
			n, err := m.Step(uint64(rnd.IntN(9)))
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if n == 0 {
				break
			}
		}
		load.Wait()
		want := overlay(shown, all[0])
		if got := r.memory.Bytes(); !bytes.Equal(got, want) {
			t.Errorf("seed %d: the merged origin differs in sector %d", seed, firstDifference(got, want)/sector)
		}
		for i, s := range others {
			if got, want := readAll(t, s), overlay(r.before, all[i+1]); !bytes.Equal(got, want) {
				t.Errorf("seed %d: snapshot %d differs in sector %d", seed, i, firstDifference(got, want)/sector)
			}
		}
	}
}

func TestStressAttachAndDetachUnderLoad(t *testing.T) {
	for _, seed := range seeds(t, 3) {
		r := newRig(t, 400)
		stay := r.attach(r.cow("STAY", 8192), snapshot.Options{ChunkSectors: 8})
		ws := writers(r.origin, 4, seed)
		ss := writers(stay, 2, seed+50)
		var load sync.WaitGroup
		var ended atomic.Bool
		for _, w := range append(append([]*writer(nil), ws...), ss...) {
			load.Go(func() {
				for !ended.Load() {
					if err := w.some(20); err != nil {
						t.Errorf("seed %d: %v", seed, err)
						return
					}
				}
			})
		}
		// Snapshots come and go, in turn handed over, and show one moment for as long as they live.
		for i := range 20 {
			memory := block.NewMemory(8192 * sector)
			o := snapshot.Options{ChunkSectors: 1 << (i % 6), Store: snapshot.StoreType(i % 3)}
			s, err := r.origin.Attach(memory, o)
			if err != nil {
				t.Fatal(err)
			}
			shown := readAll(t, s)
			if i%2 == 0 {
				next, err := r.origin.Load(memory, o)
				if err != nil {
					t.Fatal(err)
				}
				suspend(t, s)
				resume(t, next)
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s = next
			}
			if got := readAll(t, s); !bytes.Equal(got, shown) {
				t.Errorf("seed %d: snapshot %d changed in sector %d", seed, i, firstDifference(got, shown)/sector)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if o.Store != snapshot.Transient {
				checkStore(t, memory)
			}
		}
		ended.Store(true)
		load.Wait()
		if got, want := r.memory.Bytes(), overlay(r.before, ws); !bytes.Equal(got, want) {
			t.Errorf("seed %d: the origin differs in sector %d", seed, firstDifference(got, want)/sector)
		}
		if got, want := readAll(t, stay), overlay(r.before, ss); !bytes.Equal(got, want) {
			t.Errorf("seed %d: the snapshot differs in sector %d", seed, firstDifference(got, want)/sector)
		}
	}
}

func TestStressOneChunk(t *testing.T) {
	// Everybody in the same two chunks: gates, copies and the sync of one store.
	for _, seed := range seeds(t, 20) {
		r := newRig(t, 16)
		s := r.attach(r.cow("COW", 64), snapshot.Options{ChunkSectors: 8, Sync: snapshot.SyncMode(seed % 2)})
		ws, os := writers(s, 4, seed), writers(r.origin, 4, seed+1)
		var load sync.WaitGroup
		for _, w := range append(append([]*writer(nil), ws...), os...) {
			load.Go(func() {
				if err := w.some(30); err != nil {
					t.Errorf("seed %d: %v", seed, err)
				}
			})
		}
		load.Wait()
		if got, want := readAll(t, s), overlay(r.before, ws); !bytes.Equal(got, want) {
			t.Errorf("seed %d: the snapshot differs in sector %d", seed, firstDifference(got, want)/sector)
		}
		if got, want := r.memory.Bytes(), overlay(r.before, os); !bytes.Equal(got, want) {
			t.Errorf("seed %d: the origin differs in sector %d", seed, firstDifference(got, want)/sector)
		}
	}
}
