package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// The order of writes, as golden text: offsets and lengths in sectors, F a flush, WD a durable write, Z
// zeros. What must be durable before what is decided by these lines alone (docs/durability.md), so a
// change to one of them is a change of a promise. The data of a chunk is its owner's to write, and
// stands here for the reader as a write between reservation and commit.

// orders are the operations of a store, each from a fresh one.
var orders = []struct {
	name  string
	chunk uint32
	run   func(t *testing.T, o *ordered)
	want  string
}{
	// H6: zeros, flush, header.
	{"create", 1, func(t *testing.T, o *ordered) { o.create(t) },
		"R 0+1; Z 1+1; F; WD 0+1"},
	{"create with the kernel's default chunk", 32, func(t *testing.T, o *ordered) { o.create(t) },
		"R 0+1; Z 32+32; Z 8+24; F; WD 0+8"},
	{"create by force", 8, func(t *testing.T, o *ordered) {
		o.create(t)
		o.add(t, 0, 3)
		mustSync(t, o.Store)
		o.log.Clear()
		if _, err := store.Create(o.dev, ondisk.Layout{ChunkSectors: 8}, true); err != nil {
			t.Fatal(err)
		}
	}, "Z 8+8; F; WD 0+8"},
	// The header is durable before the first slot is written.
	{"create unsynced", 8, func(t *testing.T, o *ordered) {
		o.createUnsynced(t)
		o.add(t, 7, 1)
		mustSync(t, o.Store)
	}, "R 0+1; W 0+8; W 16+8; F; W 8+8; F"},
	{"create unsynced, sync of nothing", 16, func(t *testing.T, o *ordered) {
		o.createUnsynced(t)
		mustSync(t, o.Store)
	}, "R 0+1; W 0+8; F"},
	{"seal", 8, func(t *testing.T, o *ordered) {
		o.fresh(t)
		if err := o.Seal(); err != nil {
			t.Fatal(err)
		}
		mustSync(t, o.Store)
	}, "R 0+8; W 0+8; F"},
	{"open writes nothing", 8, func(t *testing.T, o *ordered) {
		o.create(t)
		o.log.Clear()
		o.reopen(t)
	}, "R 0+1; R 0+1; R 8+8"},

	// A batch: data, flush, slots, flush.
	{"commit", 8, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 7, 1)
		mustSync(t, o.Store)
	}, "W 16+8; F; W 8+8; F"},
	{"commit in chunks of 16 sectors", 16, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 7, 1)
		mustSync(t, o.Store)
	}, "W 32+16; F; W 16+8; F"}, // the block that changed, not the area
	{"batch within a sector", 1, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 7, 5)
		o.add(t, 20, 3)
		mustSync(t, o.Store)
	}, "W 2+5; W 7+3; F; W 1+1; F"},
	{"batch over sectors", 8, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 100)
		mustSync(t, o.Store)
	}, "W 16+800; F; W 8+8; F"},
	{"batch over blocks", 16, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 300)
		mustSync(t, o.Store)
	}, "W 32+4800; F; W 16+16; F"},
	// The next area is zeros, durably, before the full one is.
	{"batch that fills an area", 1, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 32)
		mustSync(t, o.Store)
	}, "W 2+32; Z 34+1; F; W 1+1; F"},
	{"batch over areas", 1, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 70)
		mustSync(t, o.Store)
	}, "W 2+32; W 35+32; W 68+6; Z 34+1; Z 67+1; F; W 1+1; W 34+1; W 67+1; F"},
	{"the next batch after an area's step", 1, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 32)
		mustSync(t, o.Store)
		o.log.Clear()
		o.add(t, 50, 1)
		mustSync(t, o.Store)
	}, "W 35+1; F; W 34+1; F"},
	{"sync of nothing", 8, func(t *testing.T, o *ordered) {
		o.fresh(t)
		mustSync(t, o.Store)
	}, "F"},
	// H4, H8: once after loading, zeros over what may stand after the end mark's block.
	{"first batch after loading", 16, func(t *testing.T, o *ordered) {
		o.create(t)
		o.add(t, 0, 10)
		mustSync(t, o.Store)
		o.reopen(t)
		o.log.Clear()
		o.add(t, 100, 1)
		mustSync(t, o.Store)
		o.add(t, 200, 1)
		mustSync(t, o.Store)
	}, "W 192+16; Z 24+8; F; W 16+8; F; W 208+16; F; W 16+8; F"},

	{"invalidate", 8, func(t *testing.T, o *ordered) {
		o.fresh(t)
		if err := o.Invalidate(errDisk); err != nil {
			t.Fatal(err)
		}
		if err := o.Invalidate(errDisk); err != nil { // once is enough
			t.Fatal(err)
		}
	}, "WD 0+8"},
	{"invalidate in chunks of 16 sectors", 16, func(t *testing.T, o *ordered) {
		o.fresh(t)
		if err := o.Invalidate(errDisk); err != nil {
			t.Fatal(err)
		}
	}, "Z 8+8; WD 0+8"},

	// The caller has flushed the origin. Slots are read again, and a block that memory has not is read twice;
	// then the end mark is written, durably. Where more than its block changes, the rest is zeros before.
	{"drop the last", 8, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 10)
		mustSync(t, o.Store)
		o.dropLast(t, 2)
	}, "R 4224+32 bytes; WD 8+8"},
	{"drop over blocks", 16, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 300)
		mustSync(t, o.Store)
		o.dropLast(t, 200)
	}, "R 9792+3200 bytes; R 8192+1600 bytes; R 8192+1600 bytes; W 12288+704 bytes; F; WD 16+8"},
	{"drop over areas", 1, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 70)
		mustSync(t, o.Store)
		o.dropLast(t, 50)
	}, "R 34304+96 bytes; R 34+1; R 832+192 bytes; R 512+320 bytes; R 512+320 bytes; W 34304+96 bytes; W 34+1; F; WD 1+1"},
	{"drop all of an area", 1, func(t *testing.T, o *ordered) {
		o.fresh(t)
		o.add(t, 0, 32)
		mustSync(t, o.Store)
		o.dropLast(t, 32)
	}, "R 1+1; WD 1+1"},
	{"first drop after loading", 16, func(t *testing.T, o *ordered) {
		o.create(t)
		o.add(t, 0, 10)
		mustSync(t, o.Store)
		o.reopen(t)
		o.dropLast(t, 3)
	}, "R 8304+48 bytes; Z 24+8; WD 16+8"},
}

// TestOrderOfWrites compares what a store does to its device with the golden text.
func TestOrderOfWrites(t *testing.T) {
	for _, c := range orders {
		t.Run(c.name, func(t *testing.T) {
			o := newOrdered(c.chunk)
			c.run(t, o)
			if got := o.lines(); got != c.want {
				t.Errorf("\n got %s\nwant %s", got, c.want)
			}
			if _, err := store.Open(o.mem); err != nil {
				t.Errorf("store is not sound: %v", err)
			}
		})
	}
}

// An ordered is a store on a device of noise that writes down what is done to it.
type ordered struct {
	*store.Store
	layout ondisk.Layout
	mem    *block.Memory
	log    blocktest.Log
	dev    block.Device
}

func newOrdered(chunk uint32) *ordered {
	content := blocktest.Pattern(6000*sector, 7)
	clear(content[:sector])
	o := &ordered{layout: ondisk.Layout{ChunkSectors: chunk}, mem: block.MemoryFrom(content)}
	o.dev = o.log.Record("", o.mem)
	return o
}

func (o *ordered) create(t *testing.T) {
	t.Helper()
	s, err := store.Create(o.dev, o.layout, false)
	if err != nil {
		t.Fatal(err)
	}
	o.Store = s
}

func (o *ordered) createUnsynced(t *testing.T) {
	t.Helper()
	if err := block.Zero(o.mem, 0, o.mem.Size(), 0); err != nil {
		t.Fatal(err)
	}
	s, err := store.CreateUnsynced(o.dev, o.layout, "")
	if err != nil {
		t.Fatal(err)
	}
	o.Store = s
}

// fresh is a new store whose creation is not looked at.
func (o *ordered) fresh(t *testing.T) {
	t.Helper()
	o.create(t)
	o.log.Clear()
}

func (o *ordered) reopen(t *testing.T) {
	t.Helper()
	s, err := store.Open(o.dev)
	if err != nil {
		t.Fatal(err)
	}
	o.Store = s
}

// add writes the data of n origin chunks and commits them.
func (o *ordered) add(t *testing.T, old ondisk.OriginChunk, n uint64) {
	t.Helper()
	for n > 0 {
		r, err := o.Reserve(old, n)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.dev.WriteAt(make([]byte, int64(r.Count)*o.layout.ChunkBytes()), o.layout.COWOffset(r.New)); err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
		old, n = old+ondisk.OriginChunk(r.Count), n-r.Count
	}
}

// dropLast drops n exceptions, and leaves what that did in the log.
func (o *ordered) dropLast(t *testing.T, n uint64) {
	t.Helper()
	merged, err := o.Last(n)
	if err != nil {
		t.Fatal(err)
	}
	o.log.Clear()
	if err := o.DropLast(merged); err != nil {
		t.Fatal(err)
	}
}

// lines is the log on one line.
func (o *ordered) lines() string {
	return strings.ReplaceAll(strings.TrimSpace(o.log.String()), "\n", "; ")
}

// TestTornSlotsStayVoid: slots that a torn write left after the end mark, in a block that the next batch does not
// write, do not come to life when the batches after a power cut fill the block before it (H4, H8).
func TestTornSlotsStayVoid(t *testing.T) {
	const c = 16 // an area is two blocks
	layout := ondisk.Layout{ChunkSectors: c}
	crash := blocktest.NewCrash(make([]byte, 300*c*sector))
	s, err := store.Create(crash, layout, false)
	if err != nil {
		t.Fatal(err)
	}
	add(t, s, 0, 250)
	mustSync(t, s)
	images, dead := 0, 0
	crash.Power().Observe(func(op blocktest.Op) {
		for img := range crash.Power().Cut().Images(blocktest.Choices{}) {
			images++
			mem := block.MemoryFrom(img.Disk(crash))
			again := reopen(t, mem)
			behind := ondisk.DecodeException(mem.Bytes()[layout.SlotOffset(ondisk.Slot{Index: 256}):])
			if again.Len() < 256 && !behind.IsEnd() {
				dead++
			}
			add(t, again, 1000, 256-min(again.Len(), 255)) // up to the edge of the block, or one over it
			n := again.Len()
			mustSync(t, again)
			if got := reopen(t, mem); got.Len() != n {
				t.Errorf("after %v, %v: %d exceptions are %d after loading", op, img, n, got.Len())
			}
		}
	})
	add(t, s, 500, 20) // in both blocks
	mustSync(t, s)
	t.Logf("%d images, %d with slots behind the end mark", images, dead)
	if dead == 0 {
		t.Error("no torn write was seen")
	}
}

// TestVoidSlotsStayVoid: whatever stands after the end mark when a store is loaded, a batch that ends at the edge of a
// block, of an area or of what is written at once does not join it.
func TestVoidSlotsStayVoid(t *testing.T) {
	for _, c := range []struct {
		chunk       uint32
		loaded, add uint64
	}{
		{1, 5, 27}, {1, 5, 27 + 32}, {8, 10, 22}, {8, 10, 246}, {16, 10, 246}, {16, 10, 502}, {256, 10, 246},
		{256, 10, 4086}, // 64 KiB of slots
	} {
		t.Run(fmt.Sprintf("chunk %d, %d and %d", c.chunk, c.loaded, c.add), func(t *testing.T) {
			s, mem, _, _ := newStore(t, c.chunk, int64(c.chunk)*int64(c.loaded+c.add+100))
			add(t, s, 0, c.loaded)
			mustSync(t, s)
			l := s.Layout()
			// The rest of the area, but for its end mark, looks like exceptions of chunks that are there.
			for i := c.loaded + 1; i < l.SlotsPerArea(); i++ {
				var b [ondisk.SlotSize]byte
				ondisk.Exception{Old: ondisk.OriginChunk(1e6 + i), New: 3}.Encode(b[:])
				if _, err := mem.WriteAt(b[:], l.SlotOffset(ondisk.Slot{Index: i})); err != nil {
					t.Fatal(err)
				}
			}
			s = reopen(t, mem)
			add(t, s, 1000, c.add)
			mustSync(t, s)
			if got := reopen(t, mem).Len(); s.Len() != c.loaded+c.add || got != s.Len() {
				t.Errorf("%d exceptions, %d after loading, want %d", s.Len(), got, c.loaded+c.add)
			}
		})
	}
}

// TestCrashInCreateByForce cuts a creation over an old store of any chunk size: a store can be loaded, the
// new one, which is empty, or what is left of the old one.
func TestCrashInCreateByForce(t *testing.T) {
	images := 0
	for _, from := range []uint32{1, 8, 16} {
		for _, to := range []uint32{1, 2, 8, 16} {
			crash := blocktest.NewCrash(make([]byte, 256*sector))
			old, err := store.Create(crash, ondisk.Layout{ChunkSectors: from}, false)
			if err != nil {
				t.Fatal(err)
			}
			add(t, old, 100, 10)
			mustSync(t, old)
			crash.Power().Observe(func(op blocktest.Op) {
				for img := range crash.Power().Cut().Images(blocktest.Choices{Random: 20}) {
					images++
					s, err := store.Open(block.MemoryFrom(img.Disk(crash)))
					if err != nil {
						t.Errorf("from %d to %d, after %v, %v: %v", from, to, op, img, err)
						return
					}
					c := s.Layout().ChunkSectors
					if c != from && c != to || from != to && c == to && s.Len() > 0 || s.Len() > 10 {
						t.Errorf("from %d to %d: chunk %d, %d exceptions", from, to, c, s.Len())
					}
				}
			})
			if _, err := store.Create(crash, ondisk.Layout{ChunkSectors: to}, true); err != nil {
				t.Fatal(err)
			}
			if s, err := store.Open(block.MemoryFrom(crash.Durable())); err != nil || s.Len() != 0 || s.Layout().ChunkSectors != to {
				t.Errorf("from %d to %d: %v", from, to, err)
			}
		}
	}
	t.Logf("%d images", images)
}

// TestCrashInCreateUnsynced cuts the first operations of a store that was made without a flush: before the first flush
// there may be no store, or the empty one; what a Sync made durable is there.
func TestCrashInCreateUnsynced(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, c := range []uint32{1, 8, 16} {
		l := ondisk.Layout{ChunkSectors: c}
		crash := blocktest.NewCrash(make([]byte, 200*int(c)*sector))
		images, none, synced := 0, 0, uint64(0)
		flushed := false
		crash.Power().Observe(func(op blocktest.Op) {
			flushed = flushed || op.Kind == blocktest.Flush
			for img := range crash.Power().Cut().Images(blocktest.Choices{Random: 20}) {
				images++
				mem := block.MemoryFrom(img.Disk(crash))
				s, err := store.Open(mem)
				if errors.Is(err, ondisk.ErrNoStore) && !flushed {
					none++
					if len(bytes.Trim(mem.Bytes()[:2*l.ChunkBytes()], "\x00")) > 0 {
						t.Errorf("chunk %d, after %v, %v: no store, and no zeros", c, op, img)
					}
					continue
				}
				if err != nil {
					t.Errorf("chunk %d, after %v, %v: %v", c, op, img, err)
					return
				}
				if s.Layout() != l || s.OriginFormat() != "qcow2" || s.Len() < synced {
					t.Errorf("chunk %d, after %v, %v: chunk %d, format %s, %d exceptions of %d", c, op, img,
						s.Layout().ChunkSectors, s.OriginFormat(), s.Len(), synced)
				}
			}
		})
		s, err := store.CreateUnsynced(crash, l, "qcow2")
		if err != nil {
			t.Fatal(err)
		}
		for i := range uint64(3) {
			r, err := s.Reserve(ondisk.OriginChunk(40*i), 15)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := crash.WriteAt(blocktest.Pattern(int(int64(r.Count)*l.ChunkBytes()), i), l.COWOffset(r.New)); err != nil {
				t.Fatal(err)
			}
			if err := r.Commit(); err != nil {
				t.Fatal(err)
			}
			mustSync(t, s)
			synced += r.Count
		}
		if none == 0 || none == images {
			t.Errorf("chunk %d: %d of %d images have no store", c, none, images)
		}
		if s, err := store.Open(block.MemoryFrom(crash.Durable())); err != nil || s.Len() != synced {
			t.Errorf("chunk %d: %v", c, err)
		}
	}
	if _, err := store.CreateUnsynced(existing(t), ondisk.Layout{ChunkSectors: 8}, ""); !errors.Is(err, store.ErrExists) {
		t.Errorf("over a store: %v", err)
	}
}

// existing returns a device with a store.
func existing(t *testing.T) block.Device {
	t.Helper()
	_, mem, _, _ := newStore(t, 8, 256)
	return mem
}
