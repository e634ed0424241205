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
	"github.com/dmsnap/dmsnap/internal/scratch"
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
	// CompareFirst is how many bytes of the disk are compared with the target before the first is written; 0 is DefaultCompareFirst.
	// They are held in memory.
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
	err := inOrder(ctx, r.frames(), a.examine, a.collect)
	if err == nil {
		err = a.judgeGap(a.end, r.header.Size)
	}
	if err == nil {
		err = a.writeHeld()
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
	err := inOrder(ctx, r.frames(), a.examine, a.collect)
	if err == nil {
		err = a.judgeGap(a.end, r.header.Size)
	}
	if err == nil {
		a.result.Reached = r.header.Size
	}
	return a.result, err
}

// An applier applies the frames of one stream to a target.
type applier struct {
	kind   Kind
	size   int64
	target block.Device // nil: there is none
	o      ApplyOptions
	dry    bool // write nothing, and count what differs

	result   Applied
	end      int64       // byte of the disk behind the last record that was compared
	next     int64       // byte of the disk behind the last record that was written
	held     []*examined // compared, and not written: the beginning of the stream
	compared int64       // bytes of the disk in held
	writing  bool        // held is written
}

func (r *Reader) newApplier(target block.Device, o ApplyOptions) *applier {
	return &applier{
		kind: r.header.Kind, size: r.header.Size, target: target, o: o, end: r.header.From, next: r.header.From,
		result: Applied{Reached: r.header.From, FirstWrong: -1},
	}
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

// counted returns what the heads of a frame say, which its examination checks.
func (f *frame) counted() (c Count) {
	for b := f.heads; len(b) >= recordFixed; {
		length, flags := int64(binary.LittleEndian.Uint32(b[8:])), binary.LittleEndian.Uint32(b[12:])
		c.Records++
		if flags&newZeros != 0 {
			c.Zero += length
		} else {
			c.Data += length
		}
		n := int64(recordFixed)
		n += length / Block * int64(digestsLength(flags, Block))
		if length%Block != 0 {
			n += int64(digestsLength(flags, length%Block))
		}
		b = b[min(n, int64(len(b))):]
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
			return fmt.Errorf("read %d bytes of the target at byte %d: %w", r.length, r.off, err)
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

// collect takes the examined frames in order. The first are held until they were all compared.
func (a *applier) collect(e *examined) error {
	if len(e.records) == 0 {
		return nil
	}
	first := e.records[0].off
	if first < a.end {
		return &FormatError{e.at, fmt.Sprintf("the record at byte %d of the disk is not behind the one before", first)}
	}
	if e.wrong >= 0 {
		if a.result.FirstWrong < 0 {
			a.result.FirstWrong = e.wrong
		}
		if !a.dry && !a.o.Force {
			return &MismatchError{e.wrong}
		}
	}
	for _, r := range e.records {
		if err := a.judgeGap(a.end, r.off); err != nil {
			return err
		}
		a.end = r.off + r.length
	}
	if a.dry || a.writing {
		return a.finish(e)
	}
	a.held = append(a.held, e)
	if a.compared += a.end - first; a.compared < a.o.CompareFirst {
		return nil
	}
	return a.writeHeld()
}

// judgeGap compares what is in no record, from byte off to byte end, with zeros: of a whole disk it must be.
func (a *applier) judgeGap(off, end int64) error {
	if a.kind != Disk || off == end || a.target == nil || a.o.Force {
		return nil
	}
	err := a.mustBeZero(off, end-off)
	var wrong *MismatchError
	if !a.dry || !errors.As(err, &wrong) {
		return err
	}
	if a.result.Differs += end - off; a.result.FirstWrong < 0 {
		a.result.FirstWrong = wrong.Off
	}
	return nil
}

// writeHeld writes what was held, and from then on nothing is held.
func (a *applier) writeHeld() error {
	a.writing = true
	for _, e := range a.held {
		if err := a.finish(e); err != nil {
			return err
		}
	}
	a.held = nil
	return nil
}

// finish writes what a frame changes.
func (a *applier) finish(e *examined) error {
	write := e.write
	for _, r := range e.records {
		if err := a.zeroGap(r.off); err != nil {
			return err
		}
		end := r.off + r.length
		for ; !a.dry && len(write) > 0 && write[0].off < end; write = write[1:] {
			if err := a.put(write[0]); err != nil {
				return err
			}
		}
		a.next = end
	}
	recycle(e.data)
	a.result.Count.add(e.count)
	a.result.Present += e.present
	a.result.Repaired += e.repaired
	a.result.Differs += e.differs
	a.result.Reached = a.next
	if a.o.Progress != nil {
		a.o.Progress(a.next)
	}
	return nil
}

func (a *applier) put(p piece) error {
	var err error
	if p.data == nil {
		err = block.Zero(a.target, p.off, p.length, 0)
	} else {
		_, err = a.target.WriteAt(p.data, p.off)
	}
	if err != nil {
		return fmt.Errorf("write %d bytes of the target at byte %d: %w", p.length, p.off, err)
	}
	a.result.Written += p.length
	return nil
}

// zeroGap writes zeros up to byte end, where a whole disk has no record and the target may hold anything.
func (a *applier) zeroGap(end int64) error {
	if a.kind != Disk || !a.o.Force || end == a.next {
		return nil
	}
	return a.put(piece{off: a.next, length: end - a.next})
}

// mustBeZero returns a *MismatchError for a byte that is not zero.
func (a *applier) mustBeZero(off, n int64) error {
	buffer := make([]byte, min(n, maxData))
	for n > 0 {
		extents, err := block.Extents(a.target, off, n)
		if err != nil {
			return err
		}
		for _, e := range extents {
			for e.Flags&block.ReadsZero == 0 && e.Length > 0 {
				b := buffer[:min(e.Length, maxData)]
				if _, err := a.target.ReadAt(b, off); err != nil {
					return fmt.Errorf("read %d bytes of the target at byte %d: %w", len(b), off, err)
				}
				for at := 0; at < len(b); at += Block {
					if p := b[at:min(at+Block, len(b))]; !block.IsZero(p) {
						return &MismatchError{off + int64(at)}
					}
				}
				k := int64(len(b))
				off, n, e.Length = off+k, n-k, e.Length-k
			}
			off, n = off+e.Length, n-e.Length
		}
	}
	return nil
}
