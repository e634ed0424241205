package compact_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// unusedSectors says of each sector of a COW device whether nothing needs it: worked out slot by slot and
// chunk by chunk.
func unusedSectors(t *testing.T, cow block.Device) []bool {
	t.Helper()
	st, err := store.Open(cow)
	if err != nil {
		t.Fatal(err)
	}
	l := st.Layout()
	used := map[ondisk.COWChunk]bool{0: true}
	for k := range st.Len()/l.SlotsPerArea() + 1 {
		used[l.AreaChunk(k)] = true
	}
	for r := range st.Exceptions() {
		for i := range r.Count {
			used[r.New+ondisk.COWChunk(i)] = true
		}
	}
	list := make([]bool, cow.Size()/512)
	for i := range list {
		list[i] = !used[ondisk.COWChunk(i/int(l.ChunkSectors))]
	}
	return list
}

// TestPunchKeepsWhatIsUsed: what the store uses keeps its bytes; every whole block that it does not use is given back; the
// snapshot shows the same, goes on, and loads again.
func TestPunchKeepsWhatIsUsed(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 11))
	for i := range 24 {
		w := newWorld(t, r, past{sectors: 1 << r.IntN(7), kind: snapshot.Persistent, holes: i%2 == 0, halfMerged: i%3 == 0, disk: 512 * (200 + r.Int64N(400))})
		if i%4 == 0 { // as a device that held something else before
			if err := fillUnused(t, w.cow); err != nil {
				t.Fatal(err)
			}
		}
		before, unused := w.cow.Bytes(), unusedSectors(t, w.cow)
		first, err := check.Run(t.Context(), w.cow, check.Options{Origin: w.origin})
		if err != nil {
			t.Fatal(err)
		}
		given, err := compact.Punch(t.Context(), w.cow, nil)
		if err != nil {
			t.Fatal(err)
		}
		after, want := w.cow.Bytes(), int64(0)
		for off := 0; off < len(after); off += 4096 {
			end := min(off+4096, len(after))
			if !slices.Contains(unused[off/512:end/512], false) {
				want += int64(end - off)
				clear(before[off:end])
			}
		}
		if given != want || !bytes.Equal(after, before) {
			t.Fatalf("round %d: %d bytes given back, want %d; content as it should be: %v", i, given, want, bytes.Equal(after, before))
		}
		second, err := check.Run(t.Context(), w.cow, check.Options{Origin: w.origin})
		if err != nil || len(second.Found) != len(first.Found) {
			t.Errorf("round %d: check found %v, now %v (%v)", i, first.Findings, second.Findings, err)
		}
		if !bytes.Equal(shown(t, w.origin, w.cow), w.view) {
			t.Fatalf("round %d: the snapshot shows something else", i)
		}
		goesOn(t, r, w)
	}
}

// fillUnused writes noise over what the store does not use.
func fillUnused(t *testing.T, cow block.Device) error {
	for i, u := range unusedSectors(t, cow) {
		if u {
			if _, err := cow.WriteAt(blocktest.Pattern(512, uint64(i)), int64(i)*512); err != nil {
				return err
			}
		}
	}
	return nil
}

// goesOn writes to the snapshot and the origin, and loads the store again.
func goesOn(t *testing.T, r *rand.Rand, w world) {
	t.Helper()
	o := snapshot.NewOrigin(w.origin)
	s, err := o.Attach(w.cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		b := blocktest.Pattern(512*(1+r.IntN(20)), r.Uint64())
		off := 512 * r.Int64N(int64(len(w.view)-len(b))/512)
		if _, err := o.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		off = 512 * r.Int64N(int64(len(w.view)-len(b))/512)
		if _, err := s.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		copy(w.view[off:], b)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(shown(t, w.origin, w.cow), w.view) {
		t.Error("written to and loaded again, the snapshot shows something else")
	}
}

// A file takes less space afterwards.
func TestPunchFile(t *testing.T) {
	const mib = 1 << 20
	path := filepath.Join(t.TempDir(), "cow")
	origin := block.NewMemory(16 * mib)
	cow, err := block.Create(path, 17*mib)
	if err != nil {
		t.Fatal(err)
	}
	defer cow.Close()
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.WriteAt(blocktest.Pattern(8*mib, 1), 4*mib); err != nil {
		t.Fatal(err)
	}
	m, err := s.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	for m.Store().Len() > 500 {
		if _, err := m.Step(100); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	view, before := shown(t, origin, cow), blocks(t, path)
	given, err := compact.Punch(t.Context(), cow, nil)
	if err != nil {
		t.Fatal(err)
	}
	after := blocks(t, path)
	if after == before {
		t.Skip("SKIPPED: the file system of the temporary folder frees no space of files")
	}
	if freed := before - after; freed < 5*mib || freed > given || after > 3*mib {
		t.Errorf("%d bytes before, %d after, %d given back", before, after, given)
	}
	if !bytes.Equal(shown(t, origin, cow), view) {
		t.Error("the snapshot shows something else")
	}
	wantClean(t, cow, origin)
}

// blocks is how much space a file takes, in bytes.
func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// Cut short at any operation, by a failure or a signal, punching has done no harm, and can be started again.
func TestPunchCutShort(t *testing.T) {
	w := newWorld(t, rand.New(rand.NewPCG(12, 12)), past{sectors: 8, kind: snapshot.Persistent, holes: true, disk: 1 << 20})
	boom := errors.New("the disk fails")
	image := w.cow.Bytes()
	for i := 1; ; i++ {
		w.cow = block.MemoryFrom(image)
		faults := blocktest.NewFaulty(w.cow, func(op blocktest.Op) error {
			if op.N == i && op.Kind != blocktest.Read {
				return boom
			}
			return nil
		})
		_, err := compact.Punch(t.Context(), faults, nil)
		if faults.Count() < i {
			break
		}
		if err != nil && !errors.Is(err, boom) {
			t.Fatal(err)
		}
		if !bytes.Equal(shown(t, w.origin, w.cow), w.view) {
			t.Fatalf("operation %d failed: the snapshot shows something else", i)
		}
	}
	w.cow = block.MemoryFrom(image)
	ctx, stop := context.WithCancelCause(t.Context())
	given, err := compact.Punch(ctx, w.cow, func(done, total int64) { stop(boom) })
	if !errors.Is(err, boom) || given == 0 || !bytes.Equal(shown(t, w.origin, w.cow), w.view) {
		t.Errorf("when its context ends: %d bytes, %v", given, err)
	}
	rest, err := compact.Punch(t.Context(), w.cow, nil)
	if err != nil || rest <= given || !bytes.Equal(shown(t, w.origin, w.cow), w.view) {
		t.Errorf("started again: %d bytes, %v", rest, err)
	}
}

// A process was killed in the middle of a merge: the cleared last slot is not durable. Whatever a power cut leaves of
// that and of the holes, the content of the snapshot is the same.
func TestPunchAfterAKill(t *testing.T) {
	origin, cow := block.NewMemory(64<<10), block.NewMemory(48<<10)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(4) {
		if _, err := s.WriteAt(blocktest.Pattern(4096, uint64(i)), i*8192); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	view := shown(t, origin, cow)
	merged := blocktest.Pattern(4096, 3)
	if _, err := origin.WriteAt(merged, 3*8192); err != nil {
		t.Fatal(err)
	}
	disk := blocktest.NewCrash(cow.Bytes())
	if _, err := disk.WriteAt(make([]byte, ondisk.SlotSize), 4096+3*ondisk.SlotSize); err != nil {
		t.Fatal(err)
	}
	seen, holes := 0, 0
	disk.Power().Observe(func(blocktest.Op) {
		for image := range disk.Power().Cut().Images(blocktest.Choices{}) {
			b := image.Disk(disk)
			seen++
			if !bytes.Contains(b, merged) {
				holes++
			}
			if !bytes.Equal(shown(t, origin, block.MemoryFrom(b)), view) {
				t.Errorf("%v: the snapshot shows something else", image)
			}
		}
	})
	if _, err := compact.Punch(t.Context(), disk, nil); err != nil {
		t.Fatal(err)
	}
	if seen < 3 || holes == 0 {
		t.Errorf("%d disks were looked at, %d with a hole", seen, holes)
	}
}
