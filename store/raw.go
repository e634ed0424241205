package store

import (
	"iter"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A RawPiece is a range of an area as it is on the disk.
type RawPiece struct {
	Off   int64  // byte of the device where it begins
	Index uint64 // of its first slot
	Bytes []byte // valid until the next piece; nil where Err is set
	// Missing is the number of bytes from Off on that could not be read, because of Err.
	Missing int64
	Err     error
}

// RawArea yields the bytes of one area in order, whatever they are: also after the end mark, also of a store that
// [Open] refuses. The offline tools read damaged stores by it.
//
// Like [Scan] it drops what is cached first. An area that extends past the end of the device is yielded up to there;
// its last piece may then end within a slot. What can't be read is read again sector by sector, so that one bad sector
// costs only 32 slots; each range of bad sectors is one piece with its error. It holds 256 KiB at most.
func RawArea(dev block.Device, l ondisk.Layout, area uint64) iter.Seq[RawPiece] {
	return func(yield func(RawPiece) bool) {
		start := l.COWOffset(l.AreaChunk(area))
		end := min(start+l.ChunkBytes(), dev.Size())
		buf := make([]byte, min(l.ChunkBytes(), scanPiece))
		if start < end {
			dropArea(dev, l, area) // an error shows again when the area is read
		}
		for off := start; off < end; {
			b := buf[:min(int64(len(buf)), end-off)]
			piece := RawPiece{Off: off, Index: uint64(off-start) / ondisk.SlotSize, Bytes: b}
			if _, err := dev.ReadAt(b, off); err != nil {
				if !rawSectors(dev, piece, yield) {
					return
				}
			} else if !yield(piece) {
				return
			}
			off += int64(len(b))
		}
	}
}

// rawSectors yields a piece whose read failed sector by sector; adjacent sectors with the same result are one piece.
func rawSectors(dev block.Device, whole RawPiece, yield func(RawPiece) bool) bool {
	at := func(i int64) RawPiece {
		return RawPiece{Off: whole.Off + i, Index: whole.Index + uint64(i)/ondisk.SlotSize}
	}
	bad := RawPiece{}
	for i := int64(0); i < int64(len(whole.Bytes)); i += ondisk.SectorSize {
		b := whole.Bytes[i:min(i+ondisk.SectorSize, int64(len(whole.Bytes)))]
		_, err := dev.ReadAt(b, whole.Off+i)
		if err != nil {
			if bad.Err == nil {
				bad = at(i)
				bad.Err = err
			}
			bad.Missing += int64(len(b))
			continue
		}
		if bad.Err != nil && !yield(bad) {
			return false
		}
		bad = RawPiece{}
		good := at(i)
		good.Bytes = b
		if !yield(good) {
			return false
		}
	}
	return bad.Err == nil || yield(bad)
}
