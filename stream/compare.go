package stream

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/scratch"
)

// An examined is a frame that was verified and compared with the target.
type examined struct {
	at       int64  // byte of the stream
	data     []byte // new bytes of the records
	records  []record
	write    []piece
	count    Count
	present  int64
	repaired int64
	differs  int64
	wrong    int64 // first byte of the disk that matches neither, -1: none
}

// A piece is what is to be written.
type piece struct {
	off, length int64
	data        []byte // nil: zeros
}

// examine verifies one frame and compares it with the target. Several run at once.
func (a *applier) examine(f *frame) (*examined, error) {
	data := f.packed
	if f.packing == packedZstd {
		var err error
		data, err = decoder().DecodeAll(f.packed, buffer(int(f.length))[:0])
		recycle(f.packed)
		if err != nil || len(data) != int(f.length) {
			return nil, &FormatError{f.at, "a frame was changed: its bytes can't be unpacked"}
		}
	}
	records, err := f.records(a.size, data)
	if err != nil {
		return nil, err
	}
	e := &examined{at: f.at, records: records, count: f.count, data: data, wrong: -1}
	return e, scratch.With(maxData, func(b []byte) error {
		for _, r := range records {
			if err := a.compare(e, r, b[:r.length]); err != nil {
				return err
			}
		}
		return nil
	})
}

// compare verifies the new bytes of a record, and compares the target with it. has is space for what the target has.
func (a *applier) compare(e *examined, r record, has []byte) error {
	if a.target != nil {
		if err := block.ReadSparse(a.target, has, r.off); err != nil {
			return ofTarget("read", r.off, r.length, err)
		}
	}
	return r.blocks(func(off, n int64, fresh, sum, old []byte) error {
		if fresh != nil && digestOfOne(fresh) != digest(sum) {
			return &FormatError{e.at, fmt.Sprintf("the bytes for byte %d of the disk were changed: their digest differs", off)}
		}
		if a.target != nil {
			e.compare(off, n, has[off-r.off:][:n], fresh, old)
		}
		return nil
	})
}

// compare compares a block of the target, which has these bytes, with the new and the old ones.
func (e *examined) compare(off, n int64, has, fresh, old []byte) {
	is := fresh
	if is == nil {
		is = zeros[:n]
	}
	switch {
	case bytes.Equal(has, is):
		e.present += n
		return
	case old == nil && block.IsZero(has), old != nil && digestOfOne(has) == digest(old):
	case isTorn(has, is, old):
		e.repaired += n
	default:
		if e.differs += n; e.wrong < 0 {
			e.wrong = off
		}
	}
	if k := len(e.write) - 1; k >= 0 && e.write[k].off+e.write[k].length == off && (e.write[k].data == nil) == (fresh == nil) {
		last := &e.write[k]
		last.length += n
		if fresh != nil {
			last.data = last.data[:last.length] // the bytes of one record follow each other
		}
		return
	}
	e.write = append(e.write, piece{off, n, fresh})
}

// isTorn reports whether each sector is the new or the old one. It is what an interrupted write leaves, since disks write
// whole sectors. Old sectors are known by their sums only: so it is asked after the digests.
func isTorn(has, is, old []byte) bool {
	for at := 0; at < len(has); at += sector {
		end := min(at+sector, len(has))
		if s := has[at:end]; !bytes.Equal(s, is[at:end]) {
			if old == nil && !block.IsZero(s) ||
				old != nil && sumOfSector(s) != binary.LittleEndian.Uint32(old[digestLength+at/sector*4:]) {
				return false
			}
		}
	}
	return true
}
