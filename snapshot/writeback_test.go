package snapshot_test

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/writeback"
)

// writeBackRig is a standard rig that keeps origin writes in memory until they are asked for.
func writeBackRig(t *testing.T) (*rig, *cow, *snapshot.Snapshot) {
	r := newRig(t, 4096, snapshot.WriteBack(1<<20, time.Hour))
	c := r.cow("COW", 4096)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8})
	r.log.Clear()
	return r, c, s
}

// TestWriteBackWaitsForExceptions: a write in memory reaches the origin after the flush of its exception, when
// somebody flushes, and is read before that.
func TestWriteBackWaitsForExceptions(t *testing.T) {
	r, _, s := writeBackRig(t)
	write(t, r.origin, 81, 2, 1)
	r.wantOps("ORIGIN R 80+8; COW W 16+8")
	wantRead(t, r.origin, 80, slices.Concat(r.old(80, 1), fill(2, 1), r.old(83, 5)))
	r.log.Clear()
	wantRead(t, s, 80, r.old(80, 8))
	r.log.Clear()
	flush(t, r.origin)
	r.wantOps("COW F; COW W 8+8; COW F; ORIGIN W 81+2; ORIGIN F")
	wantRead(t, r.origin, 81, fill(2, 1))
	write(t, r.origin, 83, 1, 3) // is kept: nothing to wait for
	r.log.Clear()
	flush(t, r.origin)
	r.wantOps("ORIGIN F")
}

// TestWriteBackSharesFlushes: a thousand writes in memory under k snapshots take two flushes a snapshot, and neighbours
// one write.
func TestWriteBackSharesFlushes(t *testing.T) {
	for k := range 4 {
		r := newRig(t, 16384, snapshot.WriteBack(64<<20, time.Hour))
		for i := range k {
			r.attach(r.cow(string(rune('A'+i)), 32768), snapshot.Options{ChunkSectors: 8})
		}
		for i := range int64(1000) {
			write(t, r.origin, i*7%1000*8, 8, byte(i))
		}
		r.log.Clear()
		flush(t, r.origin)
		got := r.cost()
		if got.flushes != int64(2*k+1) || k > 0 && got.writes > int64(4+8*k) {
			t.Errorf("%d snapshots: %v", k, got)
		}
		for i := range int64(1000) {
			wantRead(t, r.origin, i*7%1000*8, fill(8, byte(i)))
		}
	}
}

// TestWrittenBackForWhoNeedsIt: operations that read the origin's device directly find everything there.
func TestWrittenBackForWhoNeedsIt(t *testing.T) {
	dirty := fill(1, 1)
	for _, c := range []struct {
		name string
		do   func(t *testing.T, r *rig, s *snapshot.Snapshot)
	}{
		{"flush", func(t *testing.T, r *rig, s *snapshot.Snapshot) { flush(t, r.origin) }},
		{"close of the snapshot", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}},
		{"another snapshot", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			other := r.attach(r.cow("OTHER", 4096), snapshot.Options{ChunkSectors: 8})
			wantRead(t, other, 81, dirty)
			wantRead(t, s, 81, r.old(81, 1))
		}},
		{"merge", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			m := r.merging(s)
			wantRead(t, r.origin, 81, r.old(81, 1))
			finish(t, m)
			dirty = r.old(81, 1)
		}},
		{"extents", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			for off := int64(0); off < 100*sector; {
				es, err := r.origin.Extents(off, 100*sector-off)
				if err != nil || len(es) == 0 {
					t.Fatal(es, err)
				}
				for _, e := range es {
					if off < 82*sector && off+e.Length > 81*sector && e.Flags != 0 {
						t.Errorf("what is in memory has the flags %v", e.Flags)
					}
					off += e.Length
				}
			}
			flush(t, r.origin)
		}},
		{"zeros over it", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			if err := r.origin.ZeroAt(0, 100*sector, 0); err != nil {
				t.Fatal(err)
			}
			dirty = fill(1, 0)
		}},
		{"FUA over it", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			if err := r.origin.WriteDurableAt(fill(3, 7), 80*sector); err != nil {
				t.Fatal(err)
			}
			dirty = fill(1, 7)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dirty = fill(1, 1)
			r, _, s := writeBackRig(t)
			write(t, r.origin, 81, 1, 1)
			c.do(t, r, s)
			wantRead(t, r.origin, 81, dirty)
			if got := r.memory.Bytes()[81*sector : 82*sector]; !bytes.Equal(got, dirty) {
				t.Errorf("the device has %x…, want %x…", got[:4], dirty[:4])
			}
		})
	}
}

// TestWriteBackInTime: nobody has to ask. What is dirty is written after its delay, and when there is much of it.
func TestWriteBackInTime(t *testing.T) {
	for name, limits := range map[string]struct {
		limit int64
		delay time.Duration
	}{"after a while": {1 << 20, time.Millisecond}, "half the limit": {64 << 10, time.Hour}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 4096, snapshot.WriteBack(limits.limit, limits.delay))
			r.attach(r.cow("COW", 8192), snapshot.Options{ChunkSectors: 8})
			for i := range int64(8) {
				write(t, r.origin, 8*i, 8, 9)
			}
			for began := time.Now(); !bytes.Equal(r.memory.Bytes()[:64*sector], fill(64, 9)); time.Sleep(time.Millisecond) {
				if time.Since(began) > 10*time.Second {
					t.Fatal("nothing was written")
				}
			}
		})
	}
}

// TestWritesWhileWritingBack: what is written and read while an older version of it is being written out.
func TestWritesWhileWritingBack(t *testing.T) {
	r, _, _ := writeBackRig(t)
	write(t, r.origin, 80, 8, 1)
	write(t, r.origin, 200, 8, 1)
	h := r.disk.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Write })
	defer h.Release()
	flushed := make(chan error)
	go func() { flushed <- r.origin.Flush() }()
	<-h.Reached()
	wantRead(t, r.origin, 80, fill(8, 1))
	write(t, r.origin, 82, 2, 2) // over what is being written
	wantRead(t, r.origin, 81, slices.Concat(fill(1, 1), fill(2, 2), fill(1, 1)))
	zeroed := make(chan error)
	go func() { zeroed <- r.origin.ZeroAt(202*sector, 2*sector, 0) }() // mustn't go before what is being written
	select {
	case <-zeroed:
		t.Error("zeros went past what is being written")
	case <-time.After(20 * time.Millisecond):
	}
	h.Release()
	for _, done := range []chan error{flushed, zeroed} {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	want := slices.Concat(fill(2, 1), fill(2, 2), fill(4, 1))
	wantRead(t, r.origin, 80, want)
	wantRead(t, r.origin, 200, slices.Concat(fill(2, 1), fill(2, 0), fill(4, 1)))
	flush(t, r.origin)
	if got := r.memory.Bytes()[80*sector : 88*sector]; !bytes.Equal(got, want) {
		t.Error("the older version came last")
	}
}

// A lateDevice has read what it was asked for, and then is slow to say so, once.
type lateDevice struct {
	*block.Memory
	once          sync.Once
	read, release chan struct{}
}

func (d *lateDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Memory.ReadAt(p, off)
	if off == 80*sector && len(p) == 4*sector {
		d.once.Do(func() {
			close(d.read)
			<-d.release
		})
	}
	return n, err
}

// TestReadMeetsWriteOut: a read that has read the device before dirty bytes are written there, and looks for them
// when they have gone, reads again.
func TestReadMeetsWriteOut(t *testing.T) {
	disk := &lateDevice{Memory: block.NewMemory(4096 * sector), read: make(chan struct{}), release: make(chan struct{})}
	origin := snapshot.NewOrigin(disk, snapshot.WriteBack(1<<20, time.Hour))
	cow := block.NewMemory(4096 * sector)
	s, err := origin.Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	write(t, origin, 80, 8, 1)
	got := make([]byte, 4*sector)
	done := make(chan error)
	go func() {
		_, err := origin.ReadAt(got, 80*sector)
		done <- err
	}()
	<-disk.read
	flush(t, origin)
	close(disk.release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, fill(4, 1)) {
		t.Error("the read shows what was there before the write")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	checkStore(t, cow)
}

// TestWriteBackThatFails: Flush fails; the bytes are still read, and nothing more is acknowledged, until the device
// takes them.
func TestWriteBackThatFails(t *testing.T) {
	r, _, s := writeBackRig(t)
	write(t, r.origin, 80, 8, 1)
	r.disk.Set(failingWrites(80, 8))
	for range 2 {
		if err := r.origin.Flush(); !errors.Is(err, errDisk) {
			t.Fatalf("flush: %v", err)
		}
	}
	wantRead(t, r.origin, 80, fill(8, 1))
	if err := fails(t, r.origin, 300, 8); !errors.Is(err, errDisk) {
		t.Errorf("a write after the failure: %v", err)
	}
	wantRead(t, r.origin, 300, r.old(300, 8))
	r.disk.Set(nil)
	write(t, r.origin, 300, 8, 2)
	flush(t, r.origin)
	wantRead(t, r.origin, 80, fill(8, 1))
	wantRead(t, r.origin, 300, fill(8, 2))
	wantRead(t, s, 80, r.old(80, 8))
	if !bytes.Equal(r.memory.Bytes()[80*sector:88*sector], fill(8, 1)) {
		t.Error("the bytes never reached the device")
	}
}

// TestWriteBackOfALostStore: the exceptions can't be made durable. With the kernel's policy the snapshot becomes
// invalid and the origin goes on; where the snapshot is to be protected the bytes stay dirty, and Flush fails,
// until it is closed: they were acknowledged, so it becomes invalid after all.
func TestWriteBackOfALostStore(t *testing.T) {
	t.Run("I/O", func(t *testing.T) {
		r, c, s := writeBackRig(t)
		write(t, r.origin, 80, 8, 1)
		c.faults.Set(failingWrites(8, 8))
		flush(t, r.origin)
		wantStatus(t, s, "Invalid")
		if !bytes.Equal(r.memory.Bytes()[80*sector:88*sector], fill(8, 1)) {
			t.Error("the origin was not written")
		}
	})
	t.Run("no space", func(t *testing.T) {
		r := newRig(t, 4096, snapshot.WriteBack(1<<20, time.Hour))
		c := r.cow("COW", 4096)
		s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail})
		write(t, r.origin, 80, 8, 1)
		c.faults.Set(func(op blocktest.Op) error {
			if op.Kind == blocktest.Write && op.Overlaps(8*sector, 8*sector) {
				return syscall.ENOSPC
			}
			return nil
		})
		if err := r.origin.Flush(); !errors.Is(err, snapshot.ErrNoRoom) {
			t.Fatalf("flush: %v", err)
		}
		wantRead(t, r.origin, 80, fill(8, 1))
		if bytes.Equal(r.memory.Bytes()[80*sector:88*sector], fill(8, 1)) {
			t.Error("the origin changed before its exception was durable")
		}
		s.Close()
		if !bytes.Equal(r.memory.Bytes()[80*sector:88*sector], fill(8, 1)) {
			t.Error("acknowledged bytes were dropped")
		}
		wantHeader(t, c, headerInvalid)
	})
}

// TestOneFullSnapshotCostsNoOther: the store of one snapshot finds no space for its slots, so that an acknowledged origin
// write stays in memory. Another snapshot, which has what it needs, is closed and stays valid.
func TestOneFullSnapshotCostsNoOther(t *testing.T) {
	r := newRig(t, 4096, snapshot.WriteBack(1<<20, time.Hour))
	opts := snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail}
	good, full := r.cow("GOOD", 4096), r.cow("FULL", 4096)
	s, without := r.attach(good, opts), r.attach(full, opts)
	write(t, r.origin, 80, 8, 1)
	full.faults.Set(noSpaceFor(8, 8))
	if err := r.origin.Flush(); !errors.Is(err, snapshot.ErrNoRoom) {
		t.Fatalf("flush: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	wantHeader(t, good, headerValid)
	wantStatus(t, without, "24/4096 16")
	if err := r.origin.Flush(); !errors.Is(err, snapshot.ErrNoRoom) {
		t.Errorf("flush: %v", err)
	}
	wantHeader(t, full, headerValid)
}

// TestFinishOfAnOrigin: what waits in memory for a snapshot's exceptions, when they can't be made durable. The snapshot
// is given up for acknowledged writes, where the disk takes them; where it does not, or the snapshot can't be marked
// invalid, the writes are given up.
func TestFinishOfAnOrigin(t *testing.T) {
	for _, c := range []struct {
		name   string
		noRoom bool                     // on the origin's disk
		cow    func(blocktest.Op) error // how the COW device fails
		header string                   // of the COW device afterwards
		lost   bool                     // the write
	}{
		{"no space for slots", false, noSpaceFor(8, 8), headerInvalid, false},
		{"nor on the disk", true, noSpaceFor(8, 8), headerValid, true},
		{"no mark either", false, failChanges, headerValid, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			memory := block.MemoryFrom(blocktest.Pattern(4096*sector, 1))
			before := memory.Bytes()
			quota := blocktest.NewQuota(memory, 1<<20, true)
			o := snapshot.NewOrigin(quota, snapshot.WriteBack(1<<20, time.Hour))
			r := &rig{t: t}
			d := r.cow("COW", 4096)
			s, err := o.Attach(d.dev, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			write(t, o, 80, 8, 1)
			d.faults.Set(c.cow)
			if c.noRoom {
				quota.SetLimit(0)
			}
			err = o.Finish()
			var lost *writeback.LostError
			if errors.As(err, &lost) != c.lost || !c.lost && err != nil {
				t.Errorf("finish: %v", err)
			}
			wantHeader(t, d, c.header)
			want := fill(8, 1)
			if c.lost {
				want = before[80*sector : 88*sector]
			}
			if !bytes.Equal(memory.Bytes()[80*sector:88*sector], want) {
				t.Error("the disk has something else")
			}
		})
	}
}
