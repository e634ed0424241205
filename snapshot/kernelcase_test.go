package snapshot_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func kernelCases(t *testing.T, run func(t *testing.T, c kernelcase.Case)) {
	t.Helper()
	for _, c := range kernelcase.All(t) {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			run(t, c)
		})
	}
}

// TestKernelCasesReplayed makes the operations of each case in the same order and wants the kernel's
// bytes: COW image, origin, view, status and table line.
func TestKernelCasesReplayed(t *testing.T) {
	for _, sync := range []snapshot.SyncMode{snapshot.SyncFlush, snapshot.SyncAlways} {
		t.Run(fmt.Sprintf("sync=%d", sync), func(t *testing.T) {
			kernelCases(t, func(t *testing.T, c kernelcase.Case) { replayCase(t, c, sync) })
		})
	}
}

func replayCase(t *testing.T, c kernelcase.Case, sync snapshot.SyncMode) {
	before := kernelcase.Stream(c.OriginSeed, 0, c.OriginSectors*512)
	if got := kernelcase.Digest(before); got != c.OriginBefore {
		t.Fatalf("origin before: digest %s, want %s", got, c.OriginBefore)
	}
	disk, cow := block.MemoryFrom(before), block.NewMemory(c.COWSectors*512)
	origin := snapshot.NewOrigin(disk)
	table, err := kernelcase.ParseTable(c.Kernel.Table)
	if err != nil {
		t.Fatal(err)
	}
	opts := snapshot.Options{Store: table.Store, ChunkSectors: table.ChunkSectors, Features: table.Features, Sync: sync}
	snap, err := origin.Attach(cow, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { snap.Close() }()
	for i, s := range c.Steps {
		if c.Kind == "reopen" && i == len(c.Steps)/2 {
			if err := snap.Close(); err != nil {
				t.Fatal(err)
			}
			if snap, err = origin.Attach(cow, opts); err != nil {
				t.Fatal(err)
			}
		}
		if err := doStep(origin, snap, s); err != nil && !strings.HasPrefix(c.Kind, "overflow") {
			t.Fatalf("step %d %v: %v", i, s, err)
		}
	}
	if err := snap.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := snap.Status().Line(); got != c.Kernel.Status {
		t.Errorf("status %q, want %q", got, c.Kernel.Status)
	}
	if got := snap.Status().Table(table.Origin, table.COW); got != c.Kernel.Table {
		t.Errorf("table %q, want %q", got, c.Kernel.Table)
	}
	wantDigest(t, "origin", readAll(t, origin), c.Kernel.Origin)
	if c.Kernel.Status != fmt.Sprintf("0 %d snapshot Invalid", c.OriginSectors) {
		wantDigest(t, "view", readAll(t, snap), c.Kernel.Snap)
	}
	if strings.HasPrefix(c.Kind, "merge") {
		mergeLikeKernel(t, c, snap)
		wantDigest(t, "origin after merge", disk.Bytes(), c.OriginAfter)
	}
	if strings.HasPrefix(c.Kind, "overflow") {
		compareOverflow(t, c, cow)
		return
	}
	if got := kernelcase.Digest(cow.Bytes()); got != c.COWAfter {
		want, err := c.COW()
		if err != nil {
			t.Fatal(err)
		}
		t.Errorf("COW device differs first at byte %d", firstDifference(cow.Bytes(), want))
	}
	if c.Store != "N" {
		checkStore(t, cow)
		checkClean(t, cow, ondisk.Layout{ChunkSectors: c.ChunkSectors})
	}
}

func doStep(origin, snap block.Device, s kernelcase.Step) error {
	target := origin
	if s.Target == "snap" {
		target = snap
	}
	if s.Op == "d" {
		return block.Discard(target, s.Off, s.N)
	}
	_, err := target.WriteAt(kernelcase.Stream(s.Seed, s.Off, s.N), s.Off)
	return err
}

// mergeLikeKernel merges as far as the kernel did: to the end, or until as many exceptions are left.
func mergeLikeKernel(t *testing.T, c kernelcase.Case, snap *snapshot.Snapshot) {
	t.Helper()
	m, err := snap.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for m.Status().Exceptions > uint64(len(c.Exceptions)) {
		if _, err := m.Step(0); err != nil {
			t.Fatal(err)
		}
	}
	want := c.Kernel.MergeStopped
	if want == "" {
		want = c.Kernel.MergeStatus
	}
	if got := m.Status().Line(); got != want {
		t.Errorf("status of merge %q, want %q", got, want)
	}
}

// compareOverflow wants the header, the origin and all exceptions before the request that overflowed to
// be the kernel's. Of that request the kernel may have recorded some pieces and we others: a kernel runs
// the pieces of a request at once.
func compareOverflow(t *testing.T, c kernelcase.Case, cow *block.Memory) {
	t.Helper()
	want, err := c.COW()
	if err != nil {
		t.Fatal(err)
	}
	got := cow.Bytes()
	l := ondisk.Layout{ChunkSectors: c.ChunkSectors}
	if !bytes.Equal(got[:l.ChunkBytes()], want[:l.ChunkBytes()]) {
		t.Errorf("header chunk differs")
	}
	ours, theirs := slots(t, cow, l), slots(t, block.MemoryFrom(want), l)
	shared := min(len(ours), len(theirs))
	if !slices.Equal(ours[:shared], theirs[:shared]) {
		t.Errorf("exceptions differ: %v, kernel %v", ours, theirs)
	}
	last := c.Steps[0]
	for _, s := range c.Steps {
		last.N = max(last.N, s.N)
	}
	if limit := int(last.N/l.ChunkBytes()) + 2; max(len(ours), len(theirs))-shared > limit {
		t.Errorf("%d exceptions, kernel %d: more than one request apart", len(ours), len(theirs))
	}
	for _, e := range ours[:shared] {
		at := l.COWOffset(e.New)
		if !bytes.Equal(got[at:at+l.ChunkBytes()], want[at:at+l.ChunkBytes()]) {
			t.Errorf("COW chunk %d differs", e.New)
		}
	}
}

func slots(t *testing.T, cow block.Device, l ondisk.Layout) []ondisk.Exception {
	t.Helper()
	var all []ondisk.Exception
	for e, err := range store.Scan(cow, l) {
		if err != nil {
			t.Fatal(err)
		}
		if !e.IsEnd() {
			all = append(all, e.Exception)
		}
	}
	return all
}

// TestKernelCasesRead loads what the kernel left and wants its exceptions, status and view; half-done
// merges are finished.
func TestKernelCasesRead(t *testing.T) {
	kernelCases(t, func(t *testing.T, c kernelcase.Case) {
		if c.Store == "N" {
			t.Skip("a transient store can't be loaded")
		}
		cowImage, err := c.COW()
		if err != nil {
			t.Fatal(err)
		}
		wantDigest(t, "fixture COW", cowImage, c.COWAfter)
		originImage, err := c.Origin()
		if err != nil {
			t.Fatal(err)
		}
		wantDigest(t, "fixture origin", originImage, c.OriginAfter)
		disk, cow := block.MemoryFrom(originImage), block.MemoryFrom(cowImage)
		origin := snapshot.NewOrigin(disk)
		snap, err := origin.Attach(cow, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		st := snap.Status()
		if c.Header.Valid == 0 {
			if st.Text() != "Invalid" {
				t.Errorf("status %q, want Invalid", st.Text())
			}
			return
		}
		if got := slots(t, cow, ondisk.Layout{ChunkSectors: c.ChunkSectors}); !equalPairs(got, c.Exceptions) {
			t.Errorf("exceptions differ from the kernel's")
		}
		if got := kernelcase.Digest(readAll(t, snap)); got != c.Kernel.Snap {
			t.Errorf("view has digest %s, want %s", got, c.Kernel.Snap)
		}
		if !strings.HasPrefix(c.Kind, "merge") && st.Line() != c.Kernel.Status {
			t.Errorf("status %q, want %q", st.Line(), c.Kernel.Status)
		}
		if err := snap.Close(); err != nil {
			t.Fatal(err)
		}
		wantDigest(t, "COW after loading", cow.Bytes(), c.COWAfter)
		finishMerge(t, origin, cow)
		wantDigest(t, "merged origin", disk.Bytes(), c.Kernel.Snap)
		checkStore(t, cow)
		checkClean(t, cow, ondisk.Layout{ChunkSectors: c.ChunkSectors})
	})
}

func finishMerge(t *testing.T, origin *snapshot.Origin, cow block.Device) {
	t.Helper()
	m, err := origin.LoadMerge(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	for {
		n, err := m.Step(0)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	if !m.Status().Finished() {
		t.Errorf("merge not finished: %v", m.Status())
	}
}

func equalPairs(got []ondisk.Exception, want [][2]uint64) bool {
	return slices.EqualFunc(got, want, func(e ondisk.Exception, p [2]uint64) bool {
		return uint64(e.Old) == p[0] && uint64(e.New) == p[1]
	})
}

func wantDigest(t *testing.T, what string, b []byte, want string) {
	t.Helper()
	if got := kernelcase.Digest(b); got != want {
		t.Errorf("%s: digest %s, want %s", what, got, want)
	}
}

func readAll(t *testing.T, dev block.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	return -1
}

// checkStore is the end of every test that opens a store: it must open, with as many exceptions as it has
// slots before the end mark. An invalid store has nothing to check.
func checkStore(t *testing.T, cow block.Device) {
	t.Helper()
	s, err := store.Open(cow)
	if err != nil {
		t.Errorf("store is not sound: %v", err)
		return
	}
	if s.Err() != nil {
		return
	}
	if n := len(slots(t, cow, s.Layout())); uint64(n) != s.Len() {
		t.Errorf("%d slots, %d exceptions", n, s.Len())
	}
}

// checkClean wants nothing but zeros after the end mark in its area.
func checkClean(t *testing.T, cow block.Device, l ondisk.Layout) {
	t.Helper()
	n := uint64(len(slots(t, cow, l)))
	area := n / l.SlotsPerArea()
	at := l.SlotOffset(ondisk.Slot{Area: area, Index: n % l.SlotsPerArea()})
	rest := make([]byte, l.COWOffset(l.AreaChunk(area)+1)-at)
	if _, err := cow.ReadAt(rest, at); err != nil {
		t.Fatal(err)
	}
	if len(bytes.Trim(rest, "\x00")) > 0 {
		t.Error("bytes behind the end mark")
	}
}
