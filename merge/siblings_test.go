package merge_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/mapped"
	"github.com/dmsnap/dmsnap/store"
)

// siblingWorld is a world with other snapshots of its origin, in chunks of other sizes, and what each shows.
type siblingWorld struct {
	world
	before   []byte // the origin
	siblings []merge.Sibling
	shown    [][]byte
}

func newSiblingWorld(t *testing.T, chunks, writes int) siblingWorld {
	t.Helper()
	w := siblingWorld{world: newWorld(t, chunks, writes)}
	w.before = bytes.Clone(w.origin.Bytes())
	r := rand.New(rand.NewPCG(7, uint64(chunks)))
	for _, s := range []merge.Sibling{
		{Name: "small chunks", ChunkSectors: 2},
		{Name: "equal chunks, shorter", ChunkSectors: 8, Size: int64(chunks/2)*chunk + 512},
		{Name: "large chunks", ChunkSectors: 64},
		{Name: "never used", ChunkSectors: 16},
	} {
		dev := block.NewMemory(w.origin.Size()*3/2 + 40*chunk)
		s.COW = dev
		if s.Name != "never used" {
			snap, err := snapshot.NewOrigin(w.origin).Attach(dev, snapshot.Options{ChunkSectors: s.ChunkSectors, Size: s.Size})
			if err != nil {
				t.Fatal(err)
			}
			for range 5 {
				p := make([]byte, 1+r.IntN(chunk))
				fill(r, p)
				write(t, snap, p, r.Int64N(snap.Size()-int64(len(p))+1))
			}
			if err := snap.Close(); err != nil {
				t.Fatal(err)
			}
			s.ChunkSectors = 0
		}
		w.siblings = append(w.siblings, s)
		p, err := w.show(w.origin, s)
		if err != nil {
			t.Fatal(err)
		}
		w.shown = append(w.shown, p)
	}
	return w
}

// show returns what a sibling shows of an origin.
func (w siblingWorld) show(origin block.Device, s merge.Sibling) ([]byte, error) {
	st, err := store.OpenToRead(s.COW)
	if errors.Is(err, ondisk.ErrNoStore) && s.ChunkSectors != 0 {
		st, err = nil, nil
	}
	if err != nil {
		return nil, err
	}
	view, err := store.NewView(origin, st)
	if err != nil {
		return nil, err
	}
	p := make([]byte, view.Size())
	if s.Size != 0 {
		p = p[:s.Size]
	}
	_, err = view.ReadAt(p, 0)
	return p, err
}

// kept returns an error unless the siblings are sound, and show what they did.
func (w siblingWorld) kept(ctx context.Context, origin block.Device, siblings []merge.Sibling) error {
	for i, s := range siblings {
		p, err := w.show(origin, s)
		if err == nil && !bytes.Equal(p, w.shown[i]) {
			err = errors.New("shows something else than before")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
		if exists, err := store.Exists(s.COW); err != nil || !exists {
			continue
		}
		if r, err := check.Run(ctx, s.COW, check.Options{}); err != nil || r.Worst() >= check.Error {
			return fmt.Errorf("%s: %+v, %v", s.Name, r, err)
		}
	}
	return nil
}

// on returns the siblings on other devices.
func (w siblingWorld) on(device func(merge.Sibling) block.Device) []merge.Sibling {
	all := slices.Clone(w.siblings)
	for i := range all {
		all[i].COW = device(all[i])
	}
	return all
}

func TestOfflineKeepsSiblings(t *testing.T) {
	for _, window := range []int64{0, 1, 5 * chunk} {
		w := newSiblingWorld(t, 200, 120)
		plan, err := planSiblings(w.origin, w.cow, w.siblings)
		if err != nil {
			t.Fatal(err)
		}
		had := map[string]uint64{}
		for _, s := range w.siblings {
			if st, err := store.OpenToRead(s.COW); err == nil {
				had[s.Name] = st.Len()
			}
		}
		if _, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{Window: window, Siblings: w.siblings}); err != nil {
			t.Fatal(err)
		}
		w.wantMerged(t)
		if err := w.kept(t.Context(), w.origin, w.siblings); err != nil {
			t.Error(err)
		}
		for i, s := range w.siblings {
			st, err := store.OpenToRead(s.COW)
			if err != nil {
				t.Fatal(err)
			}
			if got := st.Len() - had[s.Name]; got != plan[i].Chunks || got == 0 || plan[i].Name != s.Name {
				t.Errorf("%s: %d chunks were preserved, planned %+v", s.Name, got, plan[i])
			}
		}
	}
	// The hazard: without being named they change.
	w := newSiblingWorld(t, 200, 120)
	if _, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{}); err != nil {
		t.Fatal(err)
	}
	if w.kept(t.Context(), w.origin, w.siblings) == nil {
		t.Error("a merge without siblings changed none")
	}
}

// TestSiblingsCutAnywhere cuts the power at each moment of a merge: the siblings show what they did, and the merge, done again,
// completes with the same result.
func TestSiblingsCutAnywhere(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	w := newSiblingWorld(t, 40, 9)
	var power blocktest.Power
	origin, cow := power.NewCrash("ORIGIN", w.origin.Bytes()), power.NewCrash("COW", w.cow.Bytes())
	crash := map[string]*blocktest.Crash{}
	siblings := w.on(func(s merge.Sibling) block.Device {
		crash[s.Name] = power.NewCrash(s.Name, s.COW.(*block.Memory).Bytes())
		return crash[s.Name]
	})
	images := 0
	var mu sync.Mutex // siblings are made durable side by side
	var failed error
	power.Observe(func(op blocktest.Op) {
		mu.Lock()
		defer mu.Unlock()
		for img := range power.Cut().Images(blocktest.Choices{All: 8, Limit: 3, Random: 2, Seed: uint64(images)}) {
			images++
			o, c := block.MemoryFrom(img.Disk(origin)), block.MemoryFrom(img.Disk(cow))
			all := w.on(func(s merge.Sibling) block.Device { return block.MemoryFrom(img.Disk(crash[s.Name])) })
			if err := w.aftermath(t.Context(), o, c, all); err != nil && failed == nil {
				failed = fmt.Errorf("power cut after %v, %v: %w", op, img, err)
			}
		}
	})
	_, err := merge.Offline(t.Context(), origin, cow, merge.Options{Window: 4 * chunk, Siblings: siblings})
	if err = errors.Join(failed, err); err != nil {
		t.Fatal(err)
	}
	power.Observe(nil)
	t.Logf("%d images", images)
	if images < 200 {
		t.Error("too few images to mean anything")
	}
}

// TestSiblingsInsideOneDiskCutAnywhere is TestSiblingsCutAnywhere for volumes of one disk, as LVM has them: a flush of one is a
// flush of all, and a power cut takes from all what was not flushed.
func TestSiblingsInsideOneDiskCutAnywhere(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	w := newSiblingWorld(t, 24, 7)
	devs := []*block.Memory{w.origin, w.cow}
	for _, s := range w.siblings {
		devs = append(devs, s.COW.(*block.Memory))
	}
	var content []byte
	starts := make([]int64, len(devs))
	for i, d := range devs {
		starts[i] = int64(len(content))
		content = append(content, d.Bytes()...)
	}
	var power blocktest.Power
	disk := power.NewCrash("DISK", content)
	volumes := make([]block.Device, len(devs))
	for i, d := range devs {
		target := mapped.Target{Length: d.Size(), Areas: []mapped.Area{{Dev: disk, Off: starts[i]}}}
		var err error
		if volumes[i], err = mapped.New(fmt.Sprint("volume ", i), []mapped.Target{target}); err != nil {
			t.Fatal(err)
		}
	}
	take := func(devices []block.Device) func(merge.Sibling) block.Device {
		i := 1
		return func(merge.Sibling) block.Device { i++; return devices[i] }
	}
	images := 0
	var mu sync.Mutex
	var failed error
	power.Observe(func(op blocktest.Op) {
		mu.Lock()
		defer mu.Unlock()
		for img := range power.Cut().Images(blocktest.Choices{All: 4, Limit: 2, Random: 1, Seed: uint64(images)}) {
			images++
			after := img.Disk(disk)
			var parts []block.Device
			for i, d := range devs {
				parts = append(parts, block.MemoryFrom(after[starts[i]:starts[i]+d.Size()]))
			}
			if err := w.aftermath(t.Context(), parts[0].(*block.Memory), parts[1].(*block.Memory), w.on(take(parts))); err != nil && failed == nil {
				failed = fmt.Errorf("power cut after %v, %v: %w", op, img, err)
			}
		}
	})
	_, err := merge.Offline(t.Context(), volumes[0], volumes[1], merge.Options{Window: 3 * chunk, Siblings: w.on(take(volumes))})
	if err = errors.Join(failed, err); err != nil {
		t.Fatal(err)
	}
	power.Observe(nil)
	if t.Logf("%d images", images); images < 100 {
		t.Error("too few images to mean anything")
	}
}

// aftermath checks the disks that a merge has left which was cut short, and completes it.
func (w siblingWorld) aftermath(ctx context.Context, origin, cow *block.Memory, siblings []merge.Sibling) error {
	if err := w.kept(ctx, origin, siblings); err != nil {
		return err
	}
	if _, err := merge.Offline(ctx, origin, cow, merge.Options{Siblings: siblings}); err != nil {
		return fmt.Errorf("merge again: %w", err)
	}
	if !bytes.Equal(origin.Bytes(), w.want) {
		return errors.New("merged again, the origin is not the snapshot")
	}
	if err := w.kept(ctx, origin, siblings); err != nil {
		return fmt.Errorf("merged again: %w", err)
	}
	return nil
}

// TestSiblingsWhoseDevicesFail has all devices fail from each operation on.
func TestSiblingsWhoseDevicesFail(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	errCut := errors.New("cut off")
	for n := 0; ; n++ {
		w := newSiblingWorld(t, 60, 12)
		var left atomic.Int64 // siblings are made durable side by side
		left.Store(int64(n))
		fail := func(blocktest.Op) error {
			if left.Add(-1) < 0 {
				return errCut
			}
			return nil
		}
		siblings := w.on(func(s merge.Sibling) block.Device { return blocktest.NewFaulty(s.COW, fail) })
		_, err := merge.Offline(t.Context(), blocktest.NewFaulty(w.origin, fail), blocktest.NewFaulty(w.cow, fail), merge.Options{Window: 3 * chunk, Siblings: siblings})
		if err != nil && !errors.Is(err, errCut) {
			t.Fatalf("cut after %d operations: %v", n, err)
		}
		if err := w.aftermath(t.Context(), w.origin, w.cow, w.siblings); err != nil {
			t.Fatalf("cut after %d operations: %v", n, err)
		}
		if left.Load() >= 0 {
			if n < 100 {
				t.Errorf("only %d operations", n)
			}
			return
		}
	}
}

// TestSiblingLost: a sibling whose COW device can't be written, but marked, stops the merge, and is named. One that has no space
// on its file system stops it too, and stays valid.
func TestSiblingLost(t *testing.T) {
	for _, cause := range []error{syscall.EIO, syscall.ENOSPC} {
		w := newSiblingWorld(t, 100, 40)
		failing := true
		siblings := slices.Clone(w.siblings)
		siblings[0].COW = blocktest.NewFaulty(siblings[0].COW, func(op blocktest.Op) error {
			if failing && op.Kind == blocktest.Write && op.Off > 0 {
				return cause
			}
			return nil
		})
		_, err := merge.Offline(t.Context(), w.origin, w.cow, merge.Options{Window: 2 * chunk, Siblings: siblings})
		if !errors.Is(err, cause) {
			t.Fatalf("%v: %v", cause, err)
		}
		w.wantLoadable(t)
		failing = false
		if cause == syscall.EIO {
			if !strings.Contains(err.Error(), "small chunks: ") {
				t.Errorf("the error does not name the sibling: %v", err)
			}
			plan, err := planSiblings(w.origin, w.cow, w.siblings)
			if err != nil || !plan[0].Invalid {
				t.Errorf("%+v, %v", plan, err)
			}
			w.shown, w.siblings = w.shown[1:], w.siblings[1:]
		}
		if err := w.aftermath(t.Context(), w.origin, w.cow, w.siblings); err != nil {
			t.Errorf("%v: %v", cause, err)
		}
	}
}

func TestSiblingsRefused(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(t *testing.T, w *siblingWorld)
		want  error
	}{
		"no space":         {func(t *testing.T, w *siblingWorld) { w.siblings[3].COW = block.NewMemory(10 * chunk) }, merge.ErrSiblingFull},
		"twice":            {func(t *testing.T, w *siblingWorld) { w.siblings[1] = w.siblings[0] }, snapshot.ErrPairing},
		"the merged store": {func(t *testing.T, w *siblingWorld) { w.siblings[1].COW = w.cow }, snapshot.ErrPairing},
		"the origin":       {func(t *testing.T, w *siblingWorld) { w.siblings[1].COW = w.origin }, snapshot.ErrPairing},
		"no store":         {func(t *testing.T, w *siblingWorld) { w.siblings[3].ChunkSectors = 0 }, ondisk.ErrNoStore},
		"another origin": {func(t *testing.T, w *siblingWorld) {
			snap := attach(t, snapshot.NewOrigin(block.NewMemory(1<<30)), w.siblings[3].COW)
			write(t, snap, []byte("x"), 1<<29)
			if err := snap.Close(); err != nil {
				t.Fatal(err)
			}
		}, store.ErrOriginTooSmall},
	} {
		w := newSiblingWorld(t, 100, 40)
		test.spoil(t, &w)
		var log blocktest.Log
		recorded := map[block.Device]block.Device{}
		record := func(name string, dev block.Device) block.Device {
			if recorded[dev] == nil {
				recorded[dev] = log.Record(name, dev)
			}
			return recorded[dev]
		}
		origin, cow := record("origin", w.origin), record("cow", w.cow)
		siblings := w.on(func(s merge.Sibling) block.Device { return record(s.Name, s.COW) })
		if _, err := merge.Offline(t.Context(), origin, cow, merge.Options{Siblings: siblings}); !errors.Is(err, test.want) {
			t.Errorf("%s: Offline: %v", name, err)
		}
		if _, err := planSiblings(origin, cow, siblings); !errors.Is(err, test.want) {
			t.Errorf("%s: PlanSiblings: %v", name, err)
		}
		for _, op := range log.Ops() {
			if op.Kind != blocktest.Read {
				t.Errorf("%s: a refused merge did %v", name, op)
				break
			}
		}
	}
}

// TestSiblingJustFits: the smallest COW device that is accepted is large enough.
func TestSiblingJustFits(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, sectors := range []uint32{1, 8, 32} {
		for size := int64(2 * chunk); ; size += 512 {
			w := newSiblingWorld(t, 60, 20)
			w.siblings, w.shown = w.siblings[3:], w.shown[3:]
			w.siblings[0].COW, w.siblings[0].ChunkSectors = block.NewMemory(size), sectors
			_, err := planSiblings(w.origin, w.cow, w.siblings)
			if errors.Is(err, merge.ErrSiblingFull) && size < 1<<20 {
				size += int64(sectors-1) * 512
				continue
			}
			if err == nil {
				err = w.aftermath(t.Context(), w.origin, w.cow, w.siblings)
			}
			if err != nil {
				t.Errorf("chunks of %d sectors, COW device of %d bytes: %v", sectors, size, err)
			}
			break
		}
	}
}

func TestVisibleSiblings(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	w := newWorld(t, 60, 20)
	put := func(name string, content []byte) {
		if err := os.WriteFile(path(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	longer := newWorld(t, 600, 200)
	invalid := block.MemoryFrom(w.cow.Bytes())
	st, err := store.Open(invalid)
	if err != nil {
		t.Fatal(err)
	}
	st.Invalidate(errors.New("for the test"))
	put("disk.img", w.origin.Bytes())
	put("merged.cow", w.cow.Bytes())
	put("other.cow", w.cow.Bytes())
	put("longer.cow", longer.cow.Bytes())
	put("invalid.cow", invalid.Bytes())
	put(".hidden.cow", w.cow.Bytes())
	put("text", []byte("text"))
	put("empty", nil)
	if err := os.Link(path("other.cow"), path("z-link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path("other.cow"), path("a-symlink")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	merged, err := block.Open(path("merged.cow"), block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer merged.Close()
	got := merge.VisibleSiblings(w.origin, merged, []string{dir, dir, path("none")})
	if !slices.Equal(got, []string{path("other.cow")}) {
		t.Errorf("%v", got)
	}
	if err := os.Remove(path("z-link")); err != nil {
		t.Fatal(err)
	}
	plan, err := merge.Plan(w.origin, merged)
	if err != nil {
		t.Fatal(err)
	}
	undo, err := block.Create(path("undo.cow"), plan.UndoBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer undo.Close()
	if err := merge.WriteUndo(t.Context(), w.origin, merged, undo, merge.Options{}); err != nil {
		t.Fatal(err)
	}
	other, err := block.Open(path("other.cow"), block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if got := merge.VisibleSiblings(w.origin, merged, []string{dir}, merge.Sibling{COW: other}); len(got) != 0 {
		t.Errorf("a sibling that is known and an undo store of the merge: %v", got)
	}
	if got := merge.VisibleSiblings(w.origin, other, []string{dir}, merge.Sibling{COW: merged}); !slices.Equal(got, []string{path("undo.cow")}) {
		t.Errorf("an undo store of another merge: %v", got)
	}
}

// planSiblings is Prepared.PlanSiblings of the store on cow.
func planSiblings(origin, cow block.Device, siblings []merge.Sibling) ([]merge.SiblingWork, error) {
	p, err := merge.Prepare(origin, cow)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	return p.PlanSiblings(siblings)
}
