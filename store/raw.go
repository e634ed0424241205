package store

import (
	"iter"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A RawPiece is a stretch of an area as it is on the disk.
type RawPiece struct {
	Off   int64  // byte of the device where it begins
	Index uint64 // of its first slot
	Bytes []byte // valid until the next piece; nil where Err is set
	// Missing is how many bytes from Off on could not be read, for the reason Err.
	Missing int64
	Err     error
}

// RawArea yields the bytes of one area in order, whatever they say: also behind the end mark, also in a
// store that [Open] refuses. It is what the offline tools read damaged stores with.
//
// Like [Scan] it drops what is cached first. An area that the device's end cuts is yielded as far as it goes; its last piece need not be whole
// slots then. What can't be read is looked at again sector by sector, so that one bad sector costs 32
// slots and no more; each stretch of bad sectors is one piece with its error. It holds 256 KiB at most.
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

// rawSectors yields a piece whose read failed by sectors, neighbours that are alike together.
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
