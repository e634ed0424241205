package chunkmap

import (
	"runtime"
	"testing"
	"unsafe"

	"github.com/dmsnap/dmsnap/ondisk"
)

// TestMemory holds the promises of the package comment: bytes of heap an exception, by pattern.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	if unsafe.Sizeof(shard{}) != 64 || unsafe.Sizeof(page{}) != 32 {
		t.Errorf("a shard has %d bytes, a slot of a directory %d", unsafe.Sizeof(shard{}), unsafe.Sizeof(page{}))
	}
	const n = million / 8
	for _, c := range []struct {
		name  string
		limit float64
		old   func(i uint64) uint64
		new   func(i uint64) uint64
	}{
		{"in order", 0.25, func(i uint64) uint64 { return i }, func(i uint64) uint64 { return i + 2 + i/256 }},
		{"in order, chunks of one sector", 0.5, func(i uint64) uint64 { return i }, func(i uint64) uint64 { return i + 2 + i/32 }},
		{"in order from the last", 4.5, func(i uint64) uint64 { return n - i }, func(i uint64) uint64 { return i + 2 }},
		{"every chunk, scattered", 4.5, func(i uint64) uint64 { return permute(i, n) }, func(i uint64) uint64 { return i }},
		{"one in 2, scattered", 9, func(i uint64) uint64 { return permute(i, 2*n) }, func(i uint64) uint64 { return i }},
		{"one in 3, scattered", 13, func(i uint64) uint64 { return permute(i, 4*n) * 3 / 4 }, func(i uint64) uint64 { return i }},
		{"one in 4, scattered", 11, func(i uint64) uint64 { return permute(i, 4*n) }, func(i uint64) uint64 { return i }},
		{"one in 16, scattered", 11, func(i uint64) uint64 { return permute(i, 16*n) }, func(i uint64) uint64 { return i }},
		{"one in 64, scattered", 16, func(i uint64) uint64 { return permute(i, 64*n) }, func(i uint64) uint64 { return i }},
		{"every other", 9, func(i uint64) uint64 { return 2 * i }, func(i uint64) uint64 { return i }},
		{"a page each", 100, func(i uint64) uint64 { return i << 40 }, func(i uint64) uint64 { return i }},
		{"a page each, large homes", 110, func(i uint64) uint64 { return i << 44 }, func(i uint64) uint64 { return 1<<56 - 1 - i }},
		{"one in 2, large homes", 20, func(i uint64) uint64 { return permute(i, 2*n) }, func(i uint64) uint64 { return 1<<56 - 1 - i }},
		{"one in 4, large homes", 20, func(i uint64) uint64 { return permute(i, 4*n) }, func(i uint64) uint64 { return 1<<56 - 1 - i }},
	} {
		before := heap()
		m := new(Map)
		for i := range uint64(n) {
			m.Insert(ondisk.Exception{Old: ondisk.OriginChunk(c.old(i)), New: ondisk.COWChunk(c.new(i))})
		}
		each := (float64(heap()) - float64(before)) / float64(m.Len())
		t.Logf("%s: %.2f bytes an exception", c.name, each)
		if each > c.limit {
			t.Errorf("%s: %.2f bytes an exception, more than %v", c.name, each, c.limit)
		}
		runtime.KeepAlive(m)
	}
}

// TestGap: a gap across everything is measured in no time, though it has 2^54 pages.
func TestGap(t *testing.T) {
	var m Map
	for _, old := range []ondisk.OriginChunk{5, 1 << 63, 1<<64 - 1} {
		m.Insert(ondisk.Exception{Old: old, New: 7})
	}
	for _, c := range []struct {
		old  ondisk.OriginChunk
		max  uint64
		want uint64
	}{
		{0, 1<<64 - 1, 5},
		{6, 1<<64 - 1, 1<<63 - 6},
		{6, 1 << 62, 1 << 62},
		{1<<63 + 1, 1<<64 - 1, 1<<63 - 2},
	} {
		if _, n, mapped := m.Run(c.old, c.max); n != c.want || mapped {
			t.Errorf("Run(%d, %d) = %d, %v; want %d", c.old, c.max, n, mapped, c.want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { m.Get(5); m.Run(6, 1<<64-1); m.Max() }); n != 0 {
		t.Logf("Get, Run and Max allocate %v times", n)
	}
}
