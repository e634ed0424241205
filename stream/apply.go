package stream

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/scratch"
)

// flushFrom is how many written bytes are worth a call to begin their flush.
const flushFrom = 8 << 20

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
	compared int64       // bytes of the disk in the records of held
	writing  bool        // held is written

	begun int64 // byte of the disk before which the disk was asked to write
	since int64 // bytes that were written since
}

func (r *Reader) newApplier(target block.Device, o ApplyOptions) *applier {
	return &applier{
		kind: r.header.Kind, size: r.header.Size, target: target, o: o, end: r.header.From, next: r.header.From,
		result: Applied{Reached: r.header.From, FirstWrong: -1},
	}
}

// ahead lets the target read what frames are compared with while the ones before are.
func (a *applier) ahead(frames iter.Seq2[*frame, error]) iter.Seq2[*frame, error] {
	if a.target == nil {
		return frames
	}
	return func(yield func(*frame, error) bool) {
		for f, err := range frames {
			if err == nil {
				for r := range f.runs() {
					block.BeginRead(a.target, r.off, r.length)
				}
			}
			if !yield(f, err) {
				return
			}
		}
	}
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
	if a.compared += e.count.Data + e.count.Zero; a.compared < a.o.CompareFirst {
		return nil
	}
	return a.flushBuffer()
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

// flushBuffer writes what was buffered, and from then on nothing is.
func (a *applier) flushBuffer() error {
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
	a.beginFlush()
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
		return ofTarget("write", p.off, p.length, err)
	}
	a.result.Written += p.length
	a.since += p.length
	return nil
}

// beginFlush lets the disk write while further frames are compared, so that little is left for the flush at the end.
func (a *applier) beginFlush() {
	if a.since >= flushFrom {
		block.BeginFlush(a.target, a.begun, a.next-a.begun)
		a.begun, a.since = a.next, 0
	}
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
	for n > 0 {
		extents, err := block.Extents(a.target, off, n)
		if err != nil {
			return err
		}
		for _, e := range extents {
			if e.Flags&block.ReadsZero == 0 {
				if err := a.readsZero(off, e.Length); err != nil {
					return err
				}
			}
			off, n = off+e.Length, n-e.Length
		}
	}
	return nil
}

// ofTarget is the error of reading or writing n bytes of the target. That of a file says itself what failed where.
func ofTarget(op string, off, n int64, err error) error {
	if named, is := errors.AsType[*fs.PathError](err); is && named.Op == op {
		return err
	}
	return fmt.Errorf("%s %d bytes of the target at byte %d: %w", op, n, off, err)
}

// readsZero reads a range, and returns a *MismatchError for a byte that is not zero.
func (a *applier) readsZero(off, n int64) error {
	return scratch.With(maxData, func(buffer []byte) error {
		for n > 0 {
			b := buffer[:min(n, maxData)]
			if _, err := a.target.ReadAt(b, off); err != nil {
				return ofTarget("read", off, int64(len(b)), err)
			}
			for at := 0; at < len(b); at += Block {
				if p := b[at:min(at+Block, len(b))]; !block.IsZero(p) {
					return &MismatchError{off + int64(at)}
				}
			}
			off, n = off+int64(len(b)), n-int64(len(b))
		}
		return nil
	})
}
