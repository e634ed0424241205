package block_test

import (
	"bytes"
	"runtime"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestMemoryIsSparse(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	m := block.NewMemory(1 << 40)
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 64<<10 {
		t.Errorf("an empty terabyte took %d bytes", used)
	}
	for _, off := range []int64{0, 1 << 30, 1<<40 - 3, 1<<39 + 4095} {
		write(t, m, off, "abc")
	}
	if m.Allocated() != 5*4096 {
		t.Errorf("%d bytes allocated", m.Allocated())
	}
	// Zeroing nearly all of it takes no longer than it has pages.
	if err := m.ZeroAt(1, 1<<40-2, 0); err != nil {
		t.Fatal(err)
	}
	want(t, m, 0, "a\x00\x00")
	want(t, m, 1<<40-3, "\x00\x00c")
	want(t, m, 1<<30, "\x00\x00\x00")
	want(t, m, 1<<39+4095, "\x00\x00\x00")
	if m.Allocated() != 2*4096 {
		t.Errorf("%d bytes allocated after zeroing", m.Allocated())
	}
	if err := m.Discard(0, 1<<40); err != nil || m.Allocated() != 0 {
		t.Errorf("discard: %v, %d bytes allocated", err, m.Allocated())
	}
}

func TestMemoryExtents(t *testing.T) {
	m := block.NewMemory(1 << 40)
	write(t, m, 10000, "x")
	got, err := m.Extents(100, 20000)
	hole := block.Hole | block.ReadsZero
	if err != nil || len(got) != 3 || got[0] != (block.Extent{Length: 8092, Flags: hole}) || got[1] != (block.Extent{Length: 4096}) || got[2] != (block.Extent{Length: 7812, Flags: hole}) {
		t.Errorf("%v, %v", got, err)
	}
	// Bounded work: a terabyte is not looked through page by page.
	got, err = m.Extents(0, 1<<40)
	var covered int64
	for _, e := range got {
		covered += e.Length
	}
	if err != nil || covered != 1<<40 || len(got) != 3 {
		t.Errorf("a call covered %d bytes in %v, %v", covered, got, err)
	}
	write(t, m, 1<<39, "x")
	if got, err := m.Extents(1<<30, 1<<40-1<<30); err != nil || len(got) != 1 || got[0].Length != 1<<39-1<<30 {
		t.Errorf("the hole before a page: %v, %v", got, err)
	}
}

func TestMemoryFrom(t *testing.T) {
	p := blocktest.Pattern(10_001, 1)
	m := block.MemoryFrom(p)
	p[0]++
	if got := m.Bytes(); !bytes.Equal(got, blocktest.Pattern(10_001, 1)) || m.Size() != 10_001 {
		t.Error("the content is not a copy")
	}
	defer func() {
		if recover() == nil {
			t.Error("a negative size was taken")
		}
	}()
	block.NewMemory(-1)
}
