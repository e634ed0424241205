package snapshot_test

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// An origin passes on what it does not change, with and without a snapshot.
func TestOriginPassesOn(t *testing.T) {
	changes := []string{"WriteLastAt", "Discard", "Refresh", "Grow", "CanGrow"}
	t.Run("alone", func(t *testing.T) {
		blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device {
			return snapshot.NewOrigin(dev)
		}, changes...)
	})
	t.Run("with a snapshot", func(t *testing.T) {
		// Writes copy what they replace first, which reads the origin in other pieces.
		blocktest.RunForward(t, func(t *testing.T, dev block.Device) block.Device {
			return withSnapshot(t, dev).origin
		}, changes...)
	})
}

// What a snapshot has no exception for it asks the origin.
func TestSnapshotPassesOnReads(t *testing.T) {
	blocktest.RunForward(t, func(t *testing.T, dev block.Device) block.Device {
		return withSnapshot(t, dev).snapshot
	}, "WriteAt", "WriteDurableAt", "WriteLastAt", "BeginFlush", "BeginRead", "ZeroAt", "Allocate", "Discard", "Flush", "DropCache", "Refresh", "Grow", "CanGrow", "Identity")
}

type forwardPair struct {
	origin   *snapshot.Origin
	snapshot *snapshot.Snapshot
}

func withSnapshot(t *testing.T, dev block.Device) forwardPair {
	o := snapshot.NewOrigin(dev)
	s, err := o.Attach(block.NewMemory(1<<20), snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return forwardPair{o, s}
}

// An origin is its disk. A snapshot is neither its origin nor its COW device, but one with each other that is made
// of both.
func TestSameDisk(t *testing.T) {
	disk, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	o := snapshot.NewOrigin(disk)
	s, err := o.Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, c := range []struct {
		name string
		a, b block.Device
		want bool
	}{
		{"origin and disk", o, disk, true},
		{"snapshot and origin", s, o, false},
		{"snapshot and COW device", s, cow, false},
		{"snapshot and itself", s, block.NewForward(s), true},
	} {
		if got := block.Same(c.a, c.b); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	if _, err := o.Attach(o, snapshot.Options{}); err == nil {
		t.Error("an origin is its own COW device")
	}
}

// A write past what snapshots keep would be lost to them: discards and growth end at the origin.
func TestOriginKeepsDiscardsAndSize(t *testing.T) {
	disk := block.MemoryFrom(blocktest.Pattern(1<<20, 1))
	o := snapshot.NewOrigin(disk)
	if err := block.Discard(o, 0, 4096); err != nil {
		t.Error(err)
	}
	if string(disk.Bytes()) != string(blocktest.Pattern(1<<20, 1)) {
		t.Error("a discard went past the snapshots")
	}
	if err := block.Grow(o, 2<<20); err == nil || disk.Size() != 1<<20 {
		t.Errorf("an origin grew: %v", err)
	}
	if err := block.Grow(o, 1<<20); err != nil {
		t.Error(err)
	}
}
