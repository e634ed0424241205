package compact_test

import (
	"math/rand/v2"
	"os"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// A world is an origin and a store that was written to at random.
type world struct {
	origin *block.Memory
	cow    *block.Memory
	view   []byte // what the snapshot shows
}

// A past says what happened to a world's store.
type past struct {
	sectors    uint32 // of a chunk
	kind       snapshot.StoreType
	holes      bool // slots that were taken out, chunks that leaked
	halfMerged bool
	disk       int64 // bytes
}

// newWorld makes a store with zeros, data, and chunks that were written with what they held.
func newWorld(t *testing.T, r *rand.Rand, p past) world {
	t.Helper()
	w := world{origin: block.MemoryFrom(blocktest.Pattern(int(p.disk), r.Uint64()))}
	l := ondisk.Layout{ChunkSectors: p.sectors}
	w.cow = block.NewMemory(2 * int64(l.ChunksNeeded(l.Chunks(p.disk, true))) * l.ChunkBytes()) // there may be holes
	o := snapshot.NewOrigin(w.origin)
	s, err := o.Attach(w.cow, snapshot.Options{Store: p.kind, ChunkSectors: p.sectors})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 + r.IntN(60) {
		n := 512 * (1 + r.Int64N(24))
		off := 512 * r.Int64N(p.disk/512)
		n = min(n, p.disk-off)
		b := blocktest.Pattern(int(n), r.Uint64())
		switch r.IntN(4) {
		case 0:
			clear(b)
		case 1: // the same bytes again
			if _, err := s.ReadAt(b, off); err != nil {
				t.Fatal(err)
			}
		case 2: // the origin changes, the snapshot keeps
			if _, err := o.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if _, err := s.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	if p.halfMerged {
		mergeHalf(t, r, s)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if p.holes {
		takeOut(t, r, w.cow)
	}
	w.view = shown(t, w.origin, w.cow)
	return w
}

// mergeHalf makes some steps of a merge and leaves it there.
func mergeHalf(t *testing.T, r *rand.Rand, s *snapshot.Snapshot) {
	t.Helper()
	m, err := s.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	for range 1 + r.IntN(4) {
		if _, err := m.Step(1 + r.Uint64N(3)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// takeOut leaves out a third of the slots, so that their chunks are holes, and shuffles the rest.
func takeOut(t *testing.T, r *rand.Rand, cow *block.Memory) {
	t.Helper()
	h, err := store.ReadHeader(cow)
	if err != nil {
		t.Fatal(err)
	}
	l := ondisk.Layout{ChunkSectors: h.ChunkSectors}
	var kept []ondisk.Exception
	areas := uint64(0)
	for e, err := range store.Scan(cow, l) {
		if err != nil {
			t.Fatal(err)
		}
		areas = e.Slot.Area + 1
		if !e.IsEnd() && r.IntN(3) > 0 {
			kept = append(kept, e.Exception)
		}
	}
	r.Shuffle(len(kept), func(i, j int) { kept[i], kept[j] = kept[j], kept[i] })
	for k := range areas {
		if err := block.Zero(cow, l.COWOffset(l.AreaChunk(k)), l.ChunkBytes(), 0); err != nil {
			t.Fatal(err)
		}
	}
	for n, e := range kept {
		var b [ondisk.SlotSize]byte
		e.Encode(b[:])
		if _, err := cow.WriteAt(b[:], l.SlotOffset(ondisk.Slot{Area: uint64(n) / l.SlotsPerArea(), Index: uint64(n) % l.SlotsPerArea()})); err != nil {
			t.Fatal(err)
		}
	}
}

// shown is what a snapshot shows through the engine. It changes neither side.
func shown(t *testing.T, origin, cow block.Device) []byte {
	t.Helper()
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, s.Size())
	if _, err := s.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return b
}

// made compacts cow into memory that held something else before.
func made(t *testing.T, cow block.Device, o compact.Options) (*block.Memory, compact.Result) {
	t.Helper()
	p, err := compact.NewPlan(t.Context(), cow, o)
	if err != nil {
		t.Fatal(err)
	}
	out := block.MemoryFrom(blocktest.Pattern(int(p.Size()), 5))
	res, err := p.Write(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	return out, res
}

// wantClean wants check to find nothing.
func wantClean(t *testing.T, cow, origin block.Device) *check.Report {
	t.Helper()
	r, err := check.Run(t.Context(), cow, check.Options{Origin: origin})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Clean() {
		t.Errorf("check finds %v", r.Findings)
	}
	return r
}

// wantDense wants the chunks of the store to ascend with the origin's, without a hole.
func wantDense(t *testing.T, cow block.Device) *store.Store {
	t.Helper()
	st, err := store.Open(cow)
	if err != nil {
		t.Fatal(err)
	}
	n := uint64(0)
	for r := range st.Exceptions() {
		for i := range r.Count {
			if want := st.Layout().DataChunk(n); r.New+ondisk.COWChunk(i) != want {
				t.Fatalf("origin chunk %d is in chunk %d, not %d", r.Old+ondisk.OriginChunk(i), r.New+ondisk.COWChunk(i), want)
			}
			n++
		}
	}
	return st
}
