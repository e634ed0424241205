package snapshot_test

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// wantNoRoom wants a write to be refused to protect a snapshot.
func wantNoRoom(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, snapshot.ErrNoRoom) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("error %v, want ErrNoRoom", err)
	}
}

// kinds returns the events so far.
func (r *rig) kinds() (ks []snapshot.EventKind) {
	for _, e := range r.events {
		ks = append(ks, e.Kind)
	}
	return ks
}

func TestFullFailProtectsBothSides(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 40)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail})
	for i := range int64(3) {
		write(t, s, 16*i, 8, byte(i+1))
	}
	view, before := readAll(t, s), readAll(t, r.origin)
	for range 2 {
		wantNoRoom(t, fails(t, s, 48, 8))
		wantNoRoom(t, fails(t, s, 49, 1))
		wantNoRoom(t, fails(t, r.origin, 480, 1))
	}
	if got := readAll(t, r.origin); !bytes.Equal(got, before) {
		t.Error("a refused write changed the origin")
	}
	if got := readAll(t, s); !bytes.Equal(got, view) {
		t.Error("a refused write changed the snapshot")
	}
	wantStatus(t, s, "40/40 16")
	wantHeader(t, c, headerValid)
	if !s.Status().Full {
		t.Error("status does not say that it is full")
	}
	if !slices.Equal(r.kinds(), []snapshot.EventKind{snapshot.EventFull}) {
		t.Errorf("events %v", r.kinds())
	}
	// What needs no room goes on.
	write(t, s, 16, 8, 9)
	write(t, r.origin, 0, 8, 9)
	flush(t, s)
	// And everything when there is room.
	if err := c.memory.Grow(80 * sector); err != nil {
		t.Fatal(err)
	}
	write(t, r.origin, 480, 1, 7)
	write(t, s, 48, 8, 4)
	if s.Status().Full {
		t.Error("status says that it is full")
	}
	wantRead(t, s, 480, r.old(480, 8))
	wantStatus(t, s, "56/80 16")
}

func TestFullPauseWaitsForRoom(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 24)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullPause})
	write(t, s, 0, 8, 1)
	var both sync.WaitGroup
	both.Go(func() { write(t, s, 48, 8, 2) })
	both.Go(func() { write(t, r.origin, 480, 1, 3) })
	for r.origin.Paused() != 2 {
	}
	wantRead(t, s, 480, r.old(480, 8)) // nothing is held up but the two
	wantRead(t, r.origin, 480, r.old(480, 8))
	other := r.attach(r.cow("OTHER", 1024), snapshot.Options{ChunkSectors: 8})
	write(t, other, 8, 8, 5)
	if err := c.memory.Grow(80 * sector); err != nil {
		t.Fatal(err)
	}
	r.origin.RetryPaused()
	both.Wait()
	wantRead(t, s, 48, fill(8, 2))
	wantRead(t, s, 480, r.old(480, 8))
	wantRead(t, r.origin, 480, fill(1, 3))
	wantRead(t, other, 480, r.old(480, 8)) // attached before the origin write went on
}

func TestFullPauseEnds(t *testing.T) {
	// With the snapshot that it waits for: the origin write goes on, the snapshot's own fails.
	r := newRig(t, 1024)
	s := r.attach(r.cow("COW", 16), snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullPause})
	var both sync.WaitGroup
	var err error
	both.Go(func() { _, err = s.WriteAt(fill(1, 1), 0) })
	both.Go(func() { write(t, r.origin, 480, 1, 3) })
	for r.origin.Paused() != 2 {
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	r.origin.RetryPaused()
	both.Wait()
	if err == nil {
		t.Error("a write to a closed snapshot succeeded")
	}
	wantRead(t, r.origin, 480, fill(1, 3))

	// With the process: both fail.
	r = newRig(t, 1024)
	s = r.attach(r.cow("COW", 16), snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullPause})
	both.Go(func() { wantNoRoom(t, fails(t, s, 0, 1)) })
	both.Go(func() { wantNoRoom(t, fails(t, r.origin, 480, 1)) })
	for r.origin.Paused() != 2 {
	}
	r.origin.EndPauses()
	both.Wait()
	wantNoRoom(t, fails(t, s, 0, 1)) // and does not wait
	wantStatus(t, s, "16/16 16")
}

func TestGrowthMakesRoom(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 24)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail, Grow: snapshot.Growth{Step: 1, Max: 60 * sector}})
	var all sync.WaitGroup
	for i := range int64(5) {
		all.Go(func() { write(t, s, 16*i, 8, byte(i+1)) })
	}
	all.Wait()
	wantStatus(t, s, "56/56 16") // two chunks at a time, as few as are needed
	wantNoRoom(t, fails(t, s, 480, 8))
	wantStatus(t, s, "56/60 16")
	for i := range int64(5) {
		wantRead(t, s, 16*i, fill(8, byte(i+1)))
	}
	if !slices.Contains(r.kinds(), snapshot.EventGrown) {
		t.Errorf("events %v", r.kinds())
	}
}

// taken is a COW device with somebody who takes the room that was made before its owner does.
type taken struct {
	*block.Memory
	take func()
}

func (d *taken) Grow(size int64) error {
	err := d.Memory.Grow(size)
	d.take()
	return err
}

// TestGrowthGoesOn: the room that was made goes to somebody else, twice. More is made.
func TestGrowthGoesOn(t *testing.T) {
	origin := snapshot.NewOrigin(block.NewMemory(1024 * sector))
	cow := &taken{Memory: block.NewMemory(24 * sector)}
	s, err := origin.Attach(cow, snapshot.Options{ChunkSectors: 8, Grow: snapshot.Growth{Step: 1}})
	if err != nil {
		t.Fatal(err)
	}
	others := 0
	cow.take = func() {
		if others < 2 {
			others++
			for i := range int64(2) {
				write(t, s, 64*int64(others)+8*i, 8, byte(others))
			}
		}
	}
	write(t, s, 0, 8, 10)
	write(t, s, 8, 8, 11)
	if others != 2 {
		t.Fatalf("%d others took the room that was made, want 2", others)
	}
	wantRead(t, s, 0, append(fill(8, 10), fill(8, 11)...))
	wantStatus(t, s, "64/72 16")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	checkStore(t, cow.Memory)
}

// quotaRig is a snapshot whose COW file lies on a file system with little space.
func quotaRig(t *testing.T, canAllocate bool, o snapshot.Options) (*snapshot.Origin, *block.Memory, *blocktest.Quota, *snapshot.Snapshot) {
	t.Helper()
	disk, cow := block.MemoryFrom(blocktest.Pattern(4096*sector, 1)), block.NewMemory(8192*sector)
	quota := blocktest.NewQuota(cow, 128<<10, canAllocate)
	origin := snapshot.NewOrigin(disk)
	s, err := origin.Attach(quota, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		checkStore(t, cow)
	})
	return origin, cow, quota, s
}

// TestFullFileSystem fills the file system beneath with snapshot and origin writes. Nothing that was
// acknowledged is lost, whether it can reserve space or not, and it goes on when there is space.
func TestFullFileSystem(t *testing.T) {
	for _, can := range []bool{true, false} {
		for _, c := range []uint32{8, 1} {
			origin, cow, quota, s := quotaRig(t, can, snapshot.Options{ChunkSectors: c, OnFull: snapshot.FullFail})
			view, disk := readAll(t, s), readAll(t, origin)
			refused := map[string]int{}
			put := func(name string, dev block.Device, model []byte, at int64) {
				data := fill(1, byte(at%251+1))
				if _, err := dev.WriteAt(data, at*sector); err != nil {
					wantNoRoom(t, err)
					refused[name]++
					return
				}
				copy(model[at*sector:], data)
			}
			for i := range int64(400) {
				put("snapshot", s, view, i*10)
				put("origin", origin, disk, i*10+9)
			}
			if refused["snapshot"] == 0 || refused["origin"] == 0 {
				t.Errorf("reserving %v, chunk %d: the file system was never full: %v", can, c, refused)
			}
			look := func(s *snapshot.Snapshot) {
				t.Helper()
				if got := readAll(t, s); !bytes.Equal(got, view) {
					t.Errorf("reserving %v, chunk %d: the view is wrong at byte %d", can, c, firstDifference(got, view))
				}
				if got := readAll(t, origin); !bytes.Equal(got, disk) {
					t.Errorf("reserving %v, chunk %d: the origin is wrong at byte %d", can, c, firstDifference(got, disk))
				}
			}
			look(s)
			if st := s.Status(); st.State != snapshot.StateOK || !st.Full {
				t.Errorf("reserving %v, chunk %d: %+v", can, c, st)
			}
			err := s.Flush()
			if can && err != nil {
				t.Errorf("flush: %v", err)
			}
			quota.SetLimit(4 << 20)
			if err == nil {
				for i := range int64(400) {
					put("late", s, view, i*10+1)
					put("late", origin, disk, i*10+8)
				}
				if refused["late"] > 0 {
					t.Errorf("reserving %v, chunk %d: %d writes refused though there was space", can, c, refused["late"])
				}
				look(s)
			}
			if s.Close() == nil {
				again, err := origin.Attach(quota, snapshot.Options{})
				if err != nil {
					t.Fatal(err)
				}
				look(again)
				again.Close()
			}
			checkStore(t, cow)
		}
	}
}

// TestFullFileSystemTheKernelsWay: without a policy the snapshot is lost, and says so on disk.
func TestFullFileSystemTheKernelsWay(t *testing.T) {
	origin, cow, _, s := quotaRig(t, true, snapshot.Options{ChunkSectors: 8})
	for i := range int64(100) {
		write(t, origin, 8*i, 1, 1)
	}
	wantStatus(t, s, "Invalid")
	again, err := store.Open(cow)
	if err != nil || !isInvalid(again.Err()) {
		t.Errorf("opened: %v, %v", err, again.Err())
	}
}

// TestMergeWaitsForRoomElsewhere: a merge that another snapshot has no room to be preserved from fails
// its step, or waits, and loses nothing.
func TestMergeWaitsForRoomElsewhere(t *testing.T) {
	for _, policy := range []snapshot.FullPolicy{snapshot.FullFail, snapshot.FullPause} {
		r := newRig(t, 1024)
		main := r.attach(r.cow("COW", 1024), snapshot.Options{ChunkSectors: 8})
		c := r.cow("OTHER", 24)
		other := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: policy})
		for i := range int64(4) {
			write(t, main, 64*i, 8, byte(i+1))
		}
		want, kept := readAll(t, main), readAll(t, other)
		m := r.merging(main)
		step(t, m, 1)
		done := make(chan error, 1)
		go func() {
			_, err := m.Step(1)
			done <- m.AwaitRoom(t.Context(), err)
		}()
		if policy == snapshot.FullFail {
			if err := <-done; !errors.Is(err, snapshot.ErrMergeFailed) || !errors.Is(err, snapshot.ErrNoRoom) {
				t.Errorf("step: %v", err)
			}
			wantStatus(t, m, "Merge failed")
		} else {
			for r.origin.Paused() != 1 {
			}
			wantStatus(t, m, "40/1024 16")
		}
		if err := c.memory.Grow(1024 * sector); err != nil {
			t.Fatal(err)
		}
		r.origin.RetryPaused()
		if policy == snapshot.FullPause {
			if err := <-done; err != nil {
				t.Errorf("step: %v", err)
			}
		}
		finish(t, m)
		if !bytes.Equal(r.memory.Bytes(), want) {
			t.Error("merged to something else")
		}
		if !bytes.Equal(readAll(t, other), kept) {
			t.Error("the other snapshot's view changed")
		}
	}
}
