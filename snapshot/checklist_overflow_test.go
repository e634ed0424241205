package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// full is a rig with one snapshot of a type in a COW device of 40 sectors, whose three chunks are taken.
func full(t *testing.T, typ snapshot.StoreType) (*rig, *cow, *snapshot.Snapshot) {
	t.Helper()
	r := newRig(t, 1024)
	c := r.cow("COW", 40)
	s := r.attach(c, snapshot.Options{Store: typ, ChunkSectors: 8})
	chunks := int64(3)
	if typ == snapshot.Transient {
		chunks = 5
	}
	for i := range chunks {
		write(t, s, 16*i, 8, byte(i+1))
	}
	flush(t, s)
	r.log.Clear()
	return r, c, s
}

// wantHeader compares the first 16 bytes of a COW device, and wants zeros behind them in chunk 0.
func wantHeader(t *testing.T, c *cow, want string) {
	t.Helper()
	b := c.memory.Bytes()
	if got := fmt.Sprintf("%x %x %x %x", b[:4], b[4:8], b[8:12], b[12:16]); got != want {
		t.Errorf("header %s, want %s", got, want)
	}
	if len(bytes.Trim(b[16:8*sector], "\x00")) > 0 {
		t.Error("bytes behind the header")
	}
}

const (
	headerValid   = "536e4170 01000000 01000000 08000000"
	headerInvalid = "536e4170 00000000 01000000 08000000"
)

func TestC073FullPersistentStoreIsInvalid(t *testing.T) {
	r, c, s := full(t, snapshot.Persistent)
	areas := slices.Clone(c.memory.Bytes()[8*sector:])
	if err := fails(t, s, 48, 8); !isInvalid(err) {
		t.Errorf("error %v", err)
	}
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerInvalid)
	if !bytes.Equal(areas, c.memory.Bytes()[8*sector:]) {
		t.Error("areas or data were touched")
	}
	if len(r.events) != 1 || r.events[0].Kind != snapshot.EventInvalid ||
		r.events[0].Text != "Invalidating snapshot: Unable to allocate exception." {
		t.Errorf("events %v", r.events)
	}
	fails(t, s, 48, 8)
	if len(r.events) != 1 {
		t.Error("invalidated twice")
	}
}

func TestC074InvalidStaysInvalid(t *testing.T) {
	r, c, s := full(t, snapshot.Persistent)
	fails(t, s, 48, 8)
	for range 2 {
		fails(t, s, 0, 8) // a mapped chunk
		if _, err := s.ReadAt(make([]byte, sector), 0); !isInvalid(err) {
			t.Errorf("read: %v", err)
		}
		if err := s.Discard(0, sector); !isInvalid(err) {
			t.Errorf("discard: %v", err)
		}
		if _, err := s.Extents(0, sector); !isInvalid(err) {
			t.Errorf("extents: %v", err)
		}
		wantStatus(t, s, "Invalid")
		s.Close()
		s = r.attach(c, snapshot.Options{})
	}
}

func TestC075OriginWriteBeatsAFullSnapshot(t *testing.T) {
	for _, typ := range []snapshot.StoreType{snapshot.Persistent, snapshot.PersistentOverflow, snapshot.Transient} {
		r, c, s := full(t, typ)
		write(t, r.origin, 480, 8, 7)
		wantStatus(t, s, "Invalid")
		wantRead(t, r.origin, 480, fill(8, 7))
		r.log.Clear()
		write(t, r.origin, 488, 8, 7)
		r.wantOps("ORIGIN W 488+8") // no more exceptions there
		if typ != snapshot.Transient {
			wantHeader(t, c, headerInvalid)
		}
	}
}

func TestC076OverflowKeepsReads(t *testing.T) {
	r, c, s := full(t, snapshot.PersistentOverflow)
	if err := fails(t, s, 48, 8); !errors.Is(err, snapshot.ErrOverflow) || !isFull(err) {
		t.Errorf("error %v", err)
	}
	wantStatus(t, s, "Overflow")
	wantHeader(t, c, headerValid)
	wantRead(t, s, 0, slices.Concat(fill(8, 1), r.old(8, 8), fill(8, 2), r.old(24, 8), fill(8, 3), r.old(40, 100)))
	if err := fails(t, s, 0, 8); !errors.Is(err, snapshot.ErrOverflow) {
		t.Errorf("rewrite of a mapped chunk: %v", err)
	}
	wantRead(t, s, 0, fill(8, 1))
	flush(t, s)
	if len(r.events) != 1 || r.events[0].Kind != snapshot.EventOverflow {
		t.Errorf("events %v", r.events)
	}
}

func TestC077OriginWriteAfterOverflow(t *testing.T) {
	r, c, s := full(t, snapshot.PersistentOverflow)
	fails(t, s, 48, 8)
	write(t, r.origin, 0, 8, 9) // mapped: nothing is needed
	wantStatus(t, s, "Overflow")
	wantRead(t, s, 0, fill(8, 1))
	write(t, r.origin, 480, 1, 9)
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerInvalid)
}

func TestC078OverflowEndsWithAnewAfterGrowth(t *testing.T) {
	r, c, s := full(t, snapshot.PersistentOverflow)
	fails(t, s, 48, 8)
	if err := c.memory.Grow(80 * sector); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, s, "Overflow") // growing alone does not end it
	fails(t, s, 48, 8)
	write(t, r.origin, 480, 8, 9) // but origin writes find the new space
	wantStatus(t, s, "Overflow")
	wantRead(t, s, 480, r.old(480, 8))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = r.attach(c, snapshot.Options{Store: snapshot.PersistentOverflow})
	wantStatus(t, s, "48/80 16")
	write(t, s, 48, 8, 4)
	wantRead(t, s, 48, fill(8, 4))
	wantStatus(t, s, "56/80 16")
}

func TestC079OverflowSurvivesHandover(t *testing.T) {
	r, c, s := full(t, snapshot.PersistentOverflow)
	fails(t, s, 48, 8)
	next, err := r.origin.Load(c.dev, snapshot.Options{Store: snapshot.PersistentOverflow})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if err := s.Suspend(); err != nil {
		t.Fatal(err)
	}
	if err := next.Resume(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, next, "Overflow")
	fails(t, next, 0, 8)
	wantRead(t, next, 0, fill(8, 1))
}

func TestC080OriginReadErrorWhileCopying(t *testing.T) {
	r, c, s := standard(t, 1024, 1024)
	r.disk.Set(failing(blocktest.Read, 0, 8))
	write(t, r.origin, 3, 1, 9)
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerInvalid)
	r.disk.Set(nil)
	wantRead(t, r.origin, 3, fill(1, 9))
	if len(r.events) != 1 || r.events[0].Text != "Invalidating snapshot: Error reading/writing." || !errors.Is(r.events[0].Err, errDisk) {
		t.Errorf("events %v", r.events)
	}

	// The same for a write to the snapshot, which fails.
	r, c, s = standard(t, 1024, 1024)
	r.disk.Set(failing(blocktest.Read, 0, 8))
	fails(t, s, 3, 1)
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerInvalid)
}

func TestC081COWWriteErrorWhileCopying(t *testing.T) {
	for _, by := range []string{"origin", "part of a chunk", "whole chunk"} {
		r, c, s := standard(t, 1024, 1024)
		c.faults.Set(failingWrites(16, 8))
		switch by {
		case "origin":
			write(t, r.origin, 3, 1, 9)
			wantRead(t, r.origin, 3, fill(1, 9))
		case "part of a chunk":
			fails(t, s, 3, 1)
		case "whole chunk":
			fails(t, s, 0, 8)
		}
		wantStatus(t, s, "Invalid")
		wantHeader(t, c, headerInvalid)
	}
}

func TestC082AreaWriteError(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 1024)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, Sync: snapshot.SyncAlways})
	c.faults.Set(failingWrites(8, 8))
	// Writes that share one area write: both fail with it.
	hold := c.faults.Hold(at(blocktest.Write, 16))
	errs := make(chan error, 2)
	put := func(at int64) {
		_, err := s.WriteAt(fill(8, 1), at*sector)
		errs <- err
	}
	go put(0)
	<-hold.Reached()
	go put(8)
	hold.Release()
	for range 2 {
		if err := <-errs; !isInvalid(err) {
			t.Errorf("error %v", err)
		}
	}
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerInvalid)
	c.faults.Set(nil)
	fails(t, s, 16, 8)
	fails(t, s, 0, 8)

	// With durability at flush, it is the flush that fails.
	_, c, s = standard(t, 1024, 1024)
	write(t, s, 0, 8, 1)
	c.faults.Set(failingWrites(8, 8))
	if err := s.Flush(); !isInvalid(err) {
		t.Errorf("flush: %v", err)
	}
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerInvalid)
}

func TestC083ReadErrorOnAMappedChunk(t *testing.T) {
	r, c, s := standard(t, 1024, 1024)
	write(t, s, 0, 8, 1)
	flush(t, s)
	c.faults.Set(failing(blocktest.Read, 16, 8))
	if _, err := s.ReadAt(make([]byte, sector), 0); !errors.Is(err, errDisk) {
		t.Errorf("error %v", err)
	}
	wantStatus(t, s, "24/1024 16")
	wantRead(t, s, 8, r.old(8, 8))
	c.faults.Set(nil)
	wantRead(t, s, 0, fill(8, 1))

	// Likewise a write error there: that write fails, nothing else.
	c.faults.Set(failingWrites(16, 8))
	if err := fails(t, s, 0, 1); !errors.Is(err, errDisk) {
		t.Errorf("error %v", err)
	}
	wantStatus(t, s, "24/1024 16")
}

func TestC084InvalidHeaderIsDurableBeforeTheOriginWrite(t *testing.T) {
	for _, cause := range []string{"full", "copy fails"} {
		r, _, s := full(t, snapshot.Persistent)
		if cause == "copy fails" {
			var c *cow
			r, c, s = standard(t, 1024, 1024)
			c.faults.Set(failingWrites(16, 8))
		}
		r.log.Clear()
		write(t, r.origin, 480, 1, 9)
		wantStatus(t, s, "Invalid")
		ops := r.log.Take()
		header := slices.IndexFunc(ops, func(op blocktest.Op) bool {
			return op.Device == "COW" && op.Overlaps(0, sector) && op.Kind.Changes()
		})
		origin := slices.IndexFunc(ops, func(op blocktest.Op) bool { return op.Device == "ORIGIN" && op.Kind == blocktest.Write })
		if header < 0 || origin < header {
			t.Fatalf("%s: header at %d, origin at %d of\n%s", cause, header, origin, blocktest.Lines(ops))
		}
		durable := ops[header].Kind == blocktest.WriteDurable
		for _, op := range ops[header:origin] {
			durable = durable || op.Device == "COW" && op.Kind == blocktest.Flush
		}
		if !durable {
			t.Errorf("%s: the origin was written before the mark was durable:\n%s", cause, blocktest.Lines(ops))
		}
	}

	// Two origin writes find the store full at once: neither reaches the origin before the mark.
	r, c, _ := full(t, snapshot.Persistent)
	hold := c.faults.Hold(func(op blocktest.Op) bool { return op.Kind.Changes() && op.Overlaps(0, sector) })
	var both sync.WaitGroup
	for i := range int64(2) {
		both.Go(func() { write(t, r.origin, 480+8*i, 1, 9) })
	}
	<-hold.Reached()
	if strings.Contains(r.ops(), "ORIGIN W") {
		t.Error("the origin was written before the mark")
	}
	hold.Release()
	both.Wait()
}

func TestC085TransientStore(t *testing.T) {
	r := newRig(t, 1024)
	noise := blocktest.Pattern(1024*sector, 9)
	c := r.cowOf("COW", noise)
	s := r.attach(c, snapshot.Options{Store: snapshot.Transient, ChunkSectors: 8})
	wantStatus(t, s, "0/1024 0")
	write(t, s, 16, 8, 1)
	write(t, r.origin, 0, 1, 2)
	flush(t, s)
	wantStatus(t, s, "16/1024 0")
	wantRead(t, s, 0, r.old(0, 16))
	r.log.Clear()
	b := c.memory.Bytes()
	if !bytes.Equal(b[:8*sector], fill(8, 1)) || !bytes.Equal(b[8*sector:16*sector], r.old(0, 8)) || !bytes.Equal(b[16*sector:], noise[16*sector:]) {
		t.Error("the COW device holds more than data from sector 0 on")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = r.attach(c, snapshot.Options{Store: snapshot.Transient, ChunkSectors: 8})
	wantStatus(t, s, "0/1024 0")
	wantRead(t, s, 16, r.old(16, 8))
	r.log.Clear()
	write(t, s, 16, 8, 3)
	r.wantOps("COW W 0+8") // and no metadata
	if _, err := r.origin.LoadMerge(r.cow("COW2", 1024).dev, snapshot.Options{Store: snapshot.Transient}); !errors.Is(err, store.ErrNoMerge) {
		t.Errorf("merge of a transient store: %v", err)
	}
}

func TestC086StatusTexts(t *testing.T) {
	usage := store.Usage{Allocated: 24, Total: 1024, Metadata: 16}
	for _, c := range []struct {
		state      snapshot.State
		overflowed bool
		want       string
	}{
		{snapshot.StateOK, false, "24/1024 16"},
		{snapshot.StateOverflow, true, "Overflow"},
		{snapshot.StateInvalid, false, "Invalid"},
		{snapshot.StateInvalid, true, "Invalid"},
		{snapshot.StateMerging, false, "24/1024 16"},
		{snapshot.StateMerging, true, "Overflow"},
		{snapshot.StateMergeFailed, false, "Merge failed"},
		{snapshot.StateMergeFailed, true, "Merge failed"},
	} {
		st := snapshot.Status{Target: snapshot.TargetSnapshot, Length: 4096, State: c.state, Overflowed: c.overflowed, Usage: usage}
		if got, want := st.Line(), "0 4096 snapshot "+c.want; got != want {
			t.Errorf("%v, overflowed %v: %q, want %q", c.state, c.overflowed, got, want)
		}
	}

	// An overflowed snapshot whose merge fails says so before it says Overflow, and both for real.
	r, _, s := full(t, snapshot.PersistentOverflow)
	fails(t, s, 48, 8)
	m := r.merging(s)
	wantStatus(t, m, "Overflow")
	wantStatus(t, s, "Invalid")
	r.disk.Set(failingWrites(0, 1024))
	if _, err := m.Step(0); !errors.Is(err, snapshot.ErrMergeFailed) {
		t.Fatalf("step: %v", err)
	}
	wantStatus(t, m, "Merge failed")
	r.disk.Set(nil)
	finish(t, m)
	wantStatus(t, m, "Overflow")
	if st := m.Status(); !st.Finished() || st.Usage.String() != "16/40 16" {
		t.Errorf("progress is hidden: %+v", st) // H11
	}
}

func TestC087TableTexts(t *testing.T) {
	for _, c := range []struct {
		opts snapshot.Options
		want string
	}{
		{snapshot.Options{ChunkSectors: 8}, "0 1024 snapshot 7:0 7:1 P 8"},
		{snapshot.Options{ChunkSectors: 16, Store: snapshot.PersistentOverflow}, "0 1024 snapshot 7:0 7:1 PO 16"},
		{snapshot.Options{ChunkSectors: 32, Store: snapshot.Transient}, "0 1024 snapshot 7:0 7:1 N 32"},
		{snapshot.Options{}, "0 1024 snapshot 7:0 7:1 P 32"},
		{snapshot.Options{ChunkSectors: 8, Features: snapshot.Features{DiscardZeroesCOW: true}},
			"0 1024 snapshot 7:0 7:1 P 8 1 discard_zeroes_cow"},
		{snapshot.Options{ChunkSectors: 8, Features: snapshot.Features{DiscardZeroesCOW: true, DiscardPassdownOrigin: true}},
			"0 1024 snapshot 7:0 7:1 P 8 2 discard_zeroes_cow discard_passdown_origin"},
	} {
		r := newRig(t, 1024)
		s := r.attach(r.cow("COW", 1024), c.opts)
		got := s.Status().Table("7:0", "7:1")
		if got != c.want {
			t.Errorf("table %q, want %q", got, c.want)
		}
		// What is printed can be read again.
		table, err := kernelcase.ParseTable(got)
		if err != nil || table.String() != got {
			t.Errorf("%q was read as %q, %v", got, table, err)
		}
	}
	// A table that says another chunk size than the disk shows the disk's.
	r, c, s := standard(t, 1024, 1024)
	s.Close()
	s = r.attach(c, snapshot.Options{ChunkSectors: 32})
	if got := s.Status().Table("7:0", "7:1"); got != "0 1024 snapshot 7:0 7:1 P 8" {
		t.Errorf("table %q", got)
	}
}

func TestC088OriginTable(t *testing.T) {
	table, err := kernelcase.ParseTable("0 1024 snapshot-origin 7:0")
	if err != nil {
		t.Fatal(err)
	}
	if table.Origin != "7:0" || table.COW != "" || table.Target != snapshot.TargetOrigin {
		t.Errorf("table %+v", table)
	}
	if got := table.String(); got != "0 1024 snapshot-origin 7:0" {
		t.Errorf("table %q", got)
	}
	for _, bad := range []string{"0 1024 snapshot-origin", "0 1024 snapshot-origin 7:0 7:1"} {
		if _, err := kernelcase.ParseTable(bad); !errors.Is(err, kernelcase.ErrOriginArguments) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	// Its status is the empty string: an Origin has none, by its type.
	if _, has := any(snapshot.NewOrigin(block.NewMemory(sector))).(interface{ Status() snapshot.Status }); has {
		t.Error("an origin has a status")
	}
}

func TestC089PendingAllocationShows(t *testing.T) {
	r, c, s := standard(t, 1024, 1024)
	hold := c.faults.Hold(at(blocktest.Write, 16))
	wait := held(hold, func() { write(t, r.origin, 0, 1, 1) })
	wantStatus(t, s, "24/1024 16")
	if n := s.Status().Exceptions; n != 0 {
		t.Errorf("%d exceptions while the copy is under way", n)
	}
	hold.Release()
	wait()
	wantStatus(t, s, "24/1024 16")
}

// The usage numbers that a kernel printed (docs/spec/dm-snapshot.md §6.6).
func TestC089KernelUsageNumbers(t *testing.T) {
	for _, c := range []struct {
		chunk, cow, exceptions int64
		want                   string
	}{
		{8, 1024, 0, "16/1024 16"}, {8, 1024, 1, "24/1024 16"}, {8, 1024, 7, "72/1024 16"}, {8, 40, 3, "40/40 16"},
		{1, 400, 31, "33/400 2"}, {1, 400, 32, "35/400 3"}, {1, 400, 33, "36/400 3"}, {1, 400, 64, "68/400 4"},
		{1, 400, 70, "74/400 4"}, {8, 2072, 256, "2072/2072 24"},
	} {
		r := newRig(t, 4096)
		d := r.cow("COW", c.cow)
		s := r.attach(d, snapshot.Options{ChunkSectors: uint32(c.chunk)})
		for i := range c.exceptions {
			write(t, s, 2*i*c.chunk%4096+2*i*c.chunk/4096*c.chunk, c.chunk, 1)
		}
		wantStatus(t, s, c.want)
		flush(t, s)
		wantStatus(t, s, c.want)
		s.Close()
		wantStatus(t, r.attach(d, snapshot.Options{}), c.want)
	}
}
