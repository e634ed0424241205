package snapshot_test

import (
	"bytes"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

const (
	longBytes = 64 << 20
	longPiece = 2 << 20 // what is changed under one lock
)

// writeLong zeroes or writes the whole of dev by one request, durably where b is not 0.
func writeLong(dev block.Device, b byte) error {
	if b == 0 {
		return block.Zero(dev, 0, longBytes, 0)
	}
	return block.WriteDurable(dev, bytes.Repeat([]byte{b}, longBytes), 0)
}

// TestLongRequestLetsOthersIn: a snapshot is attached in the middle of one long request to the origin. It waits for the
// piece under way, not for the request: it shows the new content in front of that place, and the old one behind it.
func TestLongRequestLetsOthersIn(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, b := range []byte{0, 7} {
		content := blocktest.Pattern(longBytes, 1)
		var o *snapshot.Origin
		var late *snapshot.Snapshot
		var attaching sync.WaitGroup
		lateCOW := block.NewMemory(2 * longBytes)
		changes := 0
		disk := blocktest.NewFaulty(block.MemoryFrom(content), func(op blocktest.Op) error {
			if op.Kind != blocktest.Write && op.Kind != blocktest.Zero && op.Kind != blocktest.WriteDurable {
				return nil
			}
			if op.Len > longPiece {
				t.Errorf("%d bytes are changed under one lock", op.Len)
			}
			if changes++; changes != 3 {
				return nil
			}
			attaching.Go(func() {
				var err error
				if late, err = o.Attach(lateCOW, snapshot.Options{ChunkSectors: 8}); err != nil {
					t.Error(err)
				}
			})
			for waits := false; !waits; { // until the attach waits for the piece, and so does who comes after it
				asked := make(chan struct{})
				go func() { o.Snapshots(); close(asked) }()
				select {
				case <-asked:
				case <-time.After(100 * time.Millisecond):
					waits = true
				}
			}
			return nil
		})
		o = snapshot.NewOrigin(disk)
		early, err := o.Attach(block.NewMemory(2*longBytes), snapshot.Options{ChunkSectors: 8})
		if err != nil {
			t.Fatal(err)
		}
		if err := writeLong(o, b); err != nil {
			t.Fatal(err)
		}
		attaching.Wait()
		if !bytes.Equal(readAll(t, early), content) {
			t.Error("the snapshot that was there shows the change")
		}
		got, changed := readAll(t, late), bytes.Repeat([]byte{b}, longBytes)
		at := firstDifference(got, changed) // to attach takes the lock a few times
		if at < 3*longPiece || at > longBytes/2 || at%longPiece != 0 || !bytes.Equal(got[at:], content[at:]) {
			t.Errorf("filled with %d: what was attached in the middle of %d bytes shows the change up to byte %d, and something else behind it: %v",
				b, longBytes, at, !bytes.Equal(got[at:], content[at:]))
		}
		if err := late.Close(); err != nil {
			t.Error(err)
		}
		if err := early.Close(); err != nil {
			t.Error(err)
		}
		checkStore(t, lateCOW)
	}
}

// TestLongRequestsShareFlushes: to be cut costs a long request no flush of the COW device for each piece.
func TestLongRequestsShareFlushes(t *testing.T) {
	for _, b := range []byte{0, 7} {
		flushes := 0
		memory := block.NewMemory(2 * longBytes)
		cow := blocktest.NewFaulty(memory, func(op blocktest.Op) error {
			if op.Kind == blocktest.Flush || op.Kind == blocktest.WriteDurable {
				flushes++
			}
			return nil
		})
		o := snapshot.NewOrigin(block.MemoryFrom(blocktest.Pattern(longBytes, 1)))
		s, err := o.Attach(cow, snapshot.Options{ChunkSectors: 8})
		if err != nil {
			t.Fatal(err)
		}
		flushes = 0
		if err := writeLong(o, b); err != nil {
			t.Fatal(err)
		}
		if flushes > 2*longBytes>>23 {
			t.Errorf("%d flushes of the COW device for %d bytes, want two for each 8 MiB", flushes, longBytes)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		checkStore(t, memory)
	}
}

// TestLongSnapshotRequestLetsOthersIn: so does a long write or trim of a snapshot, which is suspended in the middle.
func TestLongSnapshotRequestLetsOthersIn(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for name, change := range map[string]func(s *snapshot.Snapshot) error{
		"zero":  func(s *snapshot.Snapshot) error { return s.ZeroAt(0, longBytes, 0) },
		"write": func(s *snapshot.Snapshot) error { return s.WriteDurableAt(make([]byte, longBytes), 0) },
		"trim":  func(s *snapshot.Snapshot) error { return s.Discard(0, longBytes) },
	} {
		o := snapshot.NewOrigin(block.NewMemory(longBytes))
		var s *snapshot.Snapshot
		changes, armed := 0, false
		suspended := make(chan struct{})
		memory := block.NewMemory(2 * longBytes)
		cow := blocktest.NewFaulty(memory, func(op blocktest.Op) error {
			if !armed || op.Kind != blocktest.Write && op.Kind != blocktest.Zero || op.Len < 1<<20 {
				return nil
			}
			if changes++; changes != 3 {
				return nil
			}
			go func() { defer close(suspended); s.Suspend() }()
			for waits := false; !waits; {
				asked := make(chan struct{})
				go func() { s.ReadAt(make([]byte, 1), 0); close(asked) }()
				select {
				case <-asked:
				case <-time.After(100 * time.Millisecond):
					waits = true
				}
			}
			return nil
		})
		o2 := snapshot.Options{ChunkSectors: 8}
		o2.DiscardZeroesCOW = true
		var err error
		if s, err = o.Attach(cow, o2); err != nil {
			t.Fatal(err)
		}
		if name == "trim" {
			if _, err := s.WriteAt(bytes.Repeat([]byte{1}, longBytes), 0); err != nil {
				t.Fatal(err)
			}
		}
		armed = true
		done := make(chan error, 1)
		go func() { done <- change(s) }()
		<-suspended // in the middle of the request, which waits
		select {
		case err := <-done:
			t.Errorf("%s: it ended before the snapshot was suspended: %v", name, err)
		default:
		}
		if err := s.Resume(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := readAll(t, s); !bytes.Equal(got, make([]byte, longBytes)) {
			t.Errorf("%s: it does not read as zeros", name)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		checkStore(t, memory)
	}
}
