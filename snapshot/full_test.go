package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

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
	// What needs no space goes on.
	write(t, s, 16, 8, 9)
	write(t, r.origin, 0, 8, 9)
	flush(t, s)
	// And everything when there is space.
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

// A retried is a change that waits for space, as a caller of the engine does.
type retried struct {
	waits chan struct{} // closed when it has been refused once
	err   error         // of the change, when done is closed
	done  chan struct{}
}

// pause makes a change until it succeeds, fails permanently, or ctx ends. It returns when it has been refused once.
func pause(t *testing.T, ctx context.Context, change func() error) *retried {
	t.Helper()
	p := &retried{waits: make(chan struct{}), done: make(chan struct{})}
	var once sync.Once
	go func() {
		defer close(p.done)
		p.err = block.Retry(ctx, func() error {
			err := change()
			if block.CanRetry(err) != nil {
				wantNoRoom(t, err)
				once.Do(func() { close(p.waits) })
			}
			return err
		})
	}()
	select {
	case <-p.waits:
	case <-p.done:
		t.Fatalf("the change did not wait: %v", p.err)
	}
	return p
}

// writing is a change of dev.
func writing(dev block.Device, at, n int64, b byte) func() error {
	return func() error {
		_, err := dev.WriteAt(fill(n, b), at*sector)
		return err
	}
}

// wantDone wants the change to have succeeded, long before it would have looked by itself.
func (p *retried) wantDone(t *testing.T) {
	t.Helper()
	if <-p.done; p.err != nil {
		t.Errorf("a change that waited: %v", p.err)
	}
}

func TestFullPauseWaitsForRoom(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 24)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullPause})
	write(t, s, 0, 8, 1)
	one := pause(t, t.Context(), writing(s, 48, 8, 2))
	two := pause(t, t.Context(), writing(r.origin, 480, 1, 3))
	wantRead(t, s, 480, r.old(480, 8)) // nothing waits but the two
	wantRead(t, r.origin, 480, r.old(480, 8))
	other := r.attach(r.cow("OTHER", 1024), snapshot.Options{ChunkSectors: 8})
	write(t, other, 8, 8, 5)
	if err := c.memory.Grow(80 * sector); err != nil {
		t.Fatal(err)
	}
	r.origin.RetryPaused()
	one.wantDone(t)
	two.wantDone(t)
	wantRead(t, s, 48, fill(8, 2))
	wantRead(t, s, 480, r.old(480, 8))
	wantRead(t, r.origin, 480, fill(1, 3))
	wantRead(t, other, 480, r.old(480, 8)) // attached before the origin write went on
}

// TestFullPolicyOfNow: the policy may change while a snapshot is in use, also for writes that wait.
func TestFullPolicyOfNow(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 24)
	var policy atomic.Int32
	set := func(p snapshot.FullPolicy) { policy.Store(int32(p)) }
	set(snapshot.FullFail)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, FullPolicy: func() snapshot.FullPolicy { return snapshot.FullPolicy(policy.Load()) }})
	write(t, s, 0, 8, 1)
	wantNoRoom(t, fails(t, s, 48, 8))
	set(snapshot.FullPause)
	waits := pause(t, t.Context(), writing(s, 48, 8, 2))
	set(snapshot.FullFail)
	r.origin.RetryPaused()
	<-waits.done
	if !errors.Is(waits.err, snapshot.ErrNoRoom) {
		t.Errorf("the write that waited: %v", waits.err)
	}
	wantHeader(t, c, headerValid)
	set(snapshot.FullInvalidate)
	if _, err := s.WriteAt(make([]byte, 4096), 48*sector); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("under the kernel's policy: %v", err)
	}
}

// TestFullPauseEnds: what a change waits for is no more. None of them waits for the next second.
func TestFullPauseEnds(t *testing.T) {
	for how, end := range map[string]func(r *rig, s *snapshot.Snapshot) error{
		"close": func(r *rig, s *snapshot.Snapshot) error { return s.Close() },
		"merge": func(r *rig, s *snapshot.Snapshot) error {
			m, err := s.BeginMerge()
			if err == nil {
				t.Cleanup(func() { m.Close() })
			}
			return err
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, 1024)
			s := r.attach(r.cow("COW", 16), snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullPause})
			own := pause(t, t.Context(), writing(s, 0, 1, 1))
			origin := pause(t, t.Context(), writing(r.origin, 480, 1, 3))
			began := time.Now() // the clock stands still while anything runs
			if err := end(r, s); err != nil {
				t.Fatal(err)
			}
			origin.wantDone(t)
			if <-own.done; own.err == nil || errors.Is(own.err, snapshot.ErrNoRoom) {
				t.Errorf("%s: the snapshot's write: %v", how, own.err)
			}
			if took := time.Since(began); took != 0 {
				t.Errorf("%s: it took %v", how, took)
			}
			wantRead(t, r.origin, 480, fill(1, 3))
			if m := r.origin.Merging(); m != nil {
				m.Close()
			}
		})
	}
}

// TestFullPauseHoldsNothing: a request that gives up waiting leaves nothing behind, and a write that comes later is not
// followed by the old one when there is space.
func TestFullPauseHoldsNothing(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 16)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullPause})
	ctx, cancel := context.WithCancel(t.Context())
	old := pause(t, ctx, writing(s, 0, 8, 1))
	oldOrigin := pause(t, ctx, writing(r.origin, 480, 1, 3))
	cancel()
	for _, p := range []*retried{old, oldOrigin} {
		if <-p.done; !errors.Is(p.err, context.Canceled) || !errors.Is(p.err, snapshot.ErrNoRoom) {
			t.Errorf("who gave up: %v", p.err)
		}
	}
	if err := c.memory.Grow(1024 * sector); err != nil {
		t.Fatal(err)
	}
	write(t, s, 0, 8, 2)
	write(t, r.origin, 480, 1, 4)
	r.origin.RetryPaused()
	wantRead(t, s, 0, fill(8, 2))
	wantRead(t, r.origin, 480, fill(1, 4))
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

// taken is a COW device whose added space is used by another request first.
type taken struct {
	*block.Memory
	take func()
}

func (d *taken) Grow(size int64) error {
	err := d.Memory.Grow(size)
	d.take()
	return err
}

// TestGrowthGoesOn: the added space is used by another request, twice. More is added.
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

// TestFullFileSystem fills the underlying file system with snapshot and origin writes. Nothing that was
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

// TestMergeWaitsForRoomElsewhere: a merge that another snapshot has no space to be preserved from fails
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
		again := func() error { _, err := m.Step(1); return err }
		var waits *retried
		if policy == snapshot.FullFail {
			if err := again(); !errors.Is(err, snapshot.ErrMergeFailed) || !errors.Is(err, snapshot.ErrNoRoom) || block.CanRetry(err) != nil {
				t.Errorf("step: %v", err)
			}
			wantStatus(t, m, "Merge failed")
		} else {
			waits = pause(t, t.Context(), again)
			wantStatus(t, m, "40/1024 16")
		}
		if err := c.memory.Grow(1024 * sector); err != nil {
			t.Fatal(err)
		}
		r.origin.RetryPaused()
		if waits != nil {
			waits.wantDone(t)
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

// TestTrimmedChunkNeedsRoom: a chunk that was trimmed has no space on the file system. What is written to it obeys the
// policy as what is written to a new chunk does, also while its snapshot is merged.
func TestTrimmedChunkNeedsRoom(t *testing.T) {
	for _, merging := range []bool{false, true} {
		for _, policy := range []snapshot.FullPolicy{snapshot.FullInvalidate, snapshot.FullFail, snapshot.FullPause} {
			o := snapshot.Options{ChunkSectors: 8, OnFull: policy}
			o.DiscardZeroesCOW = true
			origin, _, quota, s := quotaRig(t, true, o)
			for i := range int64(8) {
				write(t, s, 8*i, 8, 1)
			}
			if err := s.Discard(0, 8*8*sector); err != nil {
				t.Fatal(err)
			}
			flush(t, s)
			quota.SetLimit(0)
			var dev block.Device = s
			if merging {
				m, err := s.BeginMerge()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { m.Close() })
				dev = origin
			}
			change := writing(dev, 8, 8, 2)
			err := change()
			switch policy {
			case snapshot.FullInvalidate:
				if !errors.Is(err, syscall.ENOSPC) || block.CanRetry(err) != nil {
					t.Errorf("merging %v: %v, want the device's error", merging, err)
				}
			case snapshot.FullFail:
				if wantNoRoom(t, err); block.CanRetry(err) != nil {
					t.Errorf("merging %v: %v is to be waited for", merging, err)
				}
				if merging {
					break
				}
				if !s.Status().Full {
					t.Error("full is not in the status")
				}
				quota.SetLimit(1 << 20)
				write(t, s, 24, 8, 3) // another trimmed chunk
				if !s.Status().Full {
					t.Error("full was forgotten by a write elsewhere")
				}
				if err := change(); err != nil || s.Status().Full {
					t.Errorf("with space: %v, full in the status: %v", err, s.Status().Full)
				}
			case snapshot.FullPause:
				p := pause(t, t.Context(), change)
				quota.SetLimit(1 << 20)
				origin.RetryPaused()
				p.wantDone(t)
				wantRead(t, dev, 8, fill(8, 2))
			}
			wantRead(t, dev, 16, fill(8, 0))
		}
	}
}

// TestFailedStoreIsNotWaitedFor: the slots found no space, which fails the store. However much space there is later, it
// refuses writes until it is loaded again; so nobody waits, and the status says it.
func TestFailedStoreIsNotWaitedFor(t *testing.T) {
	for _, policy := range []snapshot.FullPolicy{snapshot.FullFail, snapshot.FullPause} {
		origin, _, quota, s := quotaRig(t, false, snapshot.Options{ChunkSectors: 8, OnFull: policy})
		write(t, s, 0, 8, 1)
		flush(t, s)
		// The second area holds what comes after 256 exceptions; its slots are written by the flush.
		quota.SetLimit(4 << 20)
		for i := int64(1); i < 300; i++ {
			write(t, s, 8*i, 8, 2)
		}
		quota.SetLimit(0)
		if err := s.Flush(); err == nil {
			t.Fatal("the slots found space")
		} else if wantNoRoom(t, err); block.CanRetry(err) != nil {
			t.Errorf("flush: %v is to be waited for", err)
		}
		quota.SetLimit(8 << 20)
		for _, dev := range []block.Device{s, origin} {
			err := writing(dev, 8*400, 8, 3)()
			if wantNoRoom(t, err); block.CanRetry(err) != nil {
				t.Errorf("%v is to be waited for", err)
			}
		}
		if st := s.Status(); st.State != snapshot.StateFailed {
			t.Errorf("state %s", st.State)
		}
		if err := s.Close(); err == nil {
			t.Error("closing a failed store succeeded")
		}
		again, err := origin.Attach(quota, snapshot.Options{OnFull: policy})
		if err != nil {
			t.Fatal(err)
		}
		write(t, again, 8*400, 8, 3)
		wantRead(t, again, 0, fill(8, 1))
		if st := again.Status(); st.State != snapshot.StateOK {
			t.Errorf("state %s after it was loaded again", st.State)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
