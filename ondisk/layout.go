package ondisk

import (
	"fmt"
	"math/bits"
)

// A Layout is the arithmetic of a store with a given chunk size (docs/spec/dm-snapshot.md §2.4). The zero value is not
// usable; see [NewLayout].
//
// With E slots an area, area k is COW chunk 1 + k·(E+1), and a chunk m > 0 is an area exactly when
// m mod (E+1) is 1.
type Layout struct {
	ChunkSectors uint32
}

// NewLayout returns the layout for chunks of chunkSectors sectors. An invalid chunk size is an error; see
// [CheckChunkSectors].
func NewLayout(chunkSectors uint32) (Layout, error) {
	if err := CheckChunkSectors(chunkSectors); err != nil {
		return Layout{}, fmt.Errorf("%w: %d sectors", err, chunkSectors)
	}
	return Layout{chunkSectors}, nil
}

// ChunkBytes is C, the size of a chunk in bytes: 512 to 1 GiB.
func (l Layout) ChunkBytes() int64 { return int64(l.ChunkSectors) * SectorSize }

// Shift is log2 of ChunkBytes: byte off lies in chunk off>>Shift.
func (l Layout) Shift() uint { return uint(bits.TrailingZeros32(l.ChunkSectors)) + 9 }

// SlotsPerArea is E.
func (l Layout) SlotsPerArea() uint64 { return uint64(l.ChunkSectors) * (SectorSize / SlotSize) }

// AreaChunk is the COW chunk that holds area k.
func (l Layout) AreaChunk(area uint64) COWChunk {
	return COWChunk(1 + area*(l.SlotsPerArea()+1))
}

// IsArea reports whether COW chunk m holds slots.
func (l Layout) IsArea(m COWChunk) bool { return uint64(m)%(l.SlotsPerArea()+1) == 1 }

// IsData reports whether COW chunk m may hold data: it is neither the header nor an area.
func (l Layout) IsData(m COWChunk) bool { return m != 0 && !l.IsArea(m) }

// NextData is the first data chunk at or after m.
func (l Layout) NextData(m COWChunk) COWChunk {
	m = max(m, FirstDataChunk)
	if l.IsArea(m) {
		m++
	}
	return m
}

// DataChunk is the COW chunk of the n-th exception (from 0) of a store filled in order.
func (l Layout) DataChunk(n uint64) COWChunk {
	return COWChunk(n + 2 + n/l.SlotsPerArea())
}

// ChunksNeeded is the number of chunks of the smallest COW device that can hold n exceptions and stay valid: the
// header, n data chunks, and an area for the slot after the last (docs/spec/dm-snapshot.md §2.4).
func (l Layout) ChunksNeeded(n uint64) uint64 {
	return n + 2 + n/l.SlotsPerArea()
}

// Room is the number of exceptions that a COW device of the given number of chunks can hold and stay valid: the largest
// n whose ChunksNeeded fits.
func (l Layout) Room(chunks uint64) uint64 {
	if chunks < uint64(FirstDataChunk) {
		return 0
	}
	e, left := l.SlotsPerArea(), chunks-2
	return left/(e+1)*e + min(left%(e+1), e-1)
}

// Chunks is the number of chunks of a device of size bytes; a short chunk at the end is counted for an origin
// (countShort), and not for a COW device, which never uses it.
func (l Layout) Chunks(size int64, countShort bool) uint64 {
	n := uint64(size) >> l.Shift()
	if countShort && size&(l.ChunkBytes()-1) != 0 {
		n++
	}
	return n
}

// OriginOffset is the first byte of origin chunk n. n must be less than 2^63 >> Shift.
func (l Layout) OriginOffset(n OriginChunk) int64 { return int64(n) << l.Shift() }

// OriginRange is the byte range of count chunks from first on, cut at end: the end of the origin, whose last chunk may
// extend past it, or of a request. first begins at or before end. Nothing overflows, whatever count is and however
// large the origin.
func (l Layout) OriginRange(first OriginChunk, count uint64, end int64) (from, to int64) {
	from = l.OriginOffset(first)
	if whole := uint64(end-from) >> l.Shift(); count > whole {
		return from, end
	}
	return from, from + int64(count)<<l.Shift()
}

// COWOffset is the first byte of COW chunk m.
func (l Layout) COWOffset(m COWChunk) int64 { return int64(m) << l.Shift() }

// OriginChunkAt is the origin chunk in which byte off ≥ 0 lies.
func (l Layout) OriginChunkAt(off int64) OriginChunk { return OriginChunk(uint64(off) >> l.Shift()) }

// A Slot is the address of an exception on disk, as errors give it.
type Slot struct {
	Area  uint64
	Index uint64 // 0 ≤ Index < SlotsPerArea
}

// SlotOffset is the byte of the COW device at which slot s begins.
func (l Layout) SlotOffset(s Slot) int64 {
	return l.COWOffset(l.AreaChunk(s.Area)) + int64(s.Index)*SlotSize
}

// Place describes slot s as errors and tools print it: "area 3 slot 17, byte 0x1a10".
func (l Layout) Place(s Slot) string {
	return fmt.Sprintf("area %d slot %d, byte 0x%x", s.Area, s.Index, l.SlotOffset(s))
}
