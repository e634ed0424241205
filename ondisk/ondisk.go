// Package ondisk has the format of persistent exception stores: its bytes and its arithmetic. It does no I/O and imports
// the standard library alone.
//
//	h := ondisk.DecodeHeader(sector)         // the first sector of a COW device
//	err := h.Check()                         // ErrNoStore, or a *CorruptError that names the place
//	l, err := ondisk.NewLayout(h.ChunkSectors)
//	off := l.SlotOffset(ondisk.Slot{Area: 0, Index: 3})
//
// A COW device is a row of chunks. All numbers are little-endian (docs/spec/dm-snapshot.md §2):
//
//	COW chunk 0                header
//	COW chunk 1                metadata area 0: E slots of 16 bytes
//	COW chunks 2 .. E+1        data chunks of area 0
//	COW chunk E+2              metadata area 1
//	...
//
// A chunk is c sectors of 512 bytes; C = 512·c bytes; an area is one chunk and holds E = C/16 = 32·c slots. The exceptions
// end at the first slot whose new chunk is 0. Nothing carries a checksum or a generation, so a store is kept consistent by
// the order of writes alone, which package store decides.
//
// There are two types of chunk number, so that they are not mixed up: [OriginChunk] counts chunks of the origin ("old" in
// the format), [COWChunk] chunks of the COW device ("new").
//
// Guarantees: decoding accepts any bytes and never panics; what can't be is reported by the Check functions. Offsets
// do not overflow for any valid layout and device size.
package ondisk

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Sizes and values of the format (docs/spec/dm-snapshot.md §2.2–2.5). They are part of the on-disk format and must not
// change.
const (
	SectorSize = 512
	HeaderSize = 16 // used bytes of chunk 0
	SlotSize   = 16
	Magic      = 0x70416e53 // "SnAp"
	Version    = 1

	// FirstDataChunk is the first chunk that a new store allocates: the one after the header and area 0.
	FirstDataChunk COWChunk = 2

	// MinChunkSectors and MaxChunkSectors bound the chunk size, which is a power of two: 512 bytes
	// to 1 GiB.
	MinChunkSectors = 1
	MaxChunkSectors = 2097152

	// KernelDefaultChunkSectors is what a table with chunk size 0 means (docs/spec/dm-snapshot.md §2.3);
	// DefaultChunkSectors is what LVM and dmsnap create.
	KernelDefaultChunkSectors = 32
	DefaultChunkSectors       = 8
)

// OriginChunk numbers a chunk of the origin: its bytes are [n·C, (n+1)·C) there.
type OriginChunk uint64

// COWChunk numbers a chunk of the COW device.
type COWChunk uint64

// An Exception says that origin chunk Old of the snapshot is kept in COW chunk New.
type Exception struct {
	Old OriginChunk
	New COWChunk
}

// A Header is the meaningful part of chunk 0.
//
//	0       4       8       12      16            C
//	+-------+-------+-------+-------+----- … -----+
//	| magic | valid | vers. | chunk |    zeros    |
//	+-------+-------+-------+-------+----- … -----+
//
// Valid is kept as the number found: any value but 0 means valid, and the kernel leaves it as it is.
type Header struct {
	Magic        uint32
	Valid        uint32
	Version      uint32
	ChunkSectors uint32
}

// Encode puts h in the first HeaderSize bytes of b.
func (h Header) Encode(b []byte) {
	binary.LittleEndian.PutUint32(b[0:], h.Magic)
	binary.LittleEndian.PutUint32(b[4:], h.Valid)
	binary.LittleEndian.PutUint32(b[8:], h.Version)
	binary.LittleEndian.PutUint32(b[12:], h.ChunkSectors)
}

// DecodeHeader reads the first HeaderSize bytes of b. It does not validate them; see [Header.Check].
func DecodeHeader(b []byte) Header {
	return Header{
		Magic:        binary.LittleEndian.Uint32(b[0:]),
		Valid:        binary.LittleEndian.Uint32(b[4:]),
		Version:      binary.LittleEndian.Uint32(b[8:]),
		ChunkSectors: binary.LittleEndian.Uint32(b[12:]),
	}
}

// ErrNoStore reports a header whose magic is zero: a fresh COW device without a store.
var ErrNoStore = errors.New("no exception store")

// Check returns ErrNoStore for a zero magic, a *CorruptError for one this package can't read, else nil. The order of
// the tests is the kernel's (docs/spec/dm-snapshot.md §2.6): a store of another version is refused even when it is
// marked invalid.
func (h Header) Check() error {
	switch {
	case h.Magic == 0:
		return ErrNoStore
	case h.Magic != Magic:
		return &CorruptError{Place: "header, byte 0x0", What: fmt.Sprintf("magic is 0x%08x, not 0x%08x: not a snapshot store", h.Magic, uint32(Magic))}
	}
	if err := CheckChunkSectors(h.ChunkSectors); err != nil {
		return &CorruptError{Place: "header, byte 0xc", What: fmt.Sprintf("invalid chunk size %d: %v", h.ChunkSectors, err)}
	}
	if h.Version != Version {
		return &CorruptError{Place: "header, byte 0x8", What: fmt.Sprintf("version %d of the format is not supported", h.Version)}
	}
	return nil
}

// Encode puts e in the first SlotSize bytes of b.
//
//	0                8               16
//	+----------------+----------------+
//	|   old chunk    |   new chunk    |
//	+----------------+----------------+
func (e Exception) Encode(b []byte) {
	binary.LittleEndian.PutUint64(b[0:], uint64(e.Old))
	binary.LittleEndian.PutUint64(b[8:], uint64(e.New))
}

// DecodeException reads the first SlotSize bytes of b.
func DecodeException(b []byte) Exception {
	return Exception{
		Old: OriginChunk(binary.LittleEndian.Uint64(b[0:])),
		New: COWChunk(binary.LittleEndian.Uint64(b[8:])),
	}
}

// IsEnd reports whether e, read from a slot, ends the exceptions: its new chunk is 0, whatever its old
// chunk says.
func (e Exception) IsEnd() bool { return e.New == 0 }

// A CorruptError reports bytes on a disk that violate the format, and where they are.
type CorruptError struct {
	Place string // "header, byte 0x0" or "area 3 slot 17, byte 0x1a10"
	What  string // what was found there and what was expected
}

func (e *CorruptError) Error() string { return e.Place + ": " + e.What }

// Errors for an invalid chunk size, with the kernel's reasons (docs/spec/dm-snapshot.md §2.3).
var (
	ErrChunkNotPowerOf2 = errors.New("chunk size is not a power of two")
	ErrChunkNotBlocks   = errors.New("chunk size is not a multiple of the device's block size")
	ErrChunkTooHigh     = errors.New("chunk size is too large")
)

// CheckChunkSectors returns an error unless sectors is a valid chunk size. The checks are in the kernel's order: 0 is
// not a power of two.
func CheckChunkSectors(sectors uint32) error {
	if sectors == 0 || sectors&(sectors-1) != 0 {
		return ErrChunkNotPowerOf2
	}
	if sectors > MaxChunkSectors {
		return ErrChunkTooHigh
	}
	return nil
}

// ChunkSectors converts a chunk size in bytes to sectors. An invalid chunk size is an error.
func ChunkSectors(bytes int64) (uint32, error) {
	if bytes < 0 || bytes%SectorSize != 0 {
		return 0, fmt.Errorf("%d bytes are not a whole number of %d-byte sectors", bytes, SectorSize)
	}
	// Larger numbers do not fit the argument of the check, and are too high just as well.
	sectors := uint32(min(bytes/SectorSize, 1<<31))
	if err := CheckChunkSectors(sectors); err != nil {
		return 0, fmt.Errorf("%w: %d bytes (a power of two from 512 to 1 GiB)", err, bytes)
	}
	return sectors, nil
}
