package snapshot_test

import (
	"testing"
	"testing/synctest"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// slowExtents is a disk that answers Extents only after release is closed.
type slowExtents struct {
	*blocktest.Faulty
	release chan struct{}
}

func (d *slowExtents) Extents(off, n int64) ([]block.Extent, error) {
	<-d.release
	return block.Extents(d.Faulty, off, n)
}

// TestExtentsAreGateReaders: while the extents of a snapshot are being asked of the origin, the origin is zeroed.
// Without a gate reader the answer would be "hole, zeros" for data that the snapshot still shows.
func TestExtentsAreGateReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &slowExtents{blocktest.NewFaulty(block.MemoryFrom(blocktest.Pattern(64<<10, 1)), nil), make(chan struct{})}
		o := snapshot.NewOrigin(disk)
		cow := block.NewMemory(256 << 10)
		s, err := o.Attach(cow, snapshot.Options{ChunkSectors: 8})
		if err != nil {
			t.Fatal(err)
		}
		var got []block.Extent
		go func() { got, _ = s.Extents(0, 64<<10) }()
		synctest.Wait() // the lookup is done, the origin has not answered yet

		zeroed := false
		go func() { o.ZeroAt(0, 64<<10, 0); zeroed = true }()
		synctest.Wait()
		if zeroed {
			t.Error("the origin was zeroed while the extents of the snapshot were being asked of it")
		}
		close(disk.release)
		synctest.Wait()
		if !zeroed {
			t.Error("the origin write still waits")
		}
		if len(got) != 1 || got[0].Length != 64<<10 || got[0].Flags != 0 {
			t.Errorf("extents %v for 64 KiB of data", got)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		checkStore(t, cow)
	})
}

// TestReadBeganBeforeInvalid: a read that began while the snapshot was valid, and succeeds, returns the past, although
// the origin is changed after the snapshot became invalid.
func TestReadBeganBeforeInvalid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, c, s := standard(t, 1024, 1024)
		hold := r.disk.Hold(at(blocktest.Read, 3))
		var got []byte
		var readErr error
		go func() {
			b := make([]byte, sector)
			_, readErr = s.ReadAt(b, 3*sector)
			got = b
		}()
		<-hold.Reached()
		c.faults.Set(failingWrites(16, 1008)) // no copy succeeds: the origin write invalidates the snapshot
		written := false
		go func() { r.origin.WriteAt(fill(8, 1), 0); written = true }()
		synctest.Wait()
		if s.Status().State != snapshot.StateInvalid {
			t.Error("the snapshot is valid, although no copy could be kept")
		}
		if written {
			t.Error("the origin was written beneath a read of the snapshot")
		}
		hold.Release()
		synctest.Wait()
		if !written {
			t.Error("the origin write still waits")
		}
		if readErr != nil || string(got) != string(r.old(3, 1)) {
			t.Errorf("the read returned other bytes than the past, error %v", readErr)
		}
	})
}
