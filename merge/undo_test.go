package merge_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// undoWorld is a world that remembers what its origin held.
type undoWorld struct {
	world
	before []byte
}

// newUndoWorld makes an origin of the given number of sectors and a snapshot in chunks of so many, both written to.
func newUndoWorld(t testing.TB, r *rand.Rand, sectors, chunkSectors, writes int, as snapshot.StoreType) undoWorld {
	t.Helper()
	content := make([]byte, sectors*512)
	fill(r, content)
	clear(content[len(content)/3 : len(content)/2]) // a range of zeros
	l := ondisk.Layout{ChunkSectors: uint32(chunkSectors)}
	size := int64(l.ChunksNeeded(l.Chunks(int64(len(content)), true))) * l.ChunkBytes()
	w := undoWorld{world: world{origin: block.MemoryFrom(content), cow: block.NewMemory(size)}}
	if _, err := store.Create(w.cow, l, false); err != nil {
		t.Fatal(err)
	}
	o := snapshot.NewOrigin(w.origin)
	snap, err := o.Attach(w.cow, snapshot.Options{Store: as})
	if err != nil {
		t.Fatal(err)
	}
	for range writes {
		dev := []block.Device{snap, snap, o}[r.IntN(3)]
		p := make([]byte, 1+r.IntN(min(len(content), 3*chunkSectors*512)))
		fill(r, p)
		if _, err := dev.WriteAt(p, r.Int64N(dev.Size()-int64(len(p))+1)); err != nil {
			t.Fatal(err)
		}
	}
	w.want = make([]byte, len(content))
	if _, err := snap.ReadAt(w.want, 0); err != nil {
		t.Fatal(err)
	}
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	w.before = w.origin.Bytes()
	return w
}

// undoStore makes the undo store of a world.
func (w undoWorld) undoStore(t testing.TB) *block.Memory {
	t.Helper()
	plan, err := merge.Plan(w.origin, w.cow)
	if err != nil {
		t.Fatal(err)
	}
	undo := block.MemoryFrom(blocktest.Pattern(int(plan.UndoBytes), 1)) // of whatever was there nothing is left
	if err := merge.WriteUndo(t.Context(), w.origin, w.cow, undo, merge.Options{}); err != nil {
		t.Fatal(err)
	}
	return undo
}

// wantNothingBehindTheEnd wants zeros where the last chunk overlaps the end of the origin.
func (w undoWorld) wantNothingBehindTheEnd(t *testing.T, undo *block.Memory) {
	t.Helper()
	st, err := store.Open(undo)
	if err != nil {
		t.Fatal(err)
	}
	l := st.Layout()
	last := ondisk.OriginChunk(l.Chunks(w.origin.Size(), true) - 1)
	if new, mapped := st.Lookup(last); mapped {
		p := undo.Bytes()[l.COWOffset(new):][:l.ChunkBytes()]
		if rest := p[w.origin.Size()-l.OriginOffset(last):]; len(bytes.Trim(rest, "\x00")) > 0 {
			t.Error("what lies behind the end of the origin is not zero")
		}
	}
}

// shows reads origin as a store keeps it.
func shows(origin, cow block.Device) ([]byte, error) {
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		return nil, err
	}
	p := make([]byte, s.Size())
	_, err = s.ReadAt(p, 0)
	return p, errors.Join(err, s.Close())
}

func wantShown(origin, cow block.Device, want []byte) error {
	got, err := shows(origin, cow)
	if err == nil && !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		err = fmt.Errorf("the view differs in byte %d", i)
	}
	return err
}

// The invariant of merge --undo, for origins and stores of all shapes: the undo store shows the origin as it was,
// before the merge and after; the merge makes of the origin what it makes without; merging the undo store
// brings every byte back.
func TestUndoTakesAMergeBack(t *testing.T) {
	for seed := range uint64(80) {
		r := rand.New(rand.NewPCG(seed, 26))
		chunkSectors := 1 << r.IntN(6)
		sectors := 1 + r.IntN(60*chunkSectors) // often no whole number of chunks
		as := []snapshot.StoreType{snapshot.Persistent, snapshot.PersistentOverflow}[r.IntN(2)]
		w := newUndoWorld(t, r, sectors, chunkSectors, r.IntN(30), as)
		undo := w.undoStore(t)
		if !bytes.Equal(w.origin.Bytes(), w.before) {
			t.Fatalf("seed %d: the undo store is made, and the origin changed", seed)
		}
		check := func(when string) {
			t.Helper()
			if err := merge.CheckUndo(w.origin, w.cow, undo); err != nil {
				t.Fatalf("seed %d: %s: %v", seed, when, err)
			}
			if err := wantShown(w.origin, undo, w.before); err != nil {
				t.Fatalf("seed %d: %s, through the undo store: %v", seed, when, err)
			}
		}
		check("before the merge")
		w.wantNothingBehindTheEnd(t, undo)
		plan, err := merge.Plan(w.origin, w.cow)
		if err != nil {
			t.Fatal(err)
		}
		if plan.Ranges > plan.Runs || plan.Runs > 0 && plan.Ranges == 0 {
			t.Errorf("seed %d: plan %+v", seed, plan)
		}
		if _, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{Window: r.Int64N(20) * 512 * int64(chunkSectors)}); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		w.wantMerged(t)
		check("after it")
		back, err := merge.Offline(t.Context(), w.origin, undo, merge.Options{})
		if err != nil || back.Chunks != plan.Chunks || back.Ranges != plan.Ranges {
			t.Fatalf("seed %d: taken back: %+v, %v; merged: %+v", seed, back, err, plan)
		}
		if !bytes.Equal(w.origin.Bytes(), w.before) {
			t.Fatalf("seed %d: taken back, the origin is not as before", seed)
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// A merge that is taken back half-way, with an undo store of its own, loses nothing on either side.
func TestUndoOfAnUndo(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	w := newUndoWorld(t, r, 999, 8, 40, snapshot.Persistent)
	undo := w.undoStore(t)
	stop := stoppedAfter(t, w.world, 10)
	if err := merge.CheckUndo(w.origin, w.cow, undo); err != nil {
		t.Fatalf("half-way (%v): %v", stop, err)
	}
	mixture := w.origin.Bytes()
	redo := undoWorld{world: world{origin: w.origin, cow: undo}, before: mixture}.undoStore(t)
	for _, step := range []struct {
		cow  block.Device
		want []byte
	}{{undo, w.before}, {redo, mixture}, {w.cow, w.want}} {
		if _, err := merge.Offline(t.Context(), w.origin, step.cow, merge.Options{}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.origin.Bytes(), step.want) {
			t.Fatal("not as it was")
		}
	}
}

// An undo store that is made half-way takes the merge back to there, from where the first one takes it
// further.
func TestUndoInTwoParts(t *testing.T) {
	w := newUndoWorld(t, rand.New(rand.NewPCG(8, 8)), 999, 8, 40, snapshot.Persistent)
	first := w.undoStore(t)
	stoppedAfter(t, w.world, 10)
	mixture := w.origin.Bytes()
	second := w.undoStore(t)
	for _, step := range []struct {
		cow  block.Device
		want []byte
	}{{w.cow, w.want}, {second, mixture}, {first, w.before}} {
		if _, err := merge.Offline(t.Context(), w.origin, step.cow, merge.Options{}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.origin.Bytes(), step.want) {
			t.Fatal("not as it was")
		}
	}
}

// stoppedAfter merges so many chunks and stops.
func stoppedAfter(t *testing.T, w world, chunks uint64) error {
	t.Helper()
	reason := errors.New("the operator said so")
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := merge.Offline(ctx, w.origin, w.cow, merge.Options{Window: 1, Progress: func(p merge.Progress) {
		if p.MergedChunks >= chunks {
			cancel(reason)
		}
	}})
	if !errors.Is(err, reason) {
		t.Fatalf("a merge that was to stop: %v", err)
	}
	return err
}

// undoRun is what dmsnap merge --undo does with three devices, also to go on. named says that the undo
// store has its name.
func undoRun(ctx context.Context, origin, cow, undo block.Device, named *bool) error {
	if !*named {
		if err := merge.WriteUndo(ctx, origin, cow, undo, merge.Options{}); err != nil {
			return err
		}
		*named = true
	}
	if err := merge.CheckUndo(origin, cow, undo); err != nil {
		return err
	}
	_, err := merge.Offline(ctx, origin, cow, merge.Options{Window: 4 * 1024})
	return err
}

// The power is cut after every operation of a merge with an undo store and of the merge that takes it back.
// Before the undo store has its name the origin is untouched; from then on it shows what the origin
// held, always; and doing the same again ends what was begun.
func TestUndoCutAnywhere(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	w := newUndoWorld(t, r, 61, 2, 9, snapshot.Persistent)
	plan, err := merge.Plan(w.origin, w.cow)
	if err != nil {
		t.Fatal(err)
	}
	var power blocktest.Power
	origin, cow := power.NewCrash("ORIGIN", w.origin.Bytes()), power.NewCrash("COW", w.cow.Bytes())
	undo := power.NewCrash("UNDO", make([]byte, plan.UndoBytes))
	named, back := false, false
	images := 0
	var mu sync.Mutex // a window is copied while the one before is dropped
	power.Observe(func(op blocktest.Op) {
		mu.Lock()
		defer mu.Unlock()
		for img := range power.Cut().Images(blocktest.Choices{All: 16, Limit: 8, Random: 4, Seed: uint64(images)}) {
			images++
			o, c := block.MemoryFrom(img.Disk(origin)), block.MemoryFrom(img.Disk(cow))
			u := block.MemoryFrom(img.Disk(undo))
			if err := w.aftermath(t.Context(), o, c, u, named, back); err != nil {
				t.Fatalf("power cut after %v (named %v, back %v), %v: %v", op, named, back, img, err)
			}
		}
	})
	if err := undoRun(t.Context(), origin, cow, undo, &named); err != nil {
		t.Fatal(err)
	}
	back = true
	if _, err := merge.Offline(t.Context(), origin, undo, merge.Options{Window: 4 * 1024}); err != nil {
		t.Fatal(err)
	}
	power.Observe(nil)
	if !bytes.Equal(origin.Durable(), w.before) {
		t.Error("taken back, the origin on disk is not as before")
	}
	t.Logf("%d images", images)
	if images < 300 {
		t.Error("too few images to mean anything")
	}
}

// aftermath checks the disks after a power cut and continues with them.
func (w undoWorld) aftermath(ctx context.Context, o, c, u *block.Memory, named, back bool) error {
	if !named && !bytes.Equal(o.Bytes(), w.before) {
		return errors.New("the undo store has no name yet, and the origin changed")
	}
	if named {
		if err := wantShown(o, u, w.before); err != nil {
			return fmt.Errorf("through the undo store: %w", err)
		}
	}
	if !back {
		if err := wantShown(o, c, w.want); err != nil {
			return fmt.Errorf("through the merged store: %w", err)
		}
		if err := undoRun(ctx, o, c, u, &named); err != nil {
			return fmt.Errorf("going on: %w", err)
		}
		if !bytes.Equal(o.Bytes(), w.want) {
			return errors.New("gone on, the origin is not merged")
		}
		if err := wantShown(o, u, w.before); err != nil {
			return fmt.Errorf("gone on, through the undo store: %w", err)
		}
	}
	if _, err := merge.Offline(ctx, o, u, merge.Options{}); err != nil {
		return fmt.Errorf("taking back: %w", err)
	}
	if !bytes.Equal(o.Bytes(), w.before) {
		return errors.New("taken back, the origin is not as before")
	}
	return nil
}

// Each operation on each of the three devices fails, and everything after it: the same again, with devices
// that work, ends well.
func TestUndoWhoseDevicesFail(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	errCut := errors.New("cut off")
	for n := 0; ; n++ {
		w := newUndoWorld(t, rand.New(rand.NewPCG(4, 4)), 130, 4, 12, snapshot.Persistent)
		plan, err := merge.Plan(w.origin, w.cow)
		if err != nil {
			t.Fatal(err)
		}
		left := n
		fail := func(blocktest.Op) error {
			if left--; left < 0 {
				return errCut
			}
			return nil
		}
		undo := block.NewMemory(plan.UndoBytes)
		named := false
		err = undoRun(t.Context(), blocktest.NewFaulty(w.origin, fail), blocktest.NewFaulty(w.cow, fail), blocktest.NewFaulty(undo, fail), &named)
		if err != nil && !errors.Is(err, errCut) {
			t.Fatalf("cut after %d operations: %v", n, err)
		}
		if err := w.aftermath(t.Context(), w.origin, w.cow, undo, named, false); err != nil {
			t.Fatalf("cut after %d operations: %v", n, err)
		}
		if left >= 0 {
			if n < 30 {
				t.Errorf("only %d operations", n)
			}
			return
		}
	}
}

// Where there is no space for the undo store nothing else is touched.
func TestUndoWithoutRoom(t *testing.T) {
	w := newUndoWorld(t, rand.New(rand.NewPCG(5, 5)), 4000, 8, 60, snapshot.Persistent)
	plan, err := merge.Plan(w.origin, w.cow)
	if err != nil {
		t.Fatal(err)
	}
	for _, can := range []bool{true, false} {
		var log blocktest.Log
		quota := blocktest.NewQuota(block.NewMemory(plan.UndoBytes), plan.UndoBytes/2, can)
		err := merge.WriteUndo(t.Context(), log.Record("ORIGIN", w.origin), log.Record("COW", w.cow), quota, merge.Options{})
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("with half of the space: %v", err)
		}
		wantOnlyReads(t, &log)
		short := block.NewMemory(plan.UndoBytes / 2)
		if err := merge.WriteUndo(t.Context(), w.origin, w.cow, short, merge.Options{}); !errors.Is(err, store.ErrFull) {
			t.Errorf("on a device of half the size: %v", err)
		}
		quota.SetLimit(2 * plan.UndoBytes)
		if err := merge.WriteUndo(t.Context(), w.origin, w.cow, quota, merge.Options{}); err != nil {
			t.Errorf("with space: %v", err)
		}
	}
}

func wantOnlyReads(t *testing.T, log *blocktest.Log) {
	t.Helper()
	for _, op := range log.Ops() {
		if op.Kind != blocktest.Read {
			t.Errorf("%v", op)
		}
	}
}

// A store that is not the undo store of this merge is refused, with the reason, and nothing is written.
func TestCheckUndoRefuses(t *testing.T) {
	newWorld := func(t *testing.T, seed uint64) undoWorld {
		return newUndoWorld(t, rand.New(rand.NewPCG(seed, 1)), 700, 8, 20, snapshot.Persistent)
	}
	merged := func(t *testing.T, origin, cow block.Device) {
		t.Helper()
		if _, err := merge.Offline(t.Context(), origin, cow, merge.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	tests := map[string]struct {
		spoil func(t *testing.T, w *undoWorld, undo *block.Memory) *block.Memory
		say   string
	}{
		"nothing in it": {func(t *testing.T, _ *undoWorld, u *block.Memory) *block.Memory {
			return block.NewMemory(u.Size())
		}, "no exception store"},
		"noise": {func(t *testing.T, _ *undoWorld, u *block.Memory) *block.Memory {
			return block.MemoryFrom(blocktest.Pattern(10000, 1))
		}, "magic"},
		"too short": {func(t *testing.T, _ *undoWorld, u *block.Memory) *block.Memory {
			return block.NewMemory(100)
		}, "100 bytes"},
		"an empty store": {func(t *testing.T, _ *undoWorld, u *block.Memory) *block.Memory {
			m := block.NewMemory(u.Size())
			if _, err := store.Create(m, ondisk.Layout{ChunkSectors: 8}, false); err != nil {
				t.Fatal(err)
			}
			return m
		}, "not made by a merge to"},
		"another snapshot of the origin": {func(t *testing.T, w *undoWorld, u *block.Memory) *block.Memory {
			return block.MemoryFrom(w.cow.Bytes()) // with all the right chunks, and no undo label
		}, "not made by a merge to"},
		"invalid": {func(t *testing.T, _ *undoWorld, u *block.Memory) *block.Memory {
			write(t, u, make([]byte, 4), 4)
			return u
		}, "invalid"},
		"of another world": {func(t *testing.T, _ *undoWorld, _ *block.Memory) *block.Memory {
			return newWorld(t, 1).undoStore(t) // the same chunks, as the same seed made it
		}, "another merge"},
		"of the merge before": {func(t *testing.T, w *undoWorld, u *block.Memory) *block.Memory {
			merged(t, w.origin, w.cow)
			s := attach(t, snapshot.NewOrigin(w.origin), w.cow)
			write(t, s, []byte("anew"), 0)
			s.Close()
			return u
		}, "there may be new writes"},
		"an older one of this merge": {func(t *testing.T, w *undoWorld, u *block.Memory) *block.Memory {
			w.undoStore(t)
			return u
		}, "another merge"},
		"another origin": {func(t *testing.T, w *undoWorld, u *block.Memory) *block.Memory {
			w.origin = block.MemoryFrom(append(w.origin.Bytes(), make([]byte, 512)...))
			return u
		}, "of an origin of"},
		"taken back in part": {func(t *testing.T, w *undoWorld, u *block.Memory) *block.Memory {
			merged(t, w.origin, w.cow)
			stoppedAfter(t, world{origin: w.origin, cow: u}, 3)
			return u
		}, "merged itself"},
		"taken back": {func(t *testing.T, w *undoWorld, u *block.Memory) *block.Memory {
			merged(t, w.origin, u)
			return u
		}, "merged itself"},
		"writes since": {func(t *testing.T, w *undoWorld, u *block.Memory) *block.Memory {
			s := attach(t, snapshot.NewOrigin(w.origin), w.cow)
			defer s.Close()
			write(t, s, make([]byte, s.Size()), 0)
			return u
		}, "writes since"},
		"its end is missing": {func(t *testing.T, _ *undoWorld, u *block.Memory) *block.Memory {
			return block.MemoryFrom(u.Bytes()[:3*4096])
		}, "past the end"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1)
			undo := test.spoil(t, &w, w.undoStore(t))
			var log blocktest.Log
			err := merge.CheckUndo(log.Record("ORIGIN", w.origin), log.Record("COW", w.cow), log.Record("UNDO", undo))
			if !errors.Is(err, merge.ErrNotUndo) || !strings.Contains(err.Error(), test.say) {
				t.Errorf("%v, want one that says %q", err, test.say)
			}
			wantOnlyReads(t, &log)
		})
	}
}

// A merge that goes on without the undo store, or that was finished elsewhere, does not part the two.
func TestUndoOfAMergeFinishedWithoutIt(t *testing.T) {
	w := newUndoWorld(t, rand.New(rand.NewPCG(6, 1)), 700, 8, 20, snapshot.Persistent)
	undo := w.undoStore(t)
	stoppedAfter(t, w.world, 5)
	m, err := snapshot.NewOrigin(w.origin).LoadMerge(w.cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(merge.Run(t.Context(), m, merge.Options{}), m.Close()); err != nil {
		t.Fatal(err)
	}
	if err := w.aftermath(t.Context(), w.origin, w.cow, undo, true, false); err != nil {
		t.Error(err)
	}
}
