package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/dmsnap/dmsnap/block"
)

// ErrStaleBitmap reports a bitmap whose content is wrong: a program that had it open was killed, or one that knows no bitmaps
// changed the disk.
var ErrStaleBitmap = errors.New("the content of the bitmap is not what was written to the disk")

// DirtyRanges calls do for each range of the disk that a bitmap of the image in file marks, in order; adjacent ones are
// one. info is the header of the image, b is one of Bitmaps. It reads 1 GiB at most.
//
// Errors: ErrStaleBitmap, the cause of ctx, an *ondisk.CorruptError, ErrTooLarge, failed reads, those of do.
func DirtyRanges(ctx context.Context, file block.Device, info *Info, b Bitmap, do func(block.Range) error) error {
	if b.InUse || !info.header.bitmaps.consistent {
		return ErrStaleBitmap
	}
	cs, what := info.ClusterSize, fmt.Sprintf("bitmap %q", b.Name)
	count := (info.Size + b.Granularity - 1) / b.Granularity // of bits
	if info.Size > 0 && count <= 0 {                         // the sum overflowed
		count = info.Size/b.Granularity + 1
	}
	need := (count + cs*8 - 1) / (cs * 8)
	if b.table.offset < 0 || b.table.offset%cs != 0 || b.table.entries != need {
		return corrupt(what, "a table of %d entries at the offset 0x%x, for %d bits", b.table.entries, uint64(b.table.offset), count)
	}
	c := &checker{ctx: ctx, file: file, info: info, left: maxCheckBytes}
	var run block.Range
	mark := func(first, n int64) error { // bits
		r := block.Range{Off: first * b.Granularity, Length: n * b.Granularity}
		if first+n == count {
			r.Length = info.Size - r.Off
		}
		if run.Length > 0 && run.Off+run.Length == r.Off {
			run.Length += r.Length
			return nil
		}
		last := run
		run = r
		if last.Length == 0 {
			return nil
		}
		return do(last)
	}
	if b.table.offset > file.Size() || b.table.entries*8 > file.Size()-b.table.offset {
		return corrupt(what, "its table ends behind the end of the file (byte %d)", file.Size())
	}
	data := make([]byte, cs)
	err := c.entries(b.table, 8, what, func(n int64, e []byte) error {
		entry := binary.BigEndian.Uint64(e)
		first := n * cs * 8
		offset := int64(entry & offsetMask)
		switch {
		case offset == 0 && entry&1 == 0: // all zeros
			return nil
		case offset == 0: // all ones
			return mark(first, min(cs*8, count-first))
		}
		if offset%cs != 0 || offset >= file.Size() {
			return corrupt(fmt.Sprintf("entry %d of the table of %s", n, what), "the offset 0x%x is not one of a cluster of the file", offset)
		}
		if err := c.read(data, offset, what); err != nil {
			return err
		}
		return markedBits(data, min(cs*8, count-first), func(at, n int64) error { return mark(first+at, n) })
	})
	if err != nil || run.Length == 0 {
		return err
	}
	return do(run)
}

// markedBits calls do for each run of set bits among the first count of p, which begin with the least significant one
// of each byte. A run may come in parts.
func markedBits(p []byte, count int64, do func(at, n int64) error) error {
	for at := int64(0); at < count; {
		word := uint64(p[at/8] >> (at % 8))
		width := min(8-at%8, count-at)
		if at%64 == 0 && count-at >= 64 {
			word, width = binary.LittleEndian.Uint64(p[at/8:]), 64
		}
		if skip := min(int64(bits.TrailingZeros64(word)), width); skip > 0 {
			at += skip
			continue
		}
		n := min(int64(bits.TrailingZeros64(^word)), width)
		if err := do(at, n); err != nil {
			return err
		}
		at += n
	}
	return nil
}
