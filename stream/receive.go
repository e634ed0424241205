package stream

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"

	"github.com/dmsnap/dmsnap/block"
)

// DefaultCompareFirst is how much of a stream, in bytes of the disk, is compared with the target before anything is written.
const DefaultCompareFirst = 32 << 20

// A Reader reads one stream.
type Reader struct {
	r      io.Reader
	header Header
	at     int64     // byte of the stream
	all    hash.Hash // of all that was read, without new bytes
}

// NewReader reads the header of a stream. Errors: ErrFormat, those of r. After Apply or Check failed, a read of r may still
// be under way.
func NewReader(r io.Reader) (*Reader, error) {
	h, whole, err := readHeader(r)
	if err != nil {
		return nil, err
	}
	rd := &Reader{r: r, header: h, at: int64(len(whole)), all: sha256.New()}
	rd.all.Write(whole)
	return rd, nil
}

// Header returns the header.
func (r *Reader) Header() Header { return r.header }

// ApplyOptions are what a receiver may choose.
type ApplyOptions struct {
	// CompareFirst is how many bytes in records of the stream are compared with the target before the first is written;
	// 0 is DefaultCompareFirst. They are held in memory.
	CompareFirst int64
	// Force writes the new bytes whatever the target holds, and for a whole disk zeros where the stream has none.
	Force bool
	// Progress, where not nil, is called with the byte of the disk that was reached.
	Progress func(reached int64)
}

// Applied is what became of a stream.
type Applied struct {
	Count            // of what was read
	Written    int64 // bytes of the disk that were written, zeros included
	Present    int64 // bytes that the target had already
	Repaired   int64 // of those written: bytes of blocks that an interrupted write had left half old and half new
	Reached    int64 // byte of the disk before which all is done; Header.Size when all is
	Differs    int64 // bytes that match neither old nor new: counted by Check, and by Apply with Force
	FirstWrong int64 // where the first of them is, -1: there is none
}

// ErrSize reports a target that is not as long as the disk of the stream.
var ErrSize = errors.New("the target has another size than the disk of the stream")

// Apply makes target, which the stream was made for, what the stream says, durably. A block is written where the target
// holds the old bytes, or a mix of sectors of old and new ones, as an interrupted write leaves; it is skipped where the
// target holds the new ones. Of a whole disk, what the stream does not have must read as zeros.
//
// Errors: *MismatchError, before anything is written where it is in the part that ApplyOptions.CompareFirst covers; ErrFormat for
// a stream that was changed or cut; ErrSize; ctx's cause; those of the target. What was applied before an error stays,
// is not necessarily durable, and is skipped when the same stream is applied again. Applied is valid with an error, too.
// Nothing else may write to target meanwhile.
func (r *Reader) Apply(ctx context.Context, target block.Device, o ApplyOptions) (Applied, error) {
	if target.Size() != r.header.Size {
		return Applied{Reached: r.header.From, FirstWrong: -1}, fmt.Errorf("%w: %d bytes, the disk has %d", ErrSize, target.Size(), r.header.Size)
	}
	a := r.newApplier(target, o)
	if a.o.CompareFirst == 0 {
		a.o.CompareFirst = DefaultCompareFirst
	}
	err := inOrder(ctx, a.ahead(r.frames()), a.examine, a.collect)
	if err == nil {
		err = a.judgeGap(a.end, r.header.Size)
	}
	if err == nil {
		err = a.flushBuffer()
	}
	if err == nil {
		err = a.zeroGap(r.header.Size)
	}
	if err != nil {
		return a.result, err
	}
	if err := target.Flush(); err != nil {
		return a.result, err
	}
	a.result.Reached = r.header.Size
	return a.result, nil
}

// Check reads the whole stream, and with a target compares it: nothing is written. Blocks of the target that match neither
// old nor new bytes are counted in Differs, and are no error. Errors: ErrFormat, ErrSize, ctx's cause, failed reads.
func (r *Reader) Check(ctx context.Context, target block.Device, progress func(reached int64)) (Applied, error) {
	if target != nil && target.Size() != r.header.Size {
		return Applied{FirstWrong: -1}, fmt.Errorf("%w: %d bytes, the disk has %d", ErrSize, target.Size(), r.header.Size)
	}
	a := r.newApplier(target, ApplyOptions{Progress: progress})
	a.dry = true
	err := inOrder(ctx, a.ahead(r.frames()), a.examine, a.collect)
	if err == nil {
		err = a.judgeGap(a.end, r.header.Size)
	}
	if err == nil {
		a.result.Reached = r.header.Size
	}
	return a.result, err
}

// frames yields the frames with records, in order; an error is the last.
func (r *Reader) frames() iter.Seq2[*frame, error] {
	return func(yield func(*frame, error) bool) {
		var count Count
		for {
			f, head, err := readFrame(r.r, r.at)
			if err == nil && f.kind == kindLast {
				err = r.last(f, count)
				if err == nil {
					return
				}
			}
			if err != nil {
				yield(nil, err)
				return
			}
			r.all.Write(head)
			r.at += int64(len(head) + len(f.packed))
			f.count = f.counted()
			if count.add(f.count); !yield(f, nil) {
				return
			}
		}
	}
}

// runs yields the records as the heads of a frame say, without digests; its examination checks them.
func (f *frame) runs() iter.Seq[record] {
	return func(yield func(record) bool) {
		for b := f.heads; len(b) >= recordFixed; {
			r := record{
				off:    int64(binary.LittleEndian.Uint64(b)),
				length: int64(binary.LittleEndian.Uint32(b[8:])),
				flags:  binary.LittleEndian.Uint32(b[12:]),
			}
			if !yield(r) {
				return
			}
			n := int64(recordFixed)
			n += r.length / Block * int64(digestsLength(r.flags, Block))
			if r.length%Block != 0 {
				n += int64(digestsLength(r.flags, r.length%Block))
			}
			b = b[min(n, int64(len(b))):]
		}
	}
}

// counted returns what the heads of a frame say, which its examination checks.
func (f *frame) counted() (c Count) {
	for r := range f.runs() {
		c.Records++
		if r.flags&newZeros != 0 {
			c.Zero += r.length
		} else {
			c.Data += r.length
		}
	}
	return c
}

// last checks the last frame: nothing may be missing before it, and nothing follow.
func (r *Reader) last(f *frame, count Count) error {
	want, sum := parseLast(f.heads)
	if !bytes.Equal(sum, r.all.Sum(nil)) || count != want {
		return &FormatError{f.at, "a part of the stream is missing or was changed"}
	}
	if n, err := io.ReadFull(r.r, make([]byte, 1)); n > 0 {
		return &FormatError{f.at, "something follows the last frame"}
	} else if err != io.EOF {
		return err
	}
	return nil
}
