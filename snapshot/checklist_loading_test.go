package snapshot_test

import (
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

func TestC028EndMark(t *testing.T) {
	r, _, s := loads(t, image(8, 1024, pair{5, 2}, pair{6, 0}, pair{7, 3}))
	wantRead(t, s, 40, content(8, 2))
	wantRead(t, s, 48, r.old(48, 16))
	wantStatus(t, s, "24/1024 16")
}

func TestC029OriginChunkZero(t *testing.T) {
	_, _, s := loads(t, image(8, 1024, pair{0, 2}))
	wantRead(t, s, 0, content(8, 2))
}

// nextChunk writes origin chunk 900 and returns the COW chunk that it got.
func nextChunk(t *testing.T, c *cow, s *snapshot.Snapshot, chunkSectors uint32, index uint64) uint64 {
	t.Helper()
	write(t, s, 900*int64(chunkSectors), int64(chunkSectors), 1)
	flush(t, s)
	p := slot(c.memory.Bytes(), chunkSectors, index/uint64(32*chunkSectors), index%uint64(32*chunkSectors))
	if p[0] != 900 {
		t.Fatalf("slot %d is %v", index, p)
	}
	return p[1]
}

func TestC030HoleBeforeTheOnlyChunk(t *testing.T) {
	_, c, s := loads(t, image(8, 1024, pair{5, 10}))
	wantStatus(t, s, "88/1024 16")
	if got := nextChunk(t, c, s, 8, 1); got != 11 {
		t.Errorf("next chunk is %d", got)
	}
}

func TestC031DescendingSlotsLoad(t *testing.T) {
	_, c, s := loads(t, image(8, 1024, pair{5, 4}, pair{6, 3}, pair{7, 2}))
	for i, want := range []uint64{4, 3, 2} {
		wantRead(t, s, int64(5+i)*8, content(8, want))
	}
	if got := nextChunk(t, c, s, 8, 3); got != 5 {
		t.Errorf("next chunk is %d", got)
	}
}

func TestC032NextChunkIsNoArea(t *testing.T) {
	_, c, s := loads(t, image(1, 400, pair{0, 33}))
	wantStatus(t, s, "35/400 2")
	if got := nextChunk(t, c, s, 1, 1); got != 35 {
		t.Errorf("next chunk is %d", got)
	}
}

func TestC033AreaPastTheEnd(t *testing.T) {
	var full []pair
	for i := range uint64(32) {
		full = append(full, pair{i, i + 2})
	}
	refuses(t, image(1, 34, full...), "area 1, byte 0x4400")
	// Growing the device is all it takes to load it.
	_, _, s := loads(t, image(1, 35, full...))
	wantStatus(t, s, "35/35 3")
}

func TestC034SlotsBehindTheEndStayVoid(t *testing.T) {
	// One after the end mark, one further on in the same area, in another block of it.
	img := image(32, 320*32, pair{5, 2}, pair{6, 0}, pair{7, 3})
	copy(img[32*sector+300*16:], img[32*sector:][:16])
	img[32*sector+300*16] = 99
	r, c, s := loads(t, img)
	for i := range int64(299) { // up to the slot before the second stale one
		write(t, s, (500+i)*32, 32, 1)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = r.attach(c, snapshot.Options{})
	for _, chunk := range []int64{7, 99} {
		wantRead(t, s, chunk*32, r.old(chunk*32, 32))
	}
	if got := s.Status().Exceptions; got != 300 {
		t.Errorf("%d exceptions", got)
	}
	checkClean(t, c.memory, ondisk.Layout{ChunkSectors: 32})
}

func TestC035ImpossibleChunksAreRefused(t *testing.T) {
	refuses(t, image(8, 1024, pair{4, 2}, pair{5, 5000}), "area 0 slot 1, byte 0x1010: COW chunk 5000 is past the end")
	refuses(t, image(8, 1024, pair{5, 128}), "past the end")
	refuses(t, image(8, 1024, pair{5, 1}), "holds metadata")
	refuses(t, image(1, 400, pair{5, 34}), "holds metadata")
	refuses(t, image(8, 1024, pair{5, 2}, pair{5, 3}), "area 0 slot 1, byte 0x1010: origin chunk 5 has two exceptions")
	refuses(t, image(8, 1024, pair{5, 2}, pair{6, 2}), "two exceptions name it")
	refuses(t, image(8, 1024, pair{5, 1<<63 + 2}), "past the end")
	_, _, s := loads(t, image(8, 1024, pair{5, 127}, pair{1 << 62, 2}))
	wantStatus(t, s, fmt.Sprintf("%d/1024 16", 128*8))
}
