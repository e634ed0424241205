package snapshot_test

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// The tests of this file have the COW device behind a page cache that does what Linux' does after a failed flush: what was
// to be written is clean, readable, and not on the disk.

// cachedCOW is an empty store of 4 KiB chunks on a disk behind a page cache.
func cachedCOW(t *testing.T) (disk *block.Memory, cache *blocktest.PageCache) {
	t.Helper()
	disk = block.NewMemory(1 << 20)
	cache = blocktest.NewPageCache(disk, nil)
	if _, err := store.Create(cache.Open(), ondisk.Layout{ChunkSectors: 8}, false); err != nil {
		t.Fatal(err)
	}
	return disk, cache
}

// TestSlotsOfAFailedFlushAreNotTrusted: slots that a failed flush left in the cache are not loaded by the next
// process. If they were, its flushes would find nothing to write, the origin would be overwritten, and a power cut would
// leave neither the exception nor the old data.
func TestSlotsOfAFailedFlushAreNotTrusted(t *testing.T) {
	disk, cache := cachedCOW(t)
	before := blocktest.Pattern(64<<10, 1)
	origin := block.MemoryFrom(before)

	// The first process: the second flush of a Sync, that of the slots, fails.
	first, err := snapshot.NewOrigin(origin).Attach(cache.Open(), snapshot.Options{OnFull: snapshot.FullFail})
	if err != nil {
		t.Fatal(err)
	}
	write(t, first, 0, 8, 7)
	flushes := 0
	cache.Set(func(op blocktest.Op) error {
		if op.Kind != blocktest.Flush && op.Kind != blocktest.WriteDurable {
			return nil
		}
		if flushes++; flushes == 2 {
			return syscall.EIO
		}
		if flushes > 2 {
			return syscall.ENXIO // the invalid mark can't be made either: the process is killed here
		}
		return nil
	})
	if err := first.Flush(); err == nil {
		t.Fatal("the flush succeeded")
	}
	cache.Set(nil)
	// Only the slots are of interest here, not the mark in the header, which the failed process has left in the cache.
	header := make([]byte, sector)
	disk.ReadAt(header, 0)
	if ondisk.DecodeHeader(header).Valid != 1 {
		t.Fatal("the mark reached the disk")
	}
	if err := cache.Open().DropCache(0, sector); err != nil {
		t.Fatal(err)
	}

	// The second process.
	o := snapshot.NewOrigin(origin)
	second, err := o.Attach(cache.Open(), snapshot.Options{OnFull: snapshot.FullFail})
	if err != nil {
		t.Fatal(err)
	}
	if n := second.Status().Exceptions; n != 0 {
		t.Errorf("%d exceptions were loaded that are not on the disk", n)
	}
	if err := o.WriteDurableAt(fill(8, 9), 0); err != nil {
		t.Fatal(err)
	}
	cache.PowerCut()

	third, err := snapshot.NewOrigin(origin).Attach(cache.Open(), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, third, 0, 8); !bytes.Equal(got, before[:4096]) {
		t.Errorf("after the power cut the snapshot shows %x… instead of its past", got[:4])
	}
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	checkStore(t, disk)
}

// TestLostDataIsNotShown: the flush of preserved data fails for want of space and the page cache drops it. The snapshot,
// which is protected, shows no zeros for its past: reads, changes and block status of that chunk fail, as an I/O error and
// not for want of space. All else goes on, and a new process shows the past.
func TestLostDataIsNotShown(t *testing.T) {
	disk, cache := cachedCOW(t)
	cache.ForgetLost()
	before := blocktest.Pattern(64<<10, 1)
	origin := block.MemoryFrom(before)
	o := snapshot.NewOrigin(origin)
	s, err := o.Attach(cache.Open(), snapshot.Options{OnFull: snapshot.FullFail, Features: snapshot.Features{DiscardZeroesCOW: true}})
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, 0, 1, 7)
	flush(t, s)
	write(t, s, 1, 1, 8)                                 // in place, and not flushed
	cache.Set(failOnce(blocktest.Flush, syscall.ENOSPC)) // the next one succeeds, and says nothing
	if err := fails(t, o, 80, 1); !errors.Is(err, snapshot.ErrNoRoom) {
		t.Fatalf("the origin write: %v", err)
	}
	cache.Set(nil)
	const at, n = 80 * sector, 8 * sector
	_, readErr := s.ReadAt(make([]byte, sector), at)
	_, longErr := s.ReadAt(make([]byte, 64<<10), 0)
	_, extentsErr := s.Extents(at, n)
	for what, err := range map[string]error{"read": readErr, "long read": longErr, "extents": extentsErr, "write": fails(t, s, 80, 8),
		"zero": s.ZeroAt(at, n, 0), "discard": s.Discard(at, n)} {
		if !errors.Is(err, store.ErrDataLost) || block.IsNoSpace(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	wantRead(t, s, 0, fill(1, 7))
	if got := read(t, s, 1, 1); !bytes.Equal(got, fill(1, 8)) && !bytes.Equal(got, before[sector:2*sector]) {
		t.Errorf("a chunk that was changed in place shows %x…, neither old nor new", got[:4])
	}
	wantRead(t, s, 88, before[88*sector:])
	if err := s.Close(); err == nil {
		t.Error("close: nothing is reported")
	}

	again, err := snapshot.NewOrigin(origin).Attach(cache.Open(), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	wantRead(t, again, 80, before[80*sector:])
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	checkStore(t, disk)
}

// TestMergeIsDoneWhenItIsDurable: the flush of the cleared slots fails, in a live merge. The merge is not complete, says
// what makes it go on, and never becomes complete in this process where the device keeps its failure. After a
// restart it goes on from what is on the disk; once it is complete a power cut brings nothing back.
func TestMergeIsDoneWhenItIsDurable(t *testing.T) {
	for _, sticky := range []bool{false, true} {
		disk, cache := cachedCOW(t)
		origin := block.NewMemory(64 << 10)
		var cow block.Device = cache.Open()
		if sticky {
			cow = blocktest.NewFaulty(cow, nil) // keeps a failed flush, as block.File does
		}
		o := snapshot.NewOrigin(origin)
		s, err := o.Attach(cow, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		write(t, s, 0, 8, 7)
		m, err := s.BeginMerge()
		if err != nil {
			t.Fatal(err)
		}
		// The slots are cleared in the cache, and are not on the disk.
		fail := func(op blocktest.Op) error {
			if op.Kind == blocktest.WriteDurable {
				return syscall.EIO
			}
			return nil
		}
		cache.Set(fail)
		if _, err := m.Step(0); !errors.Is(err, snapshot.ErrMergeFailed) {
			t.Fatalf("step: %v", err)
		}
		// A reading process must not find the store empty.
		st, err := store.Open(cache.Open())
		if err != nil {
			t.Fatal(err)
		}
		if st.Len() != 1 {
			t.Errorf("%d exceptions were loaded, 1 is on the disk", st.Len())
		}
		// As long as the device fails, no step says that nothing is left.
		for range 3 {
			if n, err := m.Step(0); err == nil {
				t.Fatalf("step: %d merged, and no error, while the slots can't be cleared", n)
			}
		}
		cache.Set(nil)
		if sticky {
			m.Close()
			o = snapshot.NewOrigin(origin) // a restart
			if m, err = o.LoadMerge(cache.Open(), snapshot.Options{}); err != nil {
				t.Fatal(err)
			}
			if err := m.Resume(); err != nil {
				t.Fatal(err)
			}
		}
		finish(t, m)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		write(t, o, 0, 8, 9) // newer than what was merged
		flush(t, o)
		cache.PowerCut()

		again, err := snapshot.NewOrigin(origin).LoadMerge(cache.Open(), snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if n := again.Store().Len(); n != 0 {
			t.Errorf("sticky %v: %d exceptions came back after the merge was complete", sticky, n)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
		checkStore(t, disk)
	}
}

// undropped is a device whose cache can't be dropped.
type undropped struct{ block.Forward }

func (undropped) DropCache(off, n int64) error { return nil }

// TestCompleteWritesTheEndAgain: the same where nothing drops the cache. That a store is empty was only read, so its end
// is written again before the merge is complete.
func TestCompleteWritesTheEndAgain(t *testing.T) {
	disk, cache := cachedCOW(t)
	origin := block.NewMemory(64 << 10)
	s, err := snapshot.NewOrigin(origin).Attach(cache.Open(), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, 0, 8, 7)
	flush(t, s)
	m, err := s.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	cache.Set(blocktest.FailKind(blocktest.WriteDurable, syscall.EIO))
	if _, err := m.Step(0); err == nil {
		t.Fatal("the step succeeded")
	}
	cache.Set(nil)
	m.Close()

	again, err := snapshot.NewOrigin(origin).LoadMerge(undropped{block.NewForward(cache.Open())}, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if n := again.Store().Len(); n != 0 {
		t.Fatalf("%d exceptions: the cache shows cleared slots, or this test is for nothing", n)
	}
	if err := again.Resume(); err != nil {
		t.Fatal(err)
	}
	finish(t, again)
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	cache.PowerCut()
	st, err := store.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	if st.Len() != 0 {
		t.Errorf("%d exceptions came back after the merge was complete", st.Len())
	}
	checkStore(t, disk)
}

// TestReopenIsSaid: a step that fails because a device keeps an old failure says that the devices have to be opened again.
func TestReopenIsSaid(t *testing.T) {
	for _, which := range []string{"ORIGIN", "COW"} {
		r, c, s := standard(t, 1024, 1024)
		write(t, s, 0, 8, 1)
		m := r.merging(s)
		faults := r.disk
		if which == "COW" {
			faults = c.faults
		}
		faults.Set(failing(blocktest.Read, 0, 1024))
		if which == "COW" {
			if _, err := m.Step(0); !errors.Is(err, snapshot.ErrMergeFailed) || errors.Is(err, snapshot.ErrReopen) {
				t.Errorf("%s, read error: %v", which, err)
			}
		}
		faults.Set(blocktest.FailKind(blocktest.Flush, errDisk))
		for range 2 {
			if _, err := m.Step(0); which == "ORIGIN" && !errors.Is(err, snapshot.ErrReopen) {
				t.Errorf("%s, failed flush: %v", which, err)
			}
			faults.Set(nil)
		}
	}
}

// TestInvalidMarkIsWrittenAgain: a mark that is only in the cache is made durable before the origin changes without regard to
// the store.
func TestInvalidMarkIsWrittenAgain(t *testing.T) {
	disk, cache := cachedCOW(t)
	st, err := store.Open(cache.Open())
	if err != nil {
		t.Fatal(err)
	}
	fails := blocktest.FailKind(blocktest.WriteDurable, syscall.EIO)
	cache.Set(func(op blocktest.Op) error {
		if op.Kind == blocktest.Flush {
			return syscall.EIO
		}
		return fails(op)
	})
	if err := st.Invalidate(errDisk); err == nil {
		t.Fatal("the mark was made")
	}
	cache.Set(nil)
	cache.Open().Flush() // the failure is reported to somebody else
	o := snapshot.NewOrigin(block.NewMemory(64 << 10))
	s, err := o.Attach(cache.Open(), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, s, "Invalid")
	cache.PowerCut()
	if st, err := store.Open(disk); err != nil || !isInvalid(st.Err()) {
		t.Errorf("after the power cut the store is valid (%v), and the origin may have changed", err)
	}
	s.Close()
}
