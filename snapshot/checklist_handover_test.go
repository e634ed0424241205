package snapshot_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
)

// load loads a second table on a snapshot's COW device.
func (r *rig) load(c *cow, o snapshot.Options) *snapshot.Snapshot {
	r.t.Helper()
	o.Notify = r.notify
	s, err := r.origin.Load(c.dev, o)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { s.Close() })
	return s
}

func suspend(t *testing.T, s *snapshot.Snapshot) {
	t.Helper()
	if err := s.Suspend(); err != nil {
		t.Fatal(err)
	}
}

func resume(t *testing.T, s interface{ Resume() error }) {
	t.Helper()
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
}

func TestC111ResumingInTheWrongOrder(t *testing.T) {
	r, c, s := standard(t, 1024, 1024)
	write(t, s, 0, 8, 1)
	next := r.load(c, snapshot.Options{})
	if st := next.Status(); st.ChunkSectors != 0 {
		t.Errorf("a waiting destination shows chunk size %d", st.ChunkSectors)
	}
	if err := next.Resume(); !errors.Is(err, snapshot.ErrSourceRunning) {
		t.Errorf("destination: %v", err)
	}
	suspend(t, s)
	if err := s.Resume(); !errors.Is(err, snapshot.ErrResumeSource) {
		t.Errorf("source: %v", err)
	}
	resume(t, next)
	wantStatus(t, next, "24/1024 16")
	wantRead(t, next, 0, fill(8, 1))
	write(t, r.origin, 80, 1, 9)
	wantRead(t, next, 80, r.old(80, 8))

	// A merge as the destination says the same.
	m, err := r.origin.LoadMerge(c.dev, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Resume(); !errors.Is(err, snapshot.ErrSourceRunning) {
		t.Errorf("merge: %v", err)
	}
}

func TestC112ThirdTable(t *testing.T) {
	r, c, _ := standard(t, 1024, 1024)
	r.load(c, snapshot.Options{})
	if _, err := r.origin.Load(c.dev, snapshot.Options{}); !errors.Is(err, snapshot.ErrPairing) {
		t.Errorf("snapshot: %v", err)
	}
	if _, err := r.origin.LoadMerge(c.dev, snapshot.Options{}); !errors.Is(err, snapshot.ErrPairing) {
		t.Errorf("merge: %v", err)
	}
}

func TestC113WhatAReloadTakesFromItsTable(t *testing.T) {
	r, c, s := full(t, snapshot.Persistent)
	handOver := func(src *snapshot.Snapshot, o snapshot.Options) *snapshot.Snapshot {
		next := r.load(c, o)
		suspend(t, src)
		resume(t, next)
		if err := src.Close(); err != nil {
			t.Fatal(err)
		}
		return next
	}
	s = handOver(s, snapshot.Options{Store: snapshot.Transient, ChunkSectors: 16})
	if got := s.Status().Table("7:0", "7:1"); got != "0 1024 snapshot 7:0 7:1 P 8" {
		t.Errorf("reloaded as N 16: %q", got)
	}
	s = handOver(s, snapshot.Options{Store: snapshot.PersistentOverflow, ChunkSectors: 16})
	if got := s.Status().Table("7:0", "7:1"); got != "0 1024 snapshot 7:0 7:1 PO 8" {
		t.Errorf("reloaded as PO 16: %q", got)
	}
	fails(t, s, 48, 8)
	wantStatus(t, s, "Overflow") // the O counts

	// A transient store keeps its data in a handover.
	r, c, s = full(t, snapshot.Transient)
	s = handOver(s, snapshot.Options{ChunkSectors: 16})
	if got := s.Status().Table("7:0", "7:1"); got != "0 1024 snapshot 7:0 7:1 N 8" {
		t.Errorf("N reloaded as P 16: %q", got)
	}
	wantRead(t, s, 0, fill(8, 1))
}

func TestC114SourceAfterAHandoverToAMerge(t *testing.T) {
	r, c, s := standard(t, 1024, 1024)
	write(t, s, 0, 8, 1)
	m := r.merging(s)
	wantStatus(t, s, "Invalid")
	wantHeader(t, c, headerValid)
	if _, err := s.ReadAt(make([]byte, sector), 0); !isInvalid(err) {
		t.Errorf("read: %v", err)
	}
	if err := fails(t, s, 0, 1); !isInvalid(err) {
		t.Errorf("write: %v", err)
	}
	write(t, r.origin, 80, 8, 1) // preserves nothing there
	wantStatus(t, m, "24/1024 16")
	finish(t, m)
	wantHeader(t, c, headerValid)
	wantRead(t, r.memory, 0, fill(8, 1))
}

func TestC115RemovingTheSourceFirst(t *testing.T) {
	r, c, s := standard(t, 1024, 1024)
	write(t, s, 0, 8, 1)
	next := r.load(c, snapshot.Options{})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := len(r.events); n != 1 || r.events[0].Kind != snapshot.EventHandoverCancelled || r.events[0].Text != "Cancelling snapshot handover." {
		t.Errorf("events %v", r.events)
	}
	wantStatus(t, next, "Invalid")
	wantHeader(t, c, headerValid)
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	s = r.attach(c, snapshot.Options{})
	wantStatus(t, s, "24/1024 16")
	wantRead(t, s, 0, fill(8, 1))

	// A merge that waited: it can't be resumed, and another can be loaded.
	m, err := r.origin.LoadMerge(c.dev, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err == nil {
		t.Error("a merge without a store was resumed")
	}
	m.Close()
	finishMerge(t, r.origin, c.dev)
	wantRead(t, r.memory, 0, fill(8, 1))
}

func TestC116HandoverUnderWrites(t *testing.T) {
	for range 10 {
		r := newRig(t, 1024)
		c := r.cow("COW", 4096)
		s := r.attach(c, snapshot.Options{ChunkSectors: 8})
		next := r.load(c, snapshot.Options{})
		// Four writers to the origin, two to the snapshot; a snapshot write that does not get through
		// before the handover waits and is refused after it.
		var writers, begun sync.WaitGroup
		view := slices.Clone(r.before)
		var mu sync.Mutex
		for i := range int64(6) {
			begun.Add(1)
			writers.Go(func() {
				for k := range int64(16) {
					if k == 1 {
						begun.Done()
					}
					at := 8*(8*k+i) + i
					if i < 4 {
						write(t, r.origin, at, 2, byte(k))
					} else if _, err := s.WriteAt(fill(2, byte(k)), at*sector); err == nil {
						mu.Lock()
						copy(view[at*sector:], fill(2, byte(k)))
						mu.Unlock()
					} else if !isInvalid(err) && !errors.Is(err, fs.ErrClosed) {
						t.Errorf("write: %v", err)
					}
				}
			})
		}
		begun.Wait()
		suspend(t, s)
		resume(t, next)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		writers.Wait()
		if !bytes.Equal(readAll(t, next), view) {
			t.Fatal("the handover lost something")
		}
		if err := next.Close(); err != nil {
			t.Fatal(err)
		}
		again := r.attach(c, snapshot.Options{})
		if !bytes.Equal(readAll(t, again), view) {
			t.Fatal("the handover lost something on disk")
		}
	}
}

// writtenByHand is a store as the specification's sections 2.2 to 2.5 draw it, made without this project's
// code: n whole chunks written to a fresh snapshot, old chunk old(i) with bytes of content.
func writtenByHand(c uint32, cowSectors, n int, old func(i int) uint64) []byte {
	b := make([]byte, cowSectors*sector)
	copy(b, "SnAp")
	b[4], b[8] = 1, 1
	binary.LittleEndian.PutUint32(b[12:], c)
	e := int(c) * 32
	for i := range n {
		new := 2 + i + i/e
		area := 1 + (i/e)*(e+1)
		slot := b[(area*int(c))*sector+(i%e)*16:]
		binary.LittleEndian.PutUint64(slot, old(i))
		binary.LittleEndian.PutUint64(slot[8:], uint64(new))
		copy(b[new*int(c)*sector:], content(c, uint64(new)))
	}
	return b
}

// C117's kernel side: the 24 stores a kernel wrote load with the kernel's content and status and are
// written again byte for byte (TestKernelCases…, and test/kernel with a running one). Here, for all chunk
// sizes and numbers of exceptions around area edges: what we write is what the format says.
func TestC117StoresByTheFormat(t *testing.T) {
	for _, c := range []uint32{1, 2, 8, 32, 128, 1024} {
		e := int(c) * 32
		for _, n := range []int{0, 1, e - 1, e, e + 1, 2*e - 1, 2 * e, 2*e + 1} {
			if n*int(c) > 10000 { // 5 MB: the areas of larger chunks are filled by the kernel's cases and test/kernel
				continue
			}
			cowSectors := int(c) * (n + n/e + 4)
			old := func(i int) uint64 { return uint64(2 * i) }
			want := writtenByHand(c, cowSectors, n, old)
			r := newRig(t, int64(2*n+4)*int64(c))
			d := r.cow("COW", int64(cowSectors))
			s := r.attach(d, snapshot.Options{ChunkSectors: c})
			for i := range n {
				if _, err := s.WriteAt(content(c, uint64(2+i+i/e)), int64(old(i))*int64(c)*sector); err != nil {
					t.Fatal(err)
				}
			}
			flush(t, s)
			if got := d.memory.Bytes(); !bytes.Equal(got, want) {
				t.Errorf("chunk size %d, %d exceptions: differs from the format at byte %d", c, n, firstDifference(got, want))
			}
			usage := s.Status().Text()
			view := readAll(t, s)
			r.log.Clear()
			s.Close()
			s2 := r.attach(r.cowOf("COW2", want), snapshot.Options{})
			if got := s2.Status().Text(); got != usage {
				t.Errorf("chunk size %d, %d exceptions: loaded as %q, written as %q", c, n, got, usage)
			}
			if !bytes.Equal(readAll(t, s2), view) {
				t.Errorf("chunk size %d, %d exceptions: loaded with another content", c, n)
			}
			s2.Close()
		}
	}
}

// fixture returns what a kernel left of a case.
func fixture(t *testing.T, c kernelcase.Case) (origin, cow *block.Memory) {
	t.Helper()
	originImage, err := c.Origin()
	if err != nil {
		t.Fatal(err)
	}
	cowImage, err := c.COW()
	if err != nil {
		t.Fatal(err)
	}
	return block.MemoryFrom(originImage), block.MemoryFrom(cowImage)
}

func TestC118HalfMergedByTheKernel(t *testing.T) {
	kernelCases(t, func(t *testing.T, c kernelcase.Case) {
		if c.Kind != "merge-partial" {
			t.Skip("not a half-done merge")
		}
		disk, cow := fixture(t, c)
		if wantDigest(t, "half-merged origin", disk.Bytes(), c.OriginAfter); c.OriginAfter == c.Kernel.Snap {
			t.Error("nothing was left to merge")
		}
		finishMerge(t, snapshot.NewOrigin(disk), cow)
		wantDigest(t, "merged origin", disk.Bytes(), c.Kernel.Snap)
		checkStore(t, cow)
	})
}

func TestC119InvalidatedByTheKernel(t *testing.T) {
	kernelCases(t, func(t *testing.T, c kernelcase.Case) {
		if !strings.HasPrefix(c.Kind, "overflow") {
			t.Skip("not invalid")
		}
		disk, cow := fixture(t, c)
		before := slices.Clone(cow.Bytes())
		s, err := snapshot.NewOrigin(disk).Attach(cow, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		wantStatus(t, s, "Invalid")
		if _, err := s.ReadAt(make([]byte, sector), 0); !isInvalid(err) {
			t.Errorf("read: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(cow.Bytes(), before) {
			t.Error("the invalid store was touched")
		}
	})
	// Ours says it in the same bytes: specification B.4.
	_, d, s := full(t, snapshot.Persistent)
	fails(t, s, 48, 8)
	wantHeader(t, d, headerInvalid)
}

// lvmPercent is what LVM makes of a status line's numbers (specification A.4).
func lvmPercent(used, total, metadata uint64) float64 {
	switch used {
	case metadata:
		return 0
	case total:
		return 100
	}
	return 100 * float64(used) / float64(total)
}

func TestC120LVMPercentage(t *testing.T) {
	for _, c := range []struct {
		chunk, cow, exceptions int64
		want                   float64
	}{
		{8, 200, 0, 0}, {8, 200, 1, 12}, {8, 24, 1, 100}, {8, 1024, 7, 7.03125}, {1, 400, 70, 18.5}, {8, 2072, 256, 100},
	} {
		r := newRig(t, 4096)
		s := r.attach(r.cow("COW", c.cow), snapshot.Options{ChunkSectors: uint32(c.chunk)})
		for i := range c.exceptions {
			write(t, s, i*c.chunk, c.chunk, 1)
		}
		u := s.Status().Usage
		if got := lvmPercent(u.Allocated, u.Total, u.Metadata); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%d exceptions of %d sectors in %d: %v %%, want %v %%", c.exceptions, c.chunk, c.cow, got, c.want)
		}
	}
	// And for what a kernel printed.
	kernelCases(t, func(t *testing.T, c kernelcase.Case) {
		text := strings.TrimPrefix(c.Kernel.Status, fmt.Sprintf("0 %d snapshot ", c.OriginSectors))
		var used, total, metadata uint64
		if _, err := fmt.Sscanf(text, "%d/%d %d", &used, &total, &metadata); err != nil || c.Store == "N" || strings.HasPrefix(c.Kind, "merge") {
			t.Skip("no figures to compare: ", text)
		}
		disk, cow := fixture(t, c)
		s, err := snapshot.NewOrigin(disk).Attach(cow, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		u := s.Status().Usage
		if got, want := lvmPercent(u.Allocated, u.Total, u.Metadata), lvmPercent(used, total, metadata); got != want {
			t.Errorf("%v %%, the kernel's is %v %%", got, want)
		}
		checkStore(t, cow)
	})
}
