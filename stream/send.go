package stream

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"iter"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/scratch"
)

// SendOptions are what a sender may choose.
type SendOptions struct {
	// DropUnchanged leaves out blocks that are stored and the same: what was copied and never changed.
	DropUnchanged bool
	// Plain leaves the new bytes as they are, for a link that is faster than compression, or compresses itself.
	Plain bool
	// From is the byte of the disk to begin at, rounded down to a multiple of Block: where a receiver stopped.
	From int64
	// Progress, where not nil, is called with the byte of the disk that was reached.
	Progress func(reached int64)
	// Complete, where not nil, is called before the last frame. After an error of it there is none, so that no receiver takes
	// the stream for a whole one.
	Complete func() error
}

// Send writes the stream of a source to w. Memory is a few MiB for each processor.
//
// Errors: ctx's cause; failed reads, with the place; those of w. What was written then is not a whole stream, and a
// receiver notices.
func Send(ctx context.Context, w io.Writer, from *Source, o SendOptions) (Count, error) {
	size := from.new.Size()
	if o.From < 0 || o.From > size {
		return Count{}, fmt.Errorf("byte %d is outside a disk of %d bytes", o.From, size)
	}
	s := &sender{Source: from, o: o, w: w, all: sha256.New()}
	start := o.From / Block * Block
	if err := s.write(appendHeader(nil, Header{from.kind, size, start}), nil); err != nil {
		return Count{}, err
	}
	err := inOrder(ctx, s.jobs(ctx, start), s.pack, s.put)
	if err == nil && o.Complete != nil {
		err = o.Complete()
	}
	if err != nil {
		return s.count, err
	}
	last := frame{kind: kindLast, heads: appendLast(nil, s.count, s.all.Sum(nil))}
	return s.count, s.write(last.appendHead(nil), nil)
}

// A span is a run of bytes of the disk, of whole blocks unless the disk ends.
type span struct{ off, length int64 }

// A sender makes one stream.
type sender struct {
	*Source
	o     SendOptions
	w     io.Writer
	all   hash.Hash // of all that is written, without new bytes
	count Count
}

// jobs yields what the frames are made of: runs of blocks that may have changed, ascending, of together at most maxData
// bytes.
func (s *sender) jobs(ctx context.Context, start int64) iter.Seq2[[]span, error] {
	return func(yield func([]span, error) bool) {
		size := s.new.Size()
		next, room := start, int64(maxData)
		var job []span
		for e, err := range s.changed() {
			if err == nil && ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			if err != nil {
				yield(nil, err)
				return
			}
			end := min((e.Off+e.Length+Block-1)/Block*Block, size)
			for off := max(next, e.Off/Block*Block); off < end; {
				n := min(end-off, room)
				s.beginRead(off, n)
				if k := len(job) - 1; k >= 0 && job[k].off+job[k].length == off {
					job[k].length += n
				} else {
					job = append(job, span{off, n})
				}
				off += n
				if room -= (n + Block - 1) / Block * Block; room == 0 {
					if !yield(job, nil) {
						return
					}
					job, room = nil, maxData
				}
			}
			next = max(next, end)
		}
		if len(job) > 0 {
			yield(job, nil)
		}
	}
}

// beginRead lets the disks read a range while the frames before it are made.
func (s *sender) beginRead(off, n int64) {
	block.BeginRead(s.new, off, n)
	if s.old != nil {
		block.BeginRead(s.old, off, n)
	}
}

// A packet is a frame and what is in it.
type packet struct {
	head, packed []byte
	count        Count
	reached      int64
}

// pack reads the spans of one frame and makes it. Several run at once.
func (s *sender) pack(job []span) (*packet, error) {
	last := job[len(job)-1]
	p := &packet{reached: last.off + last.length}
	data := frameBuffer()
	b := blocks{data: data[:0], drop: s.o.DropUnchanged}
	err := scratch.With(maxData, func(old []byte) error {
		free := data
		for _, j := range job {
			fresh := free[:j.length]
			free = free[j.length:]
			if err := block.ReadSparse(s.new, fresh, j.off); err != nil {
				return block.NewReadError(j.off, j.length, "", err)
			}
			if s.old == nil {
				b.add(j.off, fresh, nil)
				continue
			}
			if err := block.ReadSparse(s.old, old[:j.length], j.off); err != nil {
				return fmt.Errorf("as it was: %w", block.NewReadError(j.off, j.length, "", err))
			}
			b.add(j.off, fresh, old[:j.length])
		}
		return nil
	})
	b.end()
	if err != nil || len(b.heads) == 0 {
		recycle(data)
		return p, err
	}
	f := frame{kind: kindRecords, length: uint32(len(b.data)), heads: b.heads, packed: b.data}
	if !s.o.Plain {
		f.pack()
	}
	p.head, p.packed, p.count = f.appendHead(nil), f.packed, b.count
	return p, nil
}

// blocks are those of a frame that is being made.
type blocks struct {
	drop  bool   // leave out blocks that are the same
	data  []byte // what is sent of what was read
	heads []byte
	count Count
	last  record // the blocks that were added last, of which the head is not yet complete
}

// add adds the blocks of a span, except those that need not be sent. was are the old bytes, nil: zeros. is may be in the
// memory behind data.
func (b *blocks) add(off int64, is, was []byte) {
	for len(is) > 0 {
		n := min(Block, len(is))
		if was == nil {
			b.addOne(off, is[:n], zeros[:n])
		} else {
			b.addOne(off, is[:n], was[:n])
			was = was[n:]
		}
		is, off = is[n:], off+int64(n)
	}
}

// addOne adds one block.
func (b *blocks) addOne(off int64, is, was []byte) {
	var flags uint32
	if block.IsZero(is) {
		flags |= newZeros
	}
	if block.IsZero(was) {
		flags |= oldZeros
	}
	if flags == newZeros|oldZeros || b.drop && string(is) == string(was) {
		return
	}
	if r := b.last; r.length == 0 || r.flags != flags || r.off+r.length != off {
		b.end()
		b.last = record{off: off, flags: flags, digests: r.digests[:0]}
	}
	n := int64(len(is))
	b.last.length += n
	if flags&newZeros == 0 {
		d := digestOfOne(is)
		b.last.digests = append(b.last.digests, d[:]...)
		b.data = append(b.data, is...)
		b.count.Data += n
	} else {
		b.count.Zero += n
	}
	if flags&oldZeros == 0 {
		b.last.digests = appendOld(b.last.digests, was)
	}
}

// end completes the head of the last record.
func (b *blocks) end() {
	if b.last.length > 0 {
		b.heads = appendRecord(b.heads, b.last)
		b.count.Records++
		b.last.length = 0
	}
}

// appendOld appends the digest of old bytes, and the sums of their sectors.
func appendOld(b, was []byte) []byte {
	d := digestOfOne(was)
	b = append(b, d[:]...)
	for at := 0; at < len(was); at += sector {
		b = binary.LittleEndian.AppendUint32(b, sumOfSector(was[at:min(at+sector, len(was))]))
	}
	return b
}

// put writes one frame.
func (s *sender) put(p *packet) error {
	s.count.add(p.count)
	if len(p.head) > 0 {
		if err := s.write(p.head, p.packed); err != nil {
			return err
		}
		recycle(p.packed)
	}
	if s.o.Progress != nil {
		s.o.Progress(p.reached)
	}
	return nil
}

// write writes a header or a frame, and its new bytes.
func (s *sender) write(head, packed []byte) error {
	s.all.Write(head)
	if _, err := s.w.Write(head); err != nil {
		return err
	}
	if len(packed) == 0 {
		return nil
	}
	_, err := s.w.Write(packed)
	return err
}
