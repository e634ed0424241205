package layer

import (
	"encoding/binary"
	"sort"
)

// An index is a sequence of pages of 4096 bytes. The leaves stand first, then the level above them, and so on; the last page
// is the root. All pages of a level but the last one are full. Numbers are little-endian.
//
//	 0  8  "dmsnapIX"
//	 8  2  level; 0: a leaf
//	10  2  number n of entries: at most 63 in a leaf, 100 above
//	12  4  version, 1
//	16 48  zero
//	64     n entries; zero after them
//
// Entry of a leaf, ascending and without overlap:
//
//	 0  8  place, a byte of the disk
//	 8  4  length in sectors of 512 bytes; unless it is of zeros, it is within one unit of 64 KiB
//	12  2  layer whose data blob has the frame
//	14  2  sectors of the frame's content that stand before place
//	16  8  place of the frame in the data blob
//	24  4  length of the frame in the data blob; 0: the range reads as zeros, and what follows here is zero
//	28  4  length of the frame's content in bytes, at most 65536
//	32 32  SHA-256 of the frame's content
//
// Entry of another page:
//
//	0  8  place of the first entry beneath
//	8 32  SHA-256 of the page, which is of the level beneath; pages follow each other
const (
	pageMagic    = "dmsnapIX"
	pageHeader   = 64
	leafEntry    = 64
	innerEntry   = 40
	leafEntries  = (PageBytes - pageHeader) / leafEntry
	innerEntries = (PageBytes - pageHeader) / innerEntry
)

// An Entry is a range of the disk that a layer has.
type Entry struct {
	Place, Length int64
	Skip          int64 // bytes of the frame's content before Place
	Frame         Frame
}

// A Frame is a zstd frame in the data blob of a layer. Without a length it stands for zeros.
type Frame struct {
	Layer   int
	Off     int64 // in the data blob
	Packed  int   // bytes in the data blob
	Length  int   // bytes of its content
	Content Digest
}

// Zero reports whether the range reads as zeros.
func (e *Entry) Zero() bool { return e.Frame.Packed == 0 }

// End is the byte after the range.
func (e *Entry) End() int64 { return e.Place + e.Length }

// Unit is the number of the unit that a range of data is in.
func (e *Entry) Unit() int64 { return e.Place / UnitBytes }

func (e *Entry) encode(b []byte) {
	binary.LittleEndian.PutUint64(b, uint64(e.Place))
	binary.LittleEndian.PutUint32(b[8:], uint32(e.Length/sector))
	binary.LittleEndian.PutUint16(b[12:], uint16(e.Frame.Layer))
	binary.LittleEndian.PutUint16(b[14:], uint16(e.Skip/sector))
	binary.LittleEndian.PutUint64(b[16:], uint64(e.Frame.Off))
	binary.LittleEndian.PutUint32(b[24:], uint32(e.Frame.Packed))
	binary.LittleEndian.PutUint32(b[28:], uint32(e.Frame.Length))
	copy(b[32:64], e.Frame.Content[:])
}

func decodeEntry(b []byte) (e Entry) {
	e.Place = int64(binary.LittleEndian.Uint64(b))
	e.Length = int64(binary.LittleEndian.Uint32(b[8:])) * sector
	e.Skip = int64(binary.LittleEndian.Uint16(b[14:])) * sector
	e.Frame = Frame{Layer: int(binary.LittleEndian.Uint16(b[12:])), Off: int64(binary.LittleEndian.Uint64(b[16:])),
		Packed: int(binary.LittleEndian.Uint32(b[24:])), Length: int(binary.LittleEndian.Uint32(b[28:]))}
	copy(e.Frame.Content[:], b[32:64])
	return e
}

// check validates an entry of a disk of size bytes with these layers.
func (e *Entry) check(size int64, layers []Layer) error {
	f := e.Frame
	if e.Place < 0 || e.Place%sector != 0 || e.Length <= 0 || e.Place > size || e.Length > size-e.Place {
		return corrupt("a range of %d bytes at byte %d of a disk of %d bytes", e.Length, e.Place, size)
	}
	if e.Zero() {
		if f != (Frame{}) || e.Skip != 0 {
			return corrupt("a range of zeros with a frame, at byte %d", e.Place)
		}
		return nil
	}
	switch {
	case f.Layer >= len(layers):
		return corrupt("a frame of layer %d, at byte %d", f.Layer, e.Place)
	case f.Off < int64(len(dataStart)) || f.Off > layers[f.Layer].Data.Size-int64(f.Packed):
		return corrupt("a frame of %d bytes at byte %d of a blob of %d bytes, at byte %d", f.Packed, f.Off, layers[f.Layer].Data.Size, e.Place)
	case f.Length <= 0 || f.Length > UnitBytes || f.Packed < 0 || f.Packed > maxPacked || e.Skip > int64(f.Length)-e.Length:
		return corrupt("a frame of %d bytes for %d, at byte %d", f.Packed, f.Length, e.Place)
	case e.Place/UnitBytes != (e.End()-1)/UnitBytes:
		return corrupt("a range that crosses units, at byte %d", e.Place)
	}
	return nil
}

// A page is verified and valid.
type page []byte

func (p page) count() int { return int(binary.LittleEndian.Uint16(p[10:])) }

// place is that of the entry i of either form.
func (p page) place(i, length int) int64 {
	return int64(binary.LittleEndian.Uint64(p[pageHeader+i*length:]))
}

func (p page) entry(i int) Entry { return decodeEntry(p[pageHeader+i*leafEntry:]) }

func (p page) child(i int) (d Digest) {
	copy(d[:], p[pageHeader+i*innerEntry+8:])
	return d
}

// last returns the last entry whose place is at most off; -1: there is none.
func (p page) last(off int64, length int) int {
	return sort.Search(p.count(), func(i int) bool { return p.place(i, length) > off }) - 1
}

// newPage returns a page without entries.
func newPage(level int) []byte {
	b := make([]byte, pageHeader, PageBytes)
	copy(b, pageMagic)
	binary.LittleEndian.PutUint16(b[8:], uint16(level))
	binary.LittleEndian.PutUint32(b[12:], Version)
	return b
}

// geometry returns the number of pages of each level of an index, leaves first, and of all.
func geometry(entries int64) (levels []int64, pages int64) {
	n := max(1, (entries+leafEntries-1)/leafEntries)
	for {
		levels, pages = append(levels, n), pages+n
		if n == 1 {
			return levels, pages
		}
		n = (n + innerEntries - 1) / innerEntries
	}
}
