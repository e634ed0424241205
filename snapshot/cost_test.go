package snapshot_test

import (
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A cost is what an operation does to the devices: operations and sectors read and written, and flushes.
type cost struct {
	reads, read     int64 // operations, sectors
	writes, written int64
	flushes         int64
}

func (c cost) String() string {
	return fmt.Sprintf("%d reads of %d, %d writes of %d, %d flushes", c.reads, c.read, c.writes, c.written, c.flushes)
}

// cost takes the log and adds it up.
func (r *rig) cost() (c cost) {
	for _, op := range r.log.Take() {
		n := op.Len / sector
		switch op.Kind {
		case blocktest.Read:
			c.reads, c.read = c.reads+1, c.read+n
		case blocktest.Write, blocktest.Zero:
			c.writes, c.written = c.writes+1, c.written+n
		case blocktest.WriteDurable:
			c.writes, c.written, c.flushes = c.writes+1, c.written+n, c.flushes+1
		case blocktest.Flush:
			c.flushes++
		}
	}
	return c
}

// TestCosts counts what benchmarks measure, with chunks of 8 sectors (docs/spec/dm-snapshot.md §9.1). The kernel's
// metadata write, one chunk with a flush before it and FUA, is here one chunk between two flushes: those of the area
// after are zeroed only when an area fills.
func TestCosts(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, r *rig, s *snapshot.Snapshot)
		want cost
	}{
		{"first write of a chunk", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 80, 8, 1)
		}, cost{writes: 1, written: 8}},
		{"and its flush", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 80, 8, 1)
			r.log.Clear()
			flush(t, s)
		}, cost{writes: 1, written: 8, flushes: 2}},
		{"flush of nothing new but data", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 80, 8, 1)
			flush(t, s)
			r.log.Clear()
			flush(t, s)
		}, cost{flushes: 1}},
		{"first write of a part", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 81, 1, 1)
		}, cost{reads: 1, read: 8, writes: 1, written: 8}},
		{"rewrite", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 80, 8, 1)
			r.log.Clear()
			write(t, s, 81, 3, 2)
		}, cost{writes: 1, written: 3}},
		{"read of both", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 80, 8, 1)
			r.log.Clear()
			wantRead(t, s, 72, append(append([]byte{}, r.old(72, 8)...), fill(8, 1)...))
		}, cost{reads: 2, read: 16}},
		{"first write of 64 chunks", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 512, 512, 1)
		}, cost{writes: 1, written: 512}},
		{"and their flush", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, s, 512, 512, 1)
			r.log.Clear()
			flush(t, s)
		}, cost{writes: 1, written: 8, flushes: 2}},
		{"origin write", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, r.origin, 81, 1, 1)
		}, cost{reads: 1, read: 8, writes: 3, written: 8 + 8 + 1, flushes: 2}},
		{"origin write, kept already", func(t *testing.T, r *rig, s *snapshot.Snapshot) {
			write(t, r.origin, 81, 1, 1)
			r.log.Clear()
			write(t, r.origin, 82, 1, 2)
		}, cost{writes: 1, written: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, _, s := standard(t, 4096, 8192)
			c.do(t, r, s)
			if got := r.cost(); got != c.want {
				t.Errorf("cost %v, want %v", got, c.want)
			}
		})
	}
}

// TestCostOfSnapshots: an origin write of a sector under k snapshots copies one chunk to each, with two
// flushes each, and is made once.
func TestCostOfSnapshots(t *testing.T) {
	for k := range int64(6) {
		r := newRig(t, 4096)
		for i := range k {
			r.attach(r.cow(fmt.Sprint("COW", i), 4096), snapshot.Options{ChunkSectors: 8})
		}
		r.log.Clear()
		write(t, r.origin, 100, 1, 1)
		want := cost{reads: k, read: 8 * k, writes: 2*k + 1, written: 16*k + 1, flushes: 2 * k}
		if got := r.cost(); got != want {
			t.Errorf("%d snapshots: cost %v, want %v", k, got, want)
		}
	}
}

// TestWriteAmplification: of a stream of first writes of a chunk each, with one flush at its end, what is
// written beside the data is the slots, 16 bytes a chunk rounded up to chunks, and a zeroed area for each
// area.
func TestWriteAmplification(t *testing.T) {
	const n = 2000 // chunks: 7 areas and a part of the eighth
	r, _, s := standard(t, 8*n, 8*(n+100))
	for i := range int64(n) {
		write(t, s, 8*(i*7%n), 8, byte(i))
	}
	flush(t, s)
	got := r.cost()
	if data, areas := int64(8*n), int64((n+255)/256); got.written != data+8*areas+8*(areas-1) || got.flushes != 2 || got.reads != 0 {
		t.Errorf("cost %v for %d sectors of data over %d areas", got, data, areas)
	}
}

// TestCostOfMerge: a merge of n chunks in windows takes ⌈n/window⌉ pairs of flushes, one of the origin and
// one of the COW device, reads each chunk once and writes it once.
func TestCostOfMerge(t *testing.T) {
	for _, c := range []struct{ n, window int64 }{{100, 100}, {100, 30}, {100, 7}, {250, 64}} {
		r, _, s := standard(t, 8192, 8192)
		for i := range c.n {
			write(t, s, 8*(i*3%c.n), 8, byte(i))
		}
		flush(t, s)
		m := r.merging(s)
		r.log.Clear()
		steps := int64(0)
		for left := uint64(c.n); left > 0; steps++ {
			merged, err := m.Step(uint64(c.window))
			if err != nil {
				t.Fatal(err)
			}
			left -= merged
		}
		want := (c.n + c.window - 1) / c.window
		got := r.cost()
		if steps != want || got.flushes != 2*want {
			t.Errorf("%d chunks, window %d: %d steps and %d flushes, want %d and %d", c.n, c.window, steps, got.flushes, want, 2*want)
		}
		// Beside the data at most a chunk of slots a step and the one before is read, and as much written.
		if data := 8 * c.n; got.read < data || got.read > data+8*want*2 || got.written < data || got.written > data+8*want*2 {
			t.Errorf("%d chunks, window %d: cost %v", c.n, c.window, got)
		}
	}
}
