package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
)

func TestC036OrderOfAnOriginWrite(t *testing.T) {
	r, _, _ := standard(t, 1024, 1024)
	write(t, r.origin, 3, 1, 1)
	// The kernel's order; it flushes with the area's write (PREFLUSH, FUA) where we flush around it.
	r.wantOps("ORIGIN R 0+8; COW W 16+8; COW F; COW W 8+8; COW F; ORIGIN W 3+1")
}

func TestC037AreaWriteIsABlock(t *testing.T) {
	// The kernel writes the whole chunk; we write the changed blocks of 4 KiB, or a smaller chunk.
	for c, want := range map[uint32]string{1: "COW W 1+1", 8: "COW W 8+8", 128: "COW W 128+8"} {
		r := newRig(t, 1024)
		s := r.attach(r.cow("COW", 4096), snapshot.Options{ChunkSectors: c})
		write(t, s, 0, int64(c), 1)
		r.log.Clear()
		flush(t, s)
		r.wantOps("COW F; " + want + "; COW F")
	}
}

func TestC038WritesTogetherShareAnAreaWrite(t *testing.T) {
	r, _, s := standard(t, 128*8, 2048)
	for i := range int64(128) {
		write(t, s, 8*i, 8, 1)
	}
	flush(t, s)
	if got := strings.Count(r.ops(), "COW W 8+8\n"); got != 1 {
		t.Errorf("%d area writes", got)
	}
	// Written at once, through an origin that must make all durable first.
	r, _, _ = standard(t, 128*8, 2048)
	write(t, r.origin, 0, 128*8, 1)
	r.wantOps("ORIGIN R 0+1024; COW W 16+1024; COW F; COW W 8+8; COW F; ORIGIN W 0+1024")
}

// held starts f in a goroutine and returns when hold has stopped an operation of it. The returned function
// waits for f.
func held(hold *blocktest.Hold, f func()) (wait func()) {
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	<-hold.Reached()
	return func() { <-done }
}

// at matches an operation of a kind that touches a sector.
func at(k blocktest.Kind, sectorAt int64) func(blocktest.Op) bool {
	return func(op blocktest.Op) bool { return op.Kind == k && op.Overlaps(sectorAt*sector, sector) }
}

// slowFirst is a snapshot on which the copy for a write to chunk 0 is held in its data write, while chunks
// 10 and 20 are written.
func slowFirst(t *testing.T) (c *cow, s *snapshot.Snapshot, hold *blocktest.Hold, wait func()) {
	_, c, s = standard(t, 1024, 1024)
	hold = c.faults.Hold(at(blocktest.Write, 16))
	wait = held(hold, func() { s.WriteAt(fill(8, 1), 0) })
	write(t, s, 80, 8, 2)
	write(t, s, 160, 8, 3)
	return c, s, hold, wait
}

func TestC039SlotsAreInOrderOfAllocation(t *testing.T) {
	c, s, hold, wait := slowFirst(t)
	hold.Release()
	wait()
	flush(t, s)
	b := c.memory.Bytes()
	for i, want := range []pair{{0, 2}, {10, 3}, {20, 4}} {
		if got := slot(b, 8, 0, uint64(i)); got != want {
			t.Errorf("slot %d is %v, want %v", i, got, want)
		}
	}
}

func TestC040LaterExceptionsWaitForTheSlowOne(t *testing.T) {
	// Not even a flush makes them durable before the first is: it waits.
	c, s, hold, wait := slowFirst(t)
	flushed := make(chan error)
	go func() { flushed <- s.Flush() }()
	select {
	case err := <-flushed:
		t.Fatalf("flush returned %v before the older copy had ended", err)
	default:
	}
	if got := slot(c.memory.Bytes(), 8, 0, 0); got != (pair{}) {
		t.Errorf("slot 0 is %v", got)
	}
	hold.Release()
	wait()
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	if got := slot(c.memory.Bytes(), 8, 0, 2); got != (pair{20, 4}) {
		t.Errorf("after the flush slot 2 is %v", got)
	}
}

// cutEverywhere runs work on a crashable origin and COW device (chunk size 1, with a new store), and looks
// at what every power cut in it can leave.
func cutEverywhere(t *testing.T, work func(o *snapshot.Origin, s *snapshot.Snapshot), look func(img *blocktest.Image, disk, cow []byte)) {
	t.Helper()
	var power blocktest.Power
	before := blocktest.Pattern(128*sector, 1)
	disk, cow := power.NewCrash("ORIGIN", before), power.NewCrash("COW", make([]byte, 200*sector))
	o := snapshot.NewOrigin(disk)
	s, err := o.Attach(cow, snapshot.Options{ChunkSectors: 1})
	if err != nil {
		t.Fatal(err)
	}
	images := 0
	power.Observe(func(blocktest.Op) {
		for img := range power.Cut().Images(blocktest.Choices{All: 16, Limit: 6, Random: 6, Seed: 1}) {
			images++
			look(img, img.Disk(disk), img.Disk(cow))
		}
	})
	work(o, s)
	power.Observe(nil)
	t.Logf("%d images", images)
	if images < 50 {
		t.Errorf("only %d images", images)
	}
}

func TestC041CrashInAnOriginWrite(t *testing.T) {
	before := blocktest.Pattern(128*sector, 1)
	cutEverywhere(t, func(o *snapshot.Origin, s *snapshot.Snapshot) {
		for i := range int64(8) {
			write(t, o, 5*i, 9, byte(i+1)) // across area edges, each over the end of the one before
		}
	}, func(img *blocktest.Image, disk, cow []byte) {
		s, err := snapshot.NewOrigin(block.MemoryFrom(disk)).Attach(block.MemoryFrom(cow), snapshot.Options{})
		if err != nil {
			t.Fatalf("%v: %v", img, err)
		}
		if got := read(t, s, 0, 128); !bytes.Equal(got, before) {
			t.Fatalf("%v: the snapshot shows an origin write at byte %d", img, firstDifference(got, before))
		}
	})
}

func TestC042TornAreaWrites(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	// Chunk size 8 has eight sectors an area: a batch of 100 slots spans four of them.
	var power blocktest.Power
	before := blocktest.Pattern(200*8*sector, 1)
	disk, cow := power.NewCrash("ORIGIN", before), power.NewCrash("COW", make([]byte, 300*8*sector))
	o := snapshot.NewOrigin(disk)
	if _, err := o.Attach(cow, snapshot.Options{ChunkSectors: 8}); err != nil {
		t.Fatal(err)
	}
	torn := 0
	power.Observe(func(op blocktest.Op) {
		if op.Kind != blocktest.Write || op.Device != "COW" || op.Off >= 16*sector {
			return
		}
		for img := range power.Cut().Images(blocktest.Choices{All: 300, Limit: 20, Seed: 1}) {
			torn++
			s, err := snapshot.NewOrigin(block.MemoryFrom(img.Disk(disk))).Attach(block.MemoryFrom(img.Disk(cow)), snapshot.Options{})
			if err != nil {
				t.Fatalf("%v: %v", img, err)
			}
			if !bytes.Equal(read(t, s, 0, 200*8), before) {
				t.Fatalf("%v: wrong data", img)
			}
		}
	})
	write(t, o, 0, 100*8, 1)
	power.Observe(nil)
	if torn < 100 {
		t.Errorf("only %d torn images", torn)
	}
}

func TestC043OriginReadsOfASnapshotWrite(t *testing.T) {
	r, _, s := standard(t, 1024, 1024)
	write(t, s, 16, 8, 1)
	r.wantOps("COW W 16+8")
	write(t, s, 33, 1, 1)
	r.wantOps("ORIGIN R 32+8; COW W 24+8")
	write(t, s, 100, 8, 1)
	r.wantOps("ORIGIN R 96+8; ORIGIN R 104+8; COW W 32+16")
}

func TestC044WholeChunkWriteSurvivesWithoutAFlush(t *testing.T) {
	// With SyncAlways, the kernel's way. SyncFlush promises it at the flush, as any disk with a cache.
	var power blocktest.Power
	disk, cow := power.NewCrash("ORIGIN", make([]byte, 64*sector)), power.NewCrash("COW", make([]byte, 256*sector))
	s, err := snapshot.NewOrigin(disk).Attach(cow, snapshot.Options{ChunkSectors: 8, Sync: snapshot.SyncAlways})
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, 8, 8, 7)
	s, err = snapshot.NewOrigin(block.MemoryFrom(disk.Durable())).Attach(block.MemoryFrom(cow.Durable()), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	wantRead(t, s, 8, fill(8, 7))
	checkStore(t, block.MemoryFrom(cow.Durable()))
}

func TestC045GrowingIsNoticed(t *testing.T) {
	_, c, s := standard(t, 1024, 24)
	write(t, s, 0, 8, 1)
	if err := c.memory.Grow(32 * sector); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, s, "24/32 16")
	write(t, s, 8, 8, 2)
	wantStatus(t, s, "32/32 16")
}

func TestC046ReadsGoWhereTheChunkIs(t *testing.T) {
	r, _, s := standard(t, 1024, 1024)
	write(t, s, 8, 8, 1)
	r.log.Clear()
	wantRead(t, s, 0, slices.Concat(r.old(0, 8), fill(8, 1), r.old(16, 8)))
	r.wantOps("COW R 16+8; ORIGIN R 0+8; ORIGIN R 16+8")
}

func TestC047ReadWhileTheChunkIsCopied(t *testing.T) {
	r, c, s := standard(t, 1024, 1024)
	hold := c.faults.Hold(at(blocktest.Write, 16))
	wait := held(hold, func() { r.origin.WriteAt(fill(8, 1), 0) })
	wantRead(t, s, 0, r.old(0, 8)) // returns, though the copy does not
	hold.Release()
	wait()
	wantRead(t, s, 0, r.old(0, 8))
}

func TestC048EachSideKeepsToItself(t *testing.T) {
	r, _, s := standard(t, 1024, 4096)
	write(t, s, 3, 7, 1)
	wantRead(t, r.origin, 0, r.old(0, 16))
	write(t, r.origin, 5, 20, 2)
	wantRead(t, s, 0, slices.Concat(r.old(0, 3), fill(7, 1), r.old(10, 30)))
	wantRead(t, r.origin, 0, slices.Concat(r.old(0, 5), fill(20, 2), r.old(25, 7)))
}

func TestC049WriteOverThreeChunks(t *testing.T) {
	_, c, s := standard(t, 1024, 1024)
	write(t, s, 4, 16, 1)
	flush(t, s)
	for i, want := range []pair{{0, 2}, {1, 3}, {2, 4}, {}} {
		if got := slot(c.memory.Bytes(), 8, 0, uint64(i)); got != want {
			t.Errorf("slot %d is %v", i, got)
		}
	}
}

func TestC050RewriteNeedsNoMetadata(t *testing.T) {
	r, _, s := standard(t, 1024, 1024)
	write(t, s, 16, 8, 1)
	flush(t, s)
	r.log.Clear()
	write(t, s, 18, 3, 2)
	flush(t, s)
	r.wantOps("COW W 18+3; COW F")
}

func TestC051FlushGoesToTheCOWOnly(t *testing.T) {
	r, c, s := standard(t, 1024, 16)
	flush(t, s)
	r.wantOps("COW F")
	fails(t, s, 0, 8)
	wantStatus(t, s, "Invalid")
	r.log.Clear()
	flush(t, s)
	r.wantOps("COW F")
	_ = c
}

func TestC052ConcurrentPartialWrites(t *testing.T) {
	r, _, s := standard(t, 1024, 1024)
	var all sync.WaitGroup
	for i := range int64(8) {
		all.Go(func() { write(t, s, i, 1, byte(i+1)) })
	}
	all.Wait()
	for i := range int64(8) {
		wantRead(t, s, i, fill(1, byte(i+1)))
	}
	if got := s.Status().Exceptions; got != 1 {
		t.Errorf("%d exceptions", got)
	}
	if got := strings.Count(r.ops(), "ORIGIN R 0+8"); got != 1 {
		t.Errorf("%d copies", got)
	}
}

func TestC053SnapshotAndOriginWriteAtOnce(t *testing.T) {
	for _, first := range []string{"snapshot", "origin"} {
		r, c, s := standard(t, 1024, 1024)
		one, other := block.Device(s), block.Device(r.origin)
		if first == "origin" {
			one, other = other, one
		}
		hold := c.faults.Hold(at(blocktest.Write, 16))
		wait := held(hold, func() { one.WriteAt(fill(1, 1), 0) })
		done := make(chan struct{})
		go func() { defer close(done); other.WriteAt(fill(1, 2), sector) }()
		hold.Release()
		wait()
		<-done
		snap, orig := slices.Concat(fill(1, 1), r.old(1, 7)), slices.Concat(r.old(0, 1), fill(1, 2), r.old(2, 6))
		if first == "origin" {
			snap, orig = slices.Concat(r.old(0, 1), fill(1, 2), r.old(2, 6)), slices.Concat(fill(1, 1), r.old(1, 7))
		}
		wantRead(t, s, 0, snap)
		wantRead(t, r.origin, 0, orig)
	}
}

func TestC054OriginWriteWaitsForAReader(t *testing.T) {
	r, _, s := standard(t, 1024, 1024)
	hold := r.disk.Hold(at(blocktest.Read, 3))
	var got []byte
	wait := held(hold, func() { got = read(t, s, 3, 1) })
	written := make(chan struct{})
	go func() { defer close(written); r.origin.WriteAt(fill(1, 1), 3*sector) }()
	// Let it get as far as it can: the exception is committed, new readers go to the COW device, and the first
	// still reads the origin.
	for !strings.Contains(r.ops(), "COW R ") {
		runtime.Gosched()
		if strings.Contains(r.ops(), "COW W 16+8") {
			wantRead(t, s, 4, r.old(4, 1))
		}
		select {
		case <-written:
			t.Fatal("the origin was written beneath a reader")
		default:
		}
	}
	hold.Release()
	wait()
	<-written
	if !bytes.Equal(got, r.old(3, 1)) {
		t.Error("the reader saw the new data")
	}
}

func TestC055ShortLastChunkIsCopiedShort(t *testing.T) {
	r := newRig(t, 1021)
	s := r.attach(r.cowOf("COW", setHeader(fill(1024, 0xaa), 0, 0)), snapshot.Options{ChunkSectors: 8})
	r.log.Clear()
	write(t, r.origin, 1016, 5, 1)
	r.wantOps("ORIGIN R 1016+5; COW W 16+5; COW F; COW W 8+8; COW F; ORIGIN W 1016+5")
	wantRead(t, s, 1016, r.old(1016, 5))
}

func TestC056ShortLastChunkWrittenWhole(t *testing.T) {
	r := newRig(t, 1021)
	s := r.attach(r.cow("COW", 1024), snapshot.Options{ChunkSectors: 8})
	write(t, s, 1016, 5, 7)
	wantRead(t, s, 1016, fill(5, 7))
	if _, err := s.WriteAt(fill(1, 1), 1021*sector); err == nil {
		t.Error("a write past the end succeeded")
	}
}

// threeSizes is an origin with snapshots of chunk size 8, 32 and 16, attached in this order.
func threeSizes(t *testing.T) (*rig, map[uint32]*snapshot.Snapshot, map[uint32]*cow) {
	r := newRig(t, 1024)
	snaps, cows := map[uint32]*snapshot.Snapshot{}, map[uint32]*cow{}
	for _, c := range []uint32{8, 32, 16} {
		cows[c] = r.cow(fmt.Sprintf("COW%d", c), 4096)
		snaps[c] = r.attach(cows[c], snapshot.Options{ChunkSectors: c})
	}
	r.log.Clear()
	return r, snaps, cows
}

func TestC057OneExceptionInEachSnapshot(t *testing.T) {
	r, snaps, cows := threeSizes(t)
	write(t, r.origin, 3, 1, 1)
	for c, s := range snaps {
		if got := s.Status().Exceptions; got != 1 {
			t.Errorf("chunk size %d: %d exceptions", c, got)
		}
		wantRead(t, s, 0, r.old(0, 64))
		if got := read(t, cows[c].memory, 2*int64(c), int64(c)); !bytes.Equal(got, r.old(0, int64(c))) {
			t.Errorf("chunk size %d: the chunk was not copied whole", c)
		}
	}
}

func TestC058OriginIsWrittenLast(t *testing.T) {
	r, _, _ := threeSizes(t)
	write(t, r.origin, 3, 1, 1)
	ops := r.log.Ops()
	last := ops[len(ops)-1]
	if last.String() != "ORIGIN W 3+1" {
		t.Fatalf("last operation is %v", last)
	}
	flushes := 0
	for _, op := range ops {
		if op.Kind == blocktest.Flush {
			flushes++
			if !op.Before(last) {
				t.Errorf("%v had not returned when the origin was written", op)
			}
		}
	}
	if flushes != 6 {
		t.Errorf("%d flushes, want two a store", flushes)
	}
}

func TestC059SecondOriginWritePasses(t *testing.T) {
	r, _, _ := threeSizes(t)
	write(t, r.origin, 3, 1, 1)
	r.log.Clear()
	write(t, r.origin, 5, 2, 2)
	r.wantOps("ORIGIN W 5+2")
}

func TestC060WideOriginWrite(t *testing.T) {
	r, snaps, _ := threeSizes(t)
	write(t, r.origin, 20, 60, 1)
	for c, want := range map[uint32]uint64{8: 8, 16: 4, 32: 3} {
		if got := snaps[c].Status().Exceptions; got != want {
			t.Errorf("chunk size %d: %d exceptions, want %d", c, got, want)
		}
		wantRead(t, snaps[c], 0, r.old(0, 200))
	}
}

func TestC061LargestChunkFirst(t *testing.T) {
	r := newRig(t, 1024)
	var order []*snapshot.Snapshot
	for i, c := range []uint32{8, 32, 16, 32, 8} {
		order = append(order, r.attach(r.cow(fmt.Sprint(i), 4096), snapshot.Options{ChunkSectors: c}))
	}
	want := []*snapshot.Snapshot{order[1], order[3], order[2], order[0], order[4]}
	if !slices.Equal(r.origin.Snapshots(), want) {
		t.Error("not the largest chunk first, equals in order of loading")
	}
}

func TestC062ShorterSnapshot(t *testing.T) {
	r := newRig(t, 1024)
	s := r.attach(r.cow("COW", 1024), snapshot.Options{ChunkSectors: 8, Size: 500 * sector})
	write(t, r.origin, 504, 100, 1)
	if got := s.Status().Exceptions; got != 0 {
		t.Errorf("%d exceptions beyond its end", got)
	}
	write(t, r.origin, 490, 30, 1)
	wantRead(t, s, 480, r.old(480, 20))
	if _, err := s.ReadAt(make([]byte, sector), 500*sector); err == nil {
		t.Error("a read past the end succeeded")
	}
}

func TestC063OriginWithoutSnapshots(t *testing.T) {
	r := newRig(t, 4096)
	write(t, r.origin, 5, 3000, 1)
	r.wantOps("ORIGIN W 5+3000")
}

func TestC064AttachingIsSeenByEveryLaterWrite(t *testing.T) {
	r := newRig(t, 1024)
	r.attach(r.cow("A", 4096), snapshot.Options{ChunkSectors: 32})
	write(t, r.origin, 0, 64, 1)
	now := read(t, r.origin, 0, 1024)
	s := r.attach(r.cow("B", 4096), snapshot.Options{ChunkSectors: 8}) // smaller than what was there (H7)
	write(t, r.origin, 0, 32, 2)
	write(t, r.origin, 100, 500, 2)
	wantRead(t, s, 0, now)
}

func TestC065InactiveSnapshotGetsNothing(t *testing.T) {
	r := newRig(t, 1024)
	s, err := r.origin.Load(r.cow("COW", 1024).dev, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	write(t, r.origin, 0, 8, 1)
	if got := s.Status().Exceptions; got != 0 {
		t.Errorf("%d exceptions before the first resume", got)
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	write(t, r.origin, 8, 8, 1)
	if got := s.Status().Exceptions; got != 1 {
		t.Errorf("%d exceptions after it", got)
	}
}

func TestC066OriginReadsWaitForNoCopy(t *testing.T) {
	r, c, _ := standard(t, 1024, 1024)
	hold := c.faults.Hold(at(blocktest.Write, 16))
	wait := held(hold, func() { r.origin.WriteAt(fill(8, 1), 0) })
	wantRead(t, r.origin, 0, r.old(0, 8))
	hold.Release()
	wait()
}

// discarding is a snapshot with these features, of which chunks 1 and 2 are 1 and 2.
func discarding(t *testing.T, f snapshot.Features) (*rig, *snapshot.Snapshot) {
	r := newRig(t, 1024)
	s := r.attach(r.cow("COW", 1024), snapshot.Options{ChunkSectors: 8, Features: f})
	write(t, s, 8, 8, 1)
	write(t, s, 16, 8, 2)
	flush(t, s)
	r.log.Clear()
	return r, s
}

func discard(t *testing.T, dev block.Device, at, n int64) {
	t.Helper()
	if err := block.Discard(dev, at*sector, n*sector); err != nil {
		t.Fatal(err)
	}
}

func TestC067DiscardWithoutFeatures(t *testing.T) {
	// The kernel's limit is 0, so that no discard arrives; one that arrives here does nothing.
	r, s := discarding(t, snapshot.Features{})
	discard(t, s, 0, 64)
	r.wantOps("")
	wantRead(t, s, 0, slices.Concat(r.old(0, 8), fill(8, 1), fill(8, 2), r.old(24, 8)))
}

func TestC068DiscardZeroesAChunk(t *testing.T) {
	r, s := discarding(t, snapshot.Features{DiscardZeroesCOW: true})
	discard(t, s, 8, 12) // a whole chunk, and half of the next
	r.wantOps("COW Z 16+8; COW D 24+4")
	wantRead(t, s, 8, fill(8, 0))
	wantRead(t, s, 20, fill(4, 2))
	wantStatus(t, s, "32/1024 16")
}

func TestC069DiscardOfUnmappedDoesNothing(t *testing.T) {
	r, s := discarding(t, snapshot.Features{DiscardZeroesCOW: true})
	discard(t, s, 512, 512)
	r.wantOps("")
	wantRead(t, s, 512, r.old(512, 512))
}

func TestC070DiscardPassesDown(t *testing.T) {
	r, s := discarding(t, snapshot.Features{DiscardZeroesCOW: true, DiscardPassdownOrigin: true})
	discard(t, s, 8, 56)
	r.wantOps("COW Z 16+16; ORIGIN D 8+56")
	if got := s.Status().Exceptions; got != 2 {
		t.Errorf("%d exceptions", got)
	}
}

func TestC071PassdownNeedsZeroes(t *testing.T) {
	_, err := kernelcase.ParseTable("0 1024 snapshot 7:0 7:1 P 8 1 discard_passdown_origin")
	if !errors.Is(err, snapshot.ErrPassdown) {
		t.Errorf("table: %v", err)
	}
	r := newRig(t, 1024)
	_, err = r.origin.Load(r.cow("COW", 1024).dev, snapshot.Options{Features: snapshot.Features{DiscardPassdownOrigin: true}})
	if !errors.Is(err, snapshot.ErrPassdown) {
		t.Errorf("options: %v", err)
	}
}

func TestC072FeatureWords(t *testing.T) {
	for args, want := range map[string]string{
		"3 discard_zeroes_cow a b":   "invalid number of feature arguments",
		"1":                          "invalid number of feature arguments",
		"x":                          "invalid number of feature arguments",
		"1 discard_everything":       "unknown feature",
		"0":                          "P 8",
		"0 whatever":                 "P 8",
		"1 Discard_Zeroes_COW extra": "P 8 1 discard_zeroes_cow",
		"2 discard_passdown_origin discard_zeroes_cow": "P 8 2 discard_zeroes_cow discard_passdown_origin",
	} {
		table, err := kernelcase.ParseTable("0 1024 snapshot 7:0 7:1 P 8 " + args)
		got := strings.TrimPrefix(table.String(), "0 1024 snapshot 7:0 7:1 ")
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
	if _, err := kernelcase.ParseTable("0 1024 snapshot 7:0 7:1 P"); err == nil || !errors.Is(err, kernelcase.ErrArguments) {
		t.Errorf("three arguments: %v", err)
	}
}
