package snapshot_test

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// TestOneFileSystemForAll: a sparse origin and the COW devices of two snapshots share a file system, which becomes full
// and gets space again, over and over. The snapshot that is protected (FullFail) shows the same throughout; the origin
// holds what was acknowledged, and of what failed the old or the new; once there is space, everything goes on.
func TestOneFileSystemForAll(t *testing.T) {
	for _, hold := range []int64{0, 64 << 10} {
		for seed := range uint64(8) {
			if !poolRun(t, seed, hold) {
				t.Fatalf("seed %d, %d bytes held", seed, hold)
			}
		}
	}
}

// poolRun is one run; false when it failed.
func poolRun(t *testing.T, seed uint64, hold int64) bool {
	const size, chunk = 256 << 10, 4096
	r := rand.New(rand.NewPCG(seed, 1))
	pool := blocktest.NewPool(1 << 30)
	memory := block.NewMemory(size)
	disk := pool.Sparse(memory, r.IntN(2) == 0)
	before := make([]byte, size)
	for off := 0; off < size; off += 2 * chunk { // every second chunk is a hole
		copy(before[off:off+chunk], blocktest.Pattern(chunk, seed+uint64(off)))
		if _, err := disk.WriteAt(before[off:off+chunk], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	var opts []snapshot.OriginOption
	if hold > 0 {
		opts = append(opts, snapshot.WriteBack(hold, time.Hour))
	}
	o := snapshot.NewOrigin(disk, opts...)
	kept, lost := block.NewMemory(4<<20), block.NewMemory(4<<20)
	attach := func(dev block.Device, policy snapshot.FullPolicy, canAllocate bool) *snapshot.Snapshot {
		s, err := o.Attach(pool.Sparse(dev, canAllocate), snapshot.Options{ChunkSectors: chunk / sector, OnFull: policy})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	reserves := r.IntN(3) > 0
	a := attach(kept, snapshot.FullFail, reserves)
	b := attach(lost, snapshot.FullInvalidate, r.IntN(2) == 0)
	now := [][]byte{bytes.Clone(before)} // what the origin may hold, the newest first
	for i := range 60 {
		if r.IntN(8) == 0 {
			pool.SetSize(size/2 + r.Int64N(2*size))
		}
		off := r.Int64N(size/sector) * sector
		p := blocktest.Pattern(int(min(r.Int64N(4*chunk/sector)*sector+sector, size-off)), seed*1000+uint64(i))
		next := bytes.Clone(now[0])
		copy(next[off:], p)
		switch r.IntN(5) {
		case 0:
			o.Flush()
		case 1:
			if block.WriteDurable(o, p, off) == nil {
				now = [][]byte{next}
			} else {
				now = [][]byte{now[0], next}
			}
		default:
			if _, err := o.WriteAt(p, off); err == nil {
				now = [][]byte{next}
			} else {
				now = [][]byte{now[0], next}
			}
		}
		if got := readAll(t, a); !bytes.Equal(got, before) {
			t.Errorf("operation %d: the protected snapshot changed at byte %d", i, firstDifference(got, before))
			return false
		}
		if a.Status().State == snapshot.StateInvalid {
			t.Errorf("operation %d: the protected snapshot is invalid: %v", i, a.Flush())
			return false
		}
		// What waits is also written in the background, so the other one may become invalid at any time.
		shown := make([]byte, size)
		if _, err := b.ReadAt(shown, 0); err != nil && !isInvalid(err) || err == nil && !bytes.Equal(shown, before) {
			t.Errorf("operation %d: a valid snapshot changed: %v", i, err)
			return false
		}
		got := readAll(t, o)
		if len(now) == 2 { // a write that failed: each sector is the old or the new
			for at := 0; at < size; at += sector {
				if s := got[at : at+sector]; !bytes.Equal(s, now[0][at:at+sector]) && !bytes.Equal(s, now[1][at:at+sector]) {
					t.Errorf("operation %d: origin sector %d is neither old nor new", i, at/sector)
					return false
				}
			}
			now = [][]byte{got}
		}
		if !bytes.Equal(got, now[0]) {
			t.Errorf("operation %d: the origin is wrong at byte %d", i, firstDifference(got, now[0]))
			return false
		}
	}
	pool.SetSize(1 << 30)
	_, err := o.WriteAt(now[0][:chunk], 0)
	if err == nil {
		err = o.Flush()
	}
	if err != nil && !reserves {
		// Where space can't be reserved, a slot may find none: the store refuses writes, and the origin's with it, until
		// the snapshot is dropped.
		a.Close()
		if err := o.Flush(); err != nil {
			t.Errorf("with space, and without the snapshot: %v", err)
		}
		if !bytes.Equal(memory.Bytes(), now[0]) {
			t.Errorf("without the snapshot, on the disk byte %d is wrong", firstDifference(memory.Bytes(), now[0]))
		}
		b.Close()
		return !t.Failed()
	}
	if err != nil {
		t.Errorf("with space again: %v; snapshots %v, %v", err, a.Status(), b.Status())
		return false
	}
	if !bytes.Equal(memory.Bytes(), now[0]) {
		t.Errorf("on the disk byte %d is wrong", firstDifference(memory.Bytes(), now[0]))
	}
	for _, s := range []*snapshot.Snapshot{a, b} {
		if err := s.Close(); err != nil && !isInvalid(err) {
			t.Errorf("close: %v", err)
		}
	}
	checkStore(t, kept)
	again, err := o.Attach(kept, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got := readAll(t, again); !bytes.Equal(got, before) {
		t.Errorf("loaded again, the protected snapshot is wrong at byte %d", firstDifference(got, before))
	}
	return !t.Failed()
}

// TestDurableOriginWriteWithoutSpace: a write with FUA that finds the origin's file system full fails alone. Flushes
// succeed, and so does the same write when there is space.
func TestDurableOriginWriteWithoutSpace(t *testing.T) {
	for _, size := range []int64{0, 64 << 10} {
		pool := blocktest.NewPool(64 << 10)
		cow := block.NewMemory(1 << 20)
		var opts []snapshot.OriginOption
		if size > 0 {
			opts = append(opts, snapshot.WriteBack(size, time.Hour))
		}
		o := snapshot.NewOrigin(blocktest.NewFaulty(pool.Sparse(block.NewMemory(1<<20), false), nil), opts...)
		s, err := o.Attach(cow, snapshot.Options{ChunkSectors: 8, OnFull: snapshot.FullFail})
		if err != nil {
			t.Fatal(err)
		}
		pool.SetSize(0)
		p := bytes.Repeat([]byte("new"), 8192)
		if err := block.WriteDurable(o, p, 8192); !block.IsNoSpace(err) {
			t.Fatalf("without space: %v", err)
		}
		for range 2 {
			if err := o.Flush(); err != nil {
				t.Errorf("flush: %v", err)
			}
		}
		pool.SetSize(64 << 10)
		if err := block.WriteDurable(o, p, 8192); err != nil {
			t.Errorf("with space: %v", err)
		}
		if err := o.Flush(); err != nil {
			t.Errorf("flush: %v", err)
		}
		got := make([]byte, len(p))
		if _, err := o.ReadAt(got, 8192); err != nil || !bytes.Equal(got, p) {
			t.Errorf("read: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		checkStore(t, cow)
	}
}
