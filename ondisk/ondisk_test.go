package ondisk_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

func TestHeaderRoundTrip(t *testing.T) {
	h := ondisk.Header{Magic: 0x04030201, Valid: 0x14131211, Version: 0x24232221, ChunkSectors: 0x34333231}
	b := bytes.Repeat([]byte{0xff}, 20)
	h.Encode(b)
	if got := hex.EncodeToString(b); got != "01020304111213142122232431323334ffffffff" {
		t.Errorf("header %s", got)
	}
	if got := ondisk.DecodeHeader(b); got != h {
		t.Errorf("decoded as %+v", got)
	}
}

func TestExceptionRoundTrip(t *testing.T) {
	e := ondisk.Exception{Old: 0x0807060504030201, New: 0x1817161514131211}
	b := bytes.Repeat([]byte{0xff}, 20)
	e.Encode(b)
	if got := hex.EncodeToString(b); got != "01020304050607081112131415161718ffffffff" {
		t.Errorf("slot %s", got)
	}
	if got := ondisk.DecodeException(b); got != e {
		t.Errorf("decoded as %+v", got)
	}
	for e, end := range map[ondisk.Exception]bool{{}: true, {Old: 7}: true, {New: 7}: false, {Old: 1, New: math.MaxUint64}: false} {
		if e.IsEnd() != end {
			t.Errorf("%+v: IsEnd %v", e, e.IsEnd())
		}
	}
}

func TestMagicSaysSnAp(t *testing.T) {
	var b [ondisk.HeaderSize]byte
	ondisk.Header{Magic: ondisk.Magic}.Encode(b[:])
	if got := string(b[:4]); got != "SnAp" {
		t.Errorf("magic %q", got)
	}
}

func TestHeaderCheck(t *testing.T) {
	good := ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	if err := (ondisk.Header{Valid: 1, Version: 7, ChunkSectors: 3}).Check(); err != ondisk.ErrNoStore {
		t.Errorf("zero magic: %v", err)
	}
	for place, change := range map[string]func(*ondisk.Header){
		"header, byte 0x0": func(h *ondisk.Header) { h.Magic++ },
		"header, byte 0x8": func(h *ondisk.Header) { h.Version = 2; h.Valid = 0 },
		"header, byte 0xc": func(h *ondisk.Header) { h.ChunkSectors = 24 },
	} {
		h := good
		change(&h)
		var corrupt *ondisk.CorruptError
		if err := h.Check(); !errors.As(err, &corrupt) || corrupt.Place != place {
			t.Errorf("%+v: %v, want one at %s", h, err, place)
		}
	}
}

// TestLayoutPins compares the arithmetic with figures calculated by hand from the layout of the format.
func TestLayoutPins(t *testing.T) {
	for _, c := range []struct {
		sectors uint32
		slots   uint64
		area1   ondisk.COWChunk
		at      int64 // byte of area 1
		data    map[uint64]ondisk.COWChunk
	}{
		{1, 32, 34, 17408, map[uint64]ondisk.COWChunk{0: 2, 31: 33, 32: 35, 63: 66, 64: 68}},
		{8, 256, 258, 1056768, map[uint64]ondisk.COWChunk{0: 2, 255: 257, 256: 259, 512: 516}},
		{2097152, 67108864, 67108866, 67108866 << 30, map[uint64]ondisk.COWChunk{0: 2, 67108863: 67108865, 67108864: 67108867}},
	} {
		l, err := ondisk.NewLayout(c.sectors)
		if err != nil {
			t.Fatal(err)
		}
		if l.SlotsPerArea() != c.slots || l.AreaChunk(0) != 1 || l.AreaChunk(1) != c.area1 {
			t.Errorf("%d sectors: E %d, areas %d and %d", c.sectors, l.SlotsPerArea(), l.AreaChunk(0), l.AreaChunk(1))
		}
		if got := l.SlotOffset(ondisk.Slot{Area: 1, Index: 3}); got != c.at+48 {
			t.Errorf("%d sectors: slot 3 of area 1 at %d", c.sectors, got)
		}
		for n, want := range c.data {
			if got := l.DataChunk(n); got != want {
				t.Errorf("%d sectors: exception %d in chunk %d, want %d", c.sectors, n, got, want)
			}
		}
		if int64(1)<<l.Shift() != l.ChunkBytes() || l.ChunkBytes() != int64(c.sectors)*512 {
			t.Errorf("%d sectors: %d bytes, shift %d", c.sectors, l.ChunkBytes(), l.Shift())
		}
	}
	if got := (ondisk.Layout{ChunkSectors: 8}).Place(ondisk.Slot{Area: 3, Index: 17}); got != "area 3 slot 17, byte 0x304110" {
		t.Errorf("place %q", got)
	}
}

// TestLayoutWalk walks over a device chunk by chunk and wants each to be what the formulas say.
func TestLayoutWalk(t *testing.T) {
	for _, sectors := range []uint32{1, 2, 8, 64} {
		l := ondisk.Layout{ChunkSectors: sectors}
		area, n, left := uint64(0), uint64(0), uint64(0)
		for m := ondisk.COWChunk(1); m < 5000; m++ {
			if left == 0 { // the picture: an area, then as many data chunks as it has slots
				if !l.IsArea(m) || l.IsData(m) || l.AreaChunk(area) != m || l.NextData(m) != m+1 {
					t.Fatalf("%d sectors: chunk %d should be area %d", sectors, m, area)
				}
				area, left = area+1, l.SlotsPerArea()
				continue
			}
			if l.IsArea(m) || !l.IsData(m) || l.DataChunk(n) != m || l.NextData(m) != m {
				t.Fatalf("%d sectors: chunk %d should be that of exception %d", sectors, m, n)
			}
			n, left = n+1, left-1
			// n exceptions and the slot behind the last one.
			if want := max(uint64(m)+1, uint64(l.AreaChunk(n/l.SlotsPerArea()))+1); l.ChunksNeeded(n) != want {
				t.Fatalf("%d sectors: %d exceptions need %d chunks, want %d", sectors, n, l.ChunksNeeded(n), want)
			}
		}
		if l.IsData(0) || l.NextData(0) != 2 {
			t.Errorf("%d sectors: the header is taken for data", sectors)
		}
	}
}

func TestChunks(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 8}
	for size, want := range map[int64][2]uint64{0: {0, 0}, 512: {0, 1}, 4096: {1, 1}, 4608: {1, 2}, 1 << 40: {1 << 28, 1 << 28}} {
		if got := [2]uint64{l.Chunks(size, false), l.Chunks(size, true)}; got != want {
			t.Errorf("%d bytes: %v chunks, want %v", size, got, want)
		}
	}
	if got := l.OriginChunkAt(8191); got != 1 {
		t.Errorf("byte 8191 is in chunk %d", got)
	}
	if l.OriginOffset(3) != 12288 || l.COWOffset(3) != 12288 {
		t.Error("offsets of chunk 3")
	}
}

func TestChunkSizes(t *testing.T) {
	for sectors, want := range map[uint32]error{
		0: ondisk.ErrChunkNotPowerOf2, 1: nil, 3: ondisk.ErrChunkNotPowerOf2, 8: nil, 24: ondisk.ErrChunkNotPowerOf2,
		2097152: nil, 4194304: ondisk.ErrChunkTooHigh, math.MaxUint32: ondisk.ErrChunkNotPowerOf2,
	} {
		if err := ondisk.CheckChunkSectors(sectors); err != want {
			t.Errorf("%d sectors: %v, want %v", sectors, err, want)
		}
		if _, err := ondisk.NewLayout(sectors); !errors.Is(err, want) {
			t.Errorf("layout of %d sectors: %v, want %v", sectors, err, want)
		}
	}
}
