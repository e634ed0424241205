package snapshot

import (
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A piece is the part of a request that goes to one place: bytes [off, off+n) of the snapshot, all either in
// consecutive COW chunks from byte cow of the COW device on, or in chunks without an exception. Requests are split
// here; no code below gets one that spans two places.
type piece struct {
	off, n int64
	cow    int64
	mapped bool
}

// nextPiece returns the first piece of bytes [off, off+n), n > 0. It may be outdated at once: an unmapped piece may get
// exceptions at any time.
func nextPiece(st *store.Store, off, n int64) piece {
	l := st.Layout()
	first, last := l.OriginChunkAt(off), l.OriginChunkAt(off+n-1)
	new, count, mapped := st.LookupRun(first, uint64(last-first)+1)
	start, end := l.OriginRange(first, count, off+n)
	p := piece{off: off, n: end - off, mapped: mapped}
	if mapped {
		p.cow = l.COWOffset(new) + off - start
	}
	return p
}

// chunks returns the first chunk of bytes [off, off+n), n > 0, and how many they touch.
func chunks(l ondisk.Layout, off, n int64) (first ondisk.OriginChunk, count uint64) {
	first = l.OriginChunkAt(off)
	return first, uint64(l.OriginChunkAt(off+n-1)-first) + 1
}
