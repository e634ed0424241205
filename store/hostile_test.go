package store_test

import (
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A claim is a device of any size that holds what a function says: a sparse file made to harm.
type claim struct {
	size  int64
	fill  func(p []byte, off int64)
	read  int64 // bytes
	calls int64
}

func (c *claim) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	c.read += int64(len(p))
	c.calls++
	c.fill(p, off)
	if off == 0 {
		ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8}.Encode(p)
	}
	return len(p), nil
}

func (c *claim) WriteAt(p []byte, off int64) (int, error) {
	return 0, errors.New("a test that reads only")
}
func (c *claim) Flush() error { return nil }
func (c *claim) Size() int64  { return c.size }

// each calls f with the number of every slot that lies in p, and its bytes.
func each(p []byte, off int64, f func(n uint64, slot []byte)) {
	const area = 4096 * 257
	for i := 0; i+16 <= len(p); i += 16 {
		if at := off + int64(i) - 4096; at >= 0 && at%area < 4096 {
			f(uint64(at/area*256+at%area/16), p[i:])
		}
	}
}

// TestHostileStores opens stores that were made to take time or memory. What they cost is bounded by the slots
// that are there to be read, whatever the numbers in them say, and each is refused with its place.
func TestHostileStores(t *testing.T) {
	put := func(slot []byte, old, new uint64) {
		binary.LittleEndian.PutUint64(slot, old)
		binary.LittleEndian.PutUint64(slot[8:], new)
	}
	for _, c := range []struct {
		name  string
		size  int64
		fill  func(p []byte, off int64)
		wrong string // what the error says, "": it opens
		reads int64  // bytes at most
	}{
		{"an empty store that claims 8 EiB", 1<<63 - 512, func(p []byte, off int64) {}, "", 1 << 20},
		{"2^40 chunks, the first beyond", 1 << 52, func(p []byte, off int64) {
			each(p, off, func(n uint64, s []byte) { put(s, n, 1<<40) })
		}, "area 0 slot 0, byte 0x1000: COW chunk 1099511627776 is past the end", 1 << 20},
		{"all in one chunk", 1 << 40, func(p []byte, off int64) {
			each(p, off, func(n uint64, s []byte) {
				if n < 1000 {
					put(s, n, 5)
				}
			})
		}, "two exceptions name it", 1 << 20},
		{"one origin chunk again and again", 1 << 40, func(p []byte, off int64) {
			each(p, off, func(n uint64, s []byte) {
				if n < 1000 {
					put(s, 7, 2+n+n/256)
				}
			})
		}, "area 0 slot 1, byte 0x1010: origin chunk 7 has two exceptions", 1 << 20},
		{"data in an area", 1 << 40, func(p []byte, off int64) {
			each(p, off, func(n uint64, s []byte) { put(s, n, 258) })
		}, "area 0 slot 0, byte 0x1000: COW chunk 258 holds metadata", 1 << 20},
		{"data in the header", 1 << 40, func(p []byte, off int64) {
			each(p, off, func(n uint64, s []byte) { put(s, n, 1) })
		}, "COW chunk 1 holds metadata", 1 << 20},
		{"chunks as far apart as can be", 1 << 40, func(p []byte, off int64) {
			each(p, off, func(n uint64, s []byte) {
				if n < 100_000 {
					put(s, n*0x9e3779b97f4a7c15, 2+n+n/256)
				}
			})
		}, "", 8 << 20},
		{"full areas to the end", 4096 * (1 + 257*300), func(p []byte, off int64) {
			each(p, off, func(n uint64, s []byte) { put(s, n, 2+n+n/256) })
		}, "no end mark so far", 8 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev := &claim{size: c.size, fill: c.fill}
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			s, err := store.Open(dev)
			runtime.GC()
			runtime.ReadMemStats(&after)
			if c.wrong == "" && err != nil || c.wrong != "" && (err == nil || !strings.Contains(err.Error(), c.wrong)) {
				t.Errorf("%v, want %q", err, c.wrong)
			}
			var corrupt *ondisk.CorruptError
			if err != nil && !errors.As(err, &corrupt) {
				t.Errorf("%v is no CorruptError", err)
			}
			if dev.read > c.reads {
				t.Errorf("%d bytes were read", dev.read)
			}
			// Not by the clock, which a busy machine changes: what is done for a slot does not depend on the numbers in it,
			// as the memory does not, so that the calls and bytes bound the time.
			if n := dev.calls; n > 16+dev.read/4096 {
				t.Errorf("%d calls for %d bytes", n, dev.read)
			}
			if err == nil {
				// A slot of 16 bytes costs 110 at most, and a map begins with some.
				if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > int64(s.Len())*110+1<<20 {
					t.Errorf("%d bytes of memory for %d exceptions", grown, s.Len())
				}
			}
			runtime.KeepAlive(s)
		})
	}
}
