package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// exampleA is the worked example A of docs/spec/dm-snapshot.md §4.3: chunk size 8, one area.
var exampleA = []pair{{10, 2}, {11, 3}, {12, 4}, {20, 5}, {30, 6}, {29, 7}, {28, 8}, {40, 9}, {41, 10}}

// merge opens a merge of a COW image on an origin of the given number of sectors.
func mergeOf(t *testing.T, img []byte, originSectors int64) (*rig, *cow, *snapshot.Merging) {
	t.Helper()
	r := newRig(t, originSectors)
	c := r.cowOf("COW", img)
	m, err := r.origin.LoadMerge(c.dev, snapshot.Options{Notify: r.notify})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.faults.Set(nil)
		r.disk.Set(nil)
		m.Close()
		checkStore(t, c.memory)
	})
	r.log.Clear()
	return r, c, m
}

// consecutive returns n exceptions for origin chunks from old on, in the COW chunks that allocation gives.
func consecutive(c uint32, n, old uint64) []pair {
	l := ondisk.Layout{ChunkSectors: c}
	var ps []pair
	for new := uint64(2); uint64(len(ps)) < n; new++ {
		if l.IsData(ondisk.COWChunk(new)) {
			ps = append(ps, pair{old + uint64(len(ps)), new})
		}
	}
	return ps
}

func TestC090WorkedExamples(t *testing.T) {
	d := consecutive(1, 64, 100)
	run := func(old ondisk.OriginChunk, new ondisk.COWChunk, n uint64) store.Run {
		return store.Run{Old: old, New: new, Count: n}
	}
	for _, c := range []struct {
		name  string
		img   []byte
		runs  []store.Run
		after []uint64 // next_free, in chunks, where the specification gives it
	}{
		{"A", image(8, 1024, exampleA...), []store.Run{run(40, 9, 2), run(28, 8, 1), run(29, 7, 1), run(30, 6, 1), run(20, 5, 1), run(10, 2, 3)},
			[]uint64{9, 8, 7, 6, 5, 2}},
		{"B", image(8, 1024, []pair{{5, 4}, {6, 3}, {7, 2}, {20, 5}, {21, 6}, {22, 7}, {23, 9}}...),
			[]store.Run{run(23, 9, 1), run(20, 5, 3), run(7, 2, 1), run(6, 3, 1), run(5, 4, 1)}, nil},
		{"D", image(1, 400, d...), []store.Run{run(132, 35, 32), run(100, 2, 32)}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev := block.MemoryFrom(c.img)
			s, err := store.Open(dev)
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range c.runs {
				for range 2 { // asking changes nothing
					if got, err := s.LastRun(); err != nil || got != want {
						t.Fatalf("step %d: %v, %v; want %v", i+1, got, err, want)
					}
				}
				dropLast(t, s, want.Count)
				if c.after != nil {
					if got := s.Usage().Allocated / uint64(s.Layout().ChunkSectors); got != c.after[i] {
						t.Errorf("step %d: next_free %d, want %d", i+1, got, c.after[i])
					}
				}
				checkStore(t, dev)
			}
			if got, err := s.LastRun(); err != nil || got.Count != 0 {
				t.Errorf("at the end: %v, %v", got, err)
			}
		})
	}
}

// dropLast takes the last n exceptions of a store for merged.
func dropLast(t *testing.T, s *store.Store, n uint64) {
	t.Helper()
	merged, err := s.Last(n)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DropLast(merged); err != nil {
		t.Fatal(err)
	}
}

func TestC091OnlyMergedSlotsAreCleared(t *testing.T) {
	img := image(8, 1024, exampleA...)
	dev := block.MemoryFrom(img)
	s, err := store.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	dropLast(t, s, 2)
	want := slices.Clone(img)
	clear(want[8*sector+7*16 : 8*sector+9*16])
	if !bytes.Equal(dev.Bytes(), want) {
		t.Errorf("differs first at byte %d", firstDifference(dev.Bytes(), want))
	}
	checkStore(t, dev)
}

func TestC092StatusAcrossAnAreaBoundary(t *testing.T) {
	var scattered []pair
	for i, p := range consecutive(1, 40, 0) {
		scattered = append(scattered, pair{uint64(2 * i), p[1]})
	}
	_, _, m := mergeOf(t, image(1, 400, scattered...), 128)
	wantStatus(t, m, "43/400 3")
	for left := 39; left >= 0; left-- {
		if n := step(t, m, 0); n != 1 {
			t.Fatalf("a step of %d", n)
		}
		want := fmt.Sprintf("%d/400 3", left+3)
		if left < 32 {
			want = fmt.Sprintf("%d/400 2", left+2)
		}
		wantStatus(t, m, want)
	}
	wantStatus(t, m, "2/400 2")
}

func TestC093Finished(t *testing.T) {
	r, c, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	finish(t, m)
	wantStatus(t, m, "16/1024 16")
	if !m.Status().Finished() {
		t.Error("not finished")
	}
	wantHeader(t, c, headerValid)
	if len(bytes.Trim(c.memory.Bytes()[8*sector:16*sector], "\x00")) > 0 {
		t.Error("area 0 is not zero")
	}
	for _, p := range exampleA {
		wantRead(t, r.origin, int64(8*p[0]), content(8, p[1]))
	}
	wantRead(t, r.origin, 0, r.old(0, 80))
	write(t, r.origin, 0, 8, 1) // it goes on as an origin
}

func TestC094OrderOfAStep(t *testing.T) {
	// The request log of specification B.7. The area's slots are read back from disk first, as memory
	// does not keep them in order; the clearing write is the block that holds them.
	r, _, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	for _, want := range []string{
		"COW R 72+16; ORIGIN W 320+16", "COW R 64+8; ORIGIN W 224+8", "COW R 56+8; ORIGIN W 232+8",
		"COW R 48+8; ORIGIN W 240+8", "COW R 40+8; ORIGIN W 160+8", "COW R 16+24; ORIGIN W 80+24",
	} {
		step(t, m, 0)
		var data, order []string
		for _, op := range r.log.Take() {
			if op.Kind == blocktest.Read && op.Device == "COW" && op.Off < 16*sector {
				continue // slots
			}
			if op.Kind == blocktest.Read || op.Kind == blocktest.Write {
				data = append(data, op.String())
			}
			order = append(order, op.String())
		}
		if got := strings.Join(data, "; "); got != want {
			t.Errorf("data moved\n got %s\nwant %s", got, want)
		}
		if got := strings.Join(order, "; "); got != want+"; ORIGIN F; COW WD 8+8" {
			t.Errorf("order of a step: %s", got)
		}
	}
}

func TestC095CrashInAMerge(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	const c, originSectors = 1, 100
	cowImage := image(c, 200, consecutive(c, 40, 7)...)
	var power blocktest.Power
	before := blocktest.Pattern(originSectors*sector, 1)
	disk, cow := power.NewCrash("ORIGIN", before), power.NewCrash("COW", cowImage)
	want := slices.Clone(before)
	for _, p := range consecutive(c, 40, 7) {
		copy(want[p[0]*sector:], content(c, p[1]))
	}
	images := 0
	look := func(img *blocktest.Image) {
		images++
		d, w := block.MemoryFrom(img.Disk(disk)), block.MemoryFrom(img.Disk(cow))
		// As a snapshot it shows what it showed.
		o := snapshot.NewOrigin(d)
		s, err := o.Attach(w, snapshot.Options{})
		if err != nil {
			t.Fatalf("%v: %v", img, err)
		}
		if got := readAll(t, s); !bytes.Equal(got, want) {
			t.Fatalf("%v: the snapshot's view differs at byte %d", img, firstDifference(got, want))
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		// As a merge it goes on to the same end.
		finishMerge(t, o, w)
		if got := d.Bytes(); !bytes.Equal(got, want) {
			t.Fatalf("%v: merged to something else at byte %d", img, firstDifference(got, want))
		}
	}
	for _, c := range []struct{ max, ahead uint64 }{{0, 0}, {7, 0}, {100, 0}, {7, 7}, {5, 11}} {
		power = blocktest.Power{}
		disk, cow = power.NewCrash("ORIGIN", before), power.NewCrash("COW", cowImage)
		var looking sync.Mutex // with ahead, two goroutines write
		power.Observe(func(blocktest.Op) {
			looking.Lock()
			defer looking.Unlock()
			for img := range power.Cut().Images(blocktest.Choices{Random: 4, Seed: 1, All: 16}) {
				look(img)
			}
		})
		m, err := snapshot.NewOrigin(disk).LoadMerge(cow, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		for n := uint64(1); n > 0; {
			if n, err = m.StepAhead(c.max, c.ahead); err != nil {
				t.Fatal(err)
			}
		}
		power.Observe(nil)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(disk.Bytes(), want) {
			t.Fatal("not merged")
		}
	}
	t.Logf("%d images", images)
	if images < 100 {
		t.Errorf("only %d images", images)
	}
}

func TestC096ShortLastChunkIsMergedShort(t *testing.T) {
	// 16 sectors a chunk, an origin of 57: chunk 3 has 9. A run of chunks 2 and 3 is 25 sectors.
	r, _, m := mergeOf(t, image(16, 512, pair{2, 2}, pair{3, 3}), 57)
	step(t, m, 0)
	if ops := r.ops(); !strings.Contains(ops, "COW R 32+25\n") || !strings.Contains(ops, "ORIGIN W 32+25\n") {
		t.Errorf("operations\n%s", ops)
	}
	wantRead(t, r.origin, 32, slices.Concat(content(16, 2), content(16, 3)[:9*sector]))
}

func TestC097WriteToAnUnmergedChunk(t *testing.T) {
	r, _, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	step(t, m, 0)
	r.log.Clear()
	write(t, r.origin, 81, 2, 7) // chunk 10, in COW chunk 2
	r.wantOps("COW W 17+2")
	want := slices.Concat(content(8, 2)[:sector], fill(2, 7), content(8, 2)[3*sector:])
	wantRead(t, r.origin, 80, want)
	finish(t, m)
	wantRead(t, r.memory, 80, want)
}

func TestC098WriteToAChunkBeingMergedWaits(t *testing.T) {
	r, _, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	hold := r.disk.Hold(at(blocktest.Write, 320))
	wait := held(hold, func() { step(t, m, 0) })
	written := make(chan struct{})
	go func() { defer close(written); r.origin.WriteAt(fill(1, 7), 321*sector) }()
	select {
	case <-written:
		t.Fatal("the write did not wait for the step")
	default:
	}
	if strings.Contains(r.ops(), "W 321+1") || strings.Contains(r.ops(), "W 73+1") {
		t.Error("the write went on while its chunk was being merged")
	}
	hold.Release()
	wait()
	<-written
	ops := r.ops()
	if drop, put := strings.Index(ops, "COW WD 8+8"), strings.Index(ops, "ORIGIN W 321+1"); put < 0 || put < drop {
		t.Errorf("the write did not land on the origin after the step:\n%s", ops)
	}
	wantRead(t, r.memory, 320, slices.Concat(content(8, 9)[:sector], fill(1, 7), content(8, 9)[2*sector:], content(8, 10)))
}

func TestC099ReadOfAChunkBeingMergedDoesNotWait(t *testing.T) {
	for _, what := range []string{"copy", "flush", "drop"} {
		r, c, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
		var hold *blocktest.Hold
		switch what {
		case "copy":
			hold = r.disk.Hold(at(blocktest.Write, 320))
		case "flush":
			hold = r.disk.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Flush })
		case "drop":
			hold = c.faults.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.WriteDurable })
		}
		wait := held(hold, func() { step(t, m, 0) })
		wantRead(t, r.origin, 320, slices.Concat(content(8, 9), content(8, 10))) // returns
		hold.Release()
		wait()
	}
}

func TestC100WriteElsewhereGoesToTheOrigin(t *testing.T) {
	r := newRig(t, 1024)
	s := r.attach(r.cow("OTHER", 1024), snapshot.Options{ChunkSectors: 8})
	m, err := r.origin.LoadMerge(r.cowOf("COW", image(8, 1024, exampleA...)).dev, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	step(t, m, 0) // chunks 40 and 41
	step(t, m, 0) // chunk 28
	if got := s.Status().Exceptions; got != 3 {
		t.Errorf("%d exceptions in the other snapshot after a merge of 3 chunks", got)
	}
	r.log.Clear()
	write(t, r.origin, 320, 1, 7) // merged
	r.wantOps("ORIGIN W 320+1")   // kept already
	write(t, r.origin, 801, 1, 7) // never mapped
	r.wantOps("ORIGIN R 800+8; OTHER W 40+8; OTHER F; OTHER W 8+8; OTHER F; ORIGIN W 801+1")
	wantRead(t, s, 320, r.old(320, 16))
	wantRead(t, s, 800, r.old(800, 8))
}

func TestC101OthersKeepTheirView(t *testing.T) {
	r := newRig(t, 1000) // short last chunks
	main := r.attach(r.cow("COW", 2048), snapshot.Options{ChunkSectors: 16})
	small := r.attach(r.cow("SMALL", 4096), snapshot.Options{ChunkSectors: 4})
	large := r.attach(r.cow("LARGE", 4096), snapshot.Options{ChunkSectors: 32})
	for i := range int64(12) {
		write(t, main, 83*i, 20, byte(i+1))
	}
	write(t, small, 100, 3, 0x55)
	wantSmall, wantLarge, want := readAll(t, small), readAll(t, large), readAll(t, main)
	m := r.merging(main)
	for {
		n := step(t, m, 0)
		if !bytes.Equal(readAll(t, small), wantSmall) || !bytes.Equal(readAll(t, large), wantLarge) {
			t.Fatal("another snapshot's view changed")
		}
		if !bytes.Equal(readAll(t, r.origin), want) {
			t.Fatal("the merged view changed")
		}
		if n == 0 {
			break
		}
	}
	if !bytes.Equal(r.memory.Bytes(), want) {
		t.Error("not merged")
	}
}

func TestC102MergingNeverAllocates(t *testing.T) {
	img := image(8, 1024, exampleA...)
	r, c, m := mergeOf(t, img, 1024)
	for at := int64(0); at < 1024; at += 5 {
		write(t, r.origin, at, min(7, 1024-at), byte(at))
	}
	wantStatus(t, m, "88/1024 16")
	if b := c.memory.Bytes(); !bytes.Equal(b[:16*sector], img[:16*sector]) || !bytes.Equal(b[88*sector:], img[88*sector:]) {
		t.Error("the COW device changed outside its chunks")
	}
	want := readAll(t, r.origin)
	finish(t, m)
	if !bytes.Equal(r.memory.Bytes(), want) {
		t.Error("merged to something else")
	}
}

func TestC103FlushAndDiscardWhileMerging(t *testing.T) {
	r, _, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	flush(t, r.origin)
	if ops := r.ops(); !strings.Contains(ops, "ORIGIN F") || !strings.Contains(ops, "COW F") {
		t.Errorf("flush reached\n%s", ops)
	}
	r.log.Clear()
	before := readAll(t, r.origin)
	r.log.Clear()
	if err := block.Discard(r.origin, 0, 1024*sector); err != nil {
		t.Fatal(err)
	}
	r.wantOps("")
	if !bytes.Equal(readAll(t, r.origin), before) {
		t.Error("a discard changed something")
	}
	_ = m
}

// The loop is package merge's, and TestDriverPausesBetweenSteps shows it there. Here: nothing is lost or
// done twice when a merge is closed between steps, and another goes on.
func TestC104MergeStopsAndGoesOn(t *testing.T) {
	img := image(8, 1024, exampleA...)
	r, c, m := mergeOf(t, img, 1024)
	want := readAll(t, r.origin)
	for n := uint64(9); n > 0; {
		hold := r.disk.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Flush })
		var done uint64
		wait := held(hold, func() { done = step(t, m, 0) })
		closed := make(chan struct{})
		go func() { defer close(closed); m.Close() }()
		select {
		case <-closed:
			t.Fatal("closed in the middle of a step")
		default:
		}
		hold.Release()
		wait()
		<-closed
		n -= done
		var err error
		if m, err = r.origin.LoadMerge(c.dev, snapshot.Options{}); err != nil {
			t.Fatal(err)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		if got := m.Status().Exceptions; got != n {
			t.Fatalf("%d exceptions left, want %d", got, n)
		}
		if !bytes.Equal(readAll(t, r.origin), want) {
			t.Fatal("the view changed")
		}
	}
	m.Close()
	if !bytes.Equal(r.memory.Bytes(), want) {
		t.Error("not merged")
	}
}

// failedStep makes a step fail and wants that said; the other chunks must stay usable and the disk valid.
func failedStep(t *testing.T, r *rig, c *cow, m *snapshot.Merging) {
	t.Helper()
	if _, err := m.Step(0); !errors.Is(err, snapshot.ErrMergeFailed) || !errors.Is(err, errDisk) {
		t.Fatalf("step: %v", err)
	}
	wantStatus(t, m, "Merge failed")
	if m.Status().State != snapshot.StateMergeFailed {
		t.Errorf("state %s", m.Status().State)
	}
	wantHeader(t, c, headerValid)
}

func TestC105OriginWriteErrorWhileMerging(t *testing.T) {
	for _, kind := range []blocktest.Kind{blocktest.Write, blocktest.Flush} {
		r, c, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
		want := readAll(t, r.origin)
		r.disk.Set(failing(kind, 320, 16))
		hold := r.disk.Hold(func(op blocktest.Op) bool { return op.Kind == kind })
		wait := held(hold, func() { failedStep(t, r, c, m) })
		held := make(chan error)
		go func() { _, err := r.origin.WriteAt(fill(1, 7), 320*sector); held <- err }()
		waitFor(t, func() bool { return m.Status().Exceptions == 9 }) // nothing is dropped
		hold.Release()
		wait()
		if err := <-held; err != nil && !errors.Is(err, snapshot.ErrMergeFailed) {
			t.Errorf("held-back write: %v", err)
		} else if err == nil {
			// It came after the step had ended: then it is in the COW device like any other.
			copy(want[320*sector:], fill(1, 7))
		}
		// Other I/O works.
		write(t, r.origin, 80, 1, 5)
		write(t, r.origin, 0, 1, 6)
		copy(want[80*sector:], fill(1, 5))
		copy(want, fill(1, 6))
		if !bytes.Equal(readAll(t, r.origin), want) {
			t.Error("the view changed")
		}
		if kind == blocktest.Flush {
			continue // a device whose flush failed fails permanently
		}
		// A reload completes.
		r.disk.Set(nil)
		m.Close()
		finishMerge(t, r.origin, c.dev)
		if !bytes.Equal(r.memory.Bytes(), want) {
			t.Error("merged to something else")
		}
	}
}

func TestStepsCopyAhead(t *testing.T) {
	r, _, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	want := readAll(t, r.origin)
	stepAhead := func(max, ahead, merged uint64) {
		t.Helper()
		if n, err := m.StepAhead(max, ahead); n != merged || err != nil {
			t.Fatalf("StepAhead(%d, %d) = %d, %v, want %d", max, ahead, n, err, merged)
		}
		if got := readAll(t, r.origin); !bytes.Equal(got, want) {
			t.Fatalf("the view changed at byte %d", firstDifference(got, want))
		}
	}
	// The first step merges two exceptions, and has copied the three before them.
	stepAhead(2, 3, 2)
	r.log.Clear()
	stepAhead(9, 0, 3) // what was copied, and nothing is copied again
	if ops := r.ops(); strings.Contains(ops, "ORIGIN W") {
		t.Errorf("copied twice:\n%s", ops)
	}
	// A write to a chunk that was copied ahead waits, and goes to the COW device once that is forgotten.
	stepAhead(1, 1, 1)
	e, err := m.Store().Last(1)
	if err != nil {
		t.Fatal(err)
	}
	at := int64(e[0].Old) * 8 * sector
	written := make(chan error, 1)
	go func() { _, err := r.origin.WriteAt(fill(1, 9), at); written <- err }()
	select {
	case err := <-written:
		t.Fatalf("the write did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	m.CancelAhead()
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	copy(want[at:], fill(1, 9))
	stepAhead(1, 100, 1)
	finish(t, m)
	if !bytes.Equal(r.memory.Bytes(), want) {
		t.Error("merged to something else")
	}
}

func TestFailuresOfCopyingAhead(t *testing.T) {
	r, _, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	want := readAll(t, r.origin)
	last, err := m.Store().Last(4)
	if err != nil {
		t.Fatal(err)
	}
	// The window copied ahead fails: that is no failure of the step, and the next one copies it again.
	at := int64(last[0].Old) * 8
	r.disk.Set(failing(blocktest.Write, at, 8))
	if n, err := m.StepAhead(3, 1); n != 3 || err != nil {
		t.Fatalf("StepAhead = %d, %v", n, err)
	}
	if _, err := m.StepAhead(1, 1); !errors.Is(err, snapshot.ErrMergeFailed) {
		t.Fatalf("the next step: %v", err)
	}
	r.disk.Set(nil)
	if n, err := m.StepAhead(1, 2); n != 1 || err != nil {
		t.Fatalf("after that: %d, %v", n, err)
	}
	// A step that fails forgets what was copied ahead: a write to it does not wait for ever.
	r.disk.Set(failing(blocktest.Flush, 0, 1024))
	if _, err := m.StepAhead(1, 1); !errors.Is(err, snapshot.ErrReopen) {
		t.Fatalf("a failed flush: %v", err)
	}
	for _, e := range last {
		off := int64(e.Old) * 8 * sector
		if _, err := r.origin.WriteAt(want[off:off+sector], off); err != nil {
			t.Fatal(err)
		}
	}
	if got := readAll(t, r.origin); !bytes.Equal(got, want) {
		t.Errorf("the view changed at byte %d", firstDifference(got, want))
	}
}

// waitFor waits until a condition that is already on its way holds.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
	}
	t.Fatal("condition does not hold")
}

func TestC106COWReadErrorWhileMerging(t *testing.T) {
	r, c, m := mergeOf(t, image(8, 1024, exampleA...), 1024)
	want := readAll(t, r.origin)
	c.faults.Set(failing(blocktest.Read, 72, 16))
	failedStep(t, r, c, m)
	// The event has the kernel's log line, the error has the cause.
	if got := r.events; len(got) != 1 || got[0].Text != "Read error: shutting down merge" || !errors.Is(got[0].Err, errDisk) {
		t.Errorf("events %v", got)
	}
	wantRead(t, r.memory, 320, r.old(320, 16))
	c.faults.Set(nil)
	finish(t, m) // trying again is enough
	if !bytes.Equal(r.memory.Bytes(), want) {
		t.Error("merged to something else")
	}
}

func TestC107AreaWriteErrorWhileMerging(t *testing.T) {
	// H1: the kernel clears the slots in memory first, and a retry copies the header over origin chunk 0.
	for _, max := range []uint64{0, 5} {
		img := image(8, 1024, exampleA...)
		r, c, m := mergeOf(t, img, 1024)
		want := readAll(t, r.origin)
		c.faults.Set(failingWrites(8, 8))
		if _, err := m.Step(max); !errors.Is(err, snapshot.ErrMergeFailed) {
			t.Fatalf("step: %v", err)
		}
		wantStatus(t, m, "Merge failed")
		if !bytes.Equal(c.memory.Bytes()[:16*sector], img[:16*sector]) {
			t.Error("the area changed")
		}
		wantRead(t, r.origin, 0, want)
		// Trying again while it still fails, and when it does not any more.
		if _, err := m.Step(max); !errors.Is(err, snapshot.ErrMergeFailed) {
			t.Fatalf("second step: %v", err)
		}
		c.faults.Set(nil)
		// What failed to be made durable stays failed until the device is opened again.
		if _, err := m.Step(max); !errors.Is(err, snapshot.ErrMergeFailed) {
			t.Fatalf("third step: %v", err)
		}
		if err := m.Close(); err == nil {
			t.Error("the merge ended well")
		}
		m, err := r.origin.LoadMerge(blocktest.NewFaulty(c.memory, nil), snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		wantRead(t, r.origin, 0, want)
		n := step(t, m, max)
		if left := m.Status().Exceptions; left != 9-n {
			t.Errorf("%d exceptions after a step of %d", left, n)
		}
		finish(t, m)
		wantRead(t, r.memory, 0, want)
		wantRead(t, r.memory, 0, r.old(0, 8)) // origin chunk 0 was never in the store
		wantStatus(t, m, "16/1024 16")
	}
}

func TestC108AreaReadErrorInStepBack(t *testing.T) {
	// H2: the kernel has stepped back before the read, and a retry skips an area.
	r, c, m := mergeOf(t, image(1, 400, consecutive(1, 70, 0)...), 128)
	want := readAll(t, r.origin)
	if n := step(t, m, 0); n != 6 {
		t.Fatalf("a step of %d", n)
	}
	c.faults.Set(failing(blocktest.Read, 34, 1)) // area 1
	for range 3 {
		if _, err := m.Step(0); !errors.Is(err, snapshot.ErrMergeFailed) || !errors.Is(err, errDisk) {
			t.Fatalf("step: %v", err)
		}
	}
	if got := m.Status().Exceptions; got != 64 {
		t.Errorf("%d exceptions left, want 64", got)
	}
	wantRead(t, r.origin, 0, want)
	c.faults.Set(nil)
	for _, want := range []uint64{32, 32, 0} {
		if n := step(t, m, 0); n != want {
			t.Errorf("a step of %d, want %d", n, want)
		}
	}
	wantRead(t, r.memory, 0, want)
}

func TestC109InvalidStoreMergesNothing(t *testing.T) {
	img := setHeader(image(8, 1024, exampleA...), 1, 0)
	r, c, m := mergeOf(t, img, 1024)
	wantStatus(t, m, "Invalid")
	if n, err := m.Step(0); n != 0 || !isInvalid(err) {
		t.Errorf("step: %d, %v", n, err)
	}
	wantRead(t, r.origin, 0, r.old(0, 1024))
	write(t, r.origin, 80, 1, 7)
	flush(t, r.origin)
	wantRead(t, r.memory, 80, fill(1, 7))
	if !bytes.Equal(c.memory.Bytes(), img) {
		t.Error("the COW device was touched")
	}
}

func TestC109InvalidStoreHandedOver(t *testing.T) {
	r, c, s := standard(t, 1024, 5*8)
	write(t, s, 0, 8, 7)
	write(t, s, 8, 3, 7)
	write(t, r.origin, 0, 64, 9) // does not fit
	wantStatus(t, s, "Invalid")
	m := r.merging(s)
	wantStatus(t, m, "Invalid")
	img := c.memory.Bytes()
	want := append(fill(64, 9), r.old(64, 8)...)
	wantRead(t, r.origin, 0, want)
	write(t, r.origin, 2, 7, 5)
	flush(t, r.origin)
	wantRead(t, r.memory, 0, slices.Concat(fill(2, 9), fill(7, 5), fill(55, 9), r.old(64, 8)))
	if es, err := r.origin.Extents(0, 16*sector); err != nil || len(es) == 0 {
		t.Errorf("extents %v, %v", es, err)
	}
	if n, err := m.Step(0); n != 0 || !isInvalid(err) {
		t.Errorf("step: %d, %v", n, err)
	}
	if !bytes.Equal(c.memory.Bytes(), img) {
		t.Error("the COW device was touched")
	}
}

func TestC110MergesThatAreRefused(t *testing.T) {
	r := newRig(t, 1024)
	one, two := r.cowOf("ONE", image(8, 1024, exampleA...)), r.cowOf("TWO", image(8, 1024, exampleA...))
	if _, err := r.origin.LoadMerge(one.dev, snapshot.Options{Store: snapshot.Transient}); !errors.Is(err, store.ErrNoMerge) {
		t.Errorf("N: %v", err)
	}
	transient := r.cow("N", 1024)
	s := r.attach(transient, snapshot.Options{Store: snapshot.Transient, ChunkSectors: 8})
	if _, err := s.BeginMerge(); !errors.Is(err, store.ErrNoMerge) {
		t.Errorf("handover of N: %v", err)
	}
	if _, err := r.origin.LoadMerge(transient.dev, snapshot.Options{}); err == nil {
		t.Error("N as P was accepted")
	}
	wantRead(t, s, 0, r.old(0, 8)) // and goes on
	m, err := r.origin.LoadMerge(one.dev, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	// A second one, also while the first only waits.
	for range 2 {
		if _, err := r.origin.LoadMerge(two.dev, snapshot.Options{}); !errors.Is(err, snapshot.ErrAlreadyMerging) {
			t.Errorf("second merge: %v", err)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
	}
}
