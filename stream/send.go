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

// A packet is a frame and what is in it.
type packet struct {
	head, packed []byte
	count        Count
	reached      int64
	buffers      [2]*[maxData]byte // that packed may be in; given up when it was written
}

// pack reads the spans of one frame and makes it. Several run at once.
func (s *sender) pack(job []span) (*packet, error) {
	p := &packet{buffers: [2]*[maxData]byte{buffers.Get().(*[maxData]byte), buffers.Get().(*[maxData]byte)}}
	free, old := p.buffers[0][:], p.buffers[1][:]
	data := free[:0] // what is sent of what was read, in place
	var heads []byte
	var r record // what is being collected
	end := func() {
		if r.length > 0 {
			heads = appendRecord(heads, r)
			p.count.Records++
		}
		r = record{}
	}
	for _, j := range job {
		fresh := free[:j.length]
		free = free[j.length:]
		if err := block.ReadSparse(s.new, fresh, j.off); err != nil {
			return nil, fmt.Errorf("read %d bytes at byte %d: %w", j.length, j.off, err)
		}
		if s.old != nil {
			if err := block.ReadSparse(s.old, old[:j.length], j.off); err != nil {
				return nil, fmt.Errorf("read the %d bytes at byte %d as they were: %w", j.length, j.off, err)
			}
		}
		for at := int64(0); at < j.length; at += Block {
			n := min(Block, j.length-at)
			is, was := fresh[at:at+n], zeros[:n]
			if s.old != nil {
				was = old[at : at+n]
			}
			var flags uint32
			if block.IsZero(is) {
				flags |= newZeros
			}
			if s.old == nil || block.IsZero(was) {
				flags |= oldZeros
			}
			if flags == newZeros|oldZeros || s.o.DropUnchanged && string(is) == string(was) {
				end()
				continue
			}
			if r.length == 0 || r.flags != flags || r.off+r.length != j.off+at {
				end()
				r = record{off: j.off + at, flags: flags}
			}
			r.length += n
			if flags&newZeros == 0 {
				d := digestOfOne(is)
				r.digests = append(r.digests, d[:]...)
				data = append(data, is...)
				p.count.Data += n
			} else {
				p.count.Zero += n
			}
			if flags&oldZeros == 0 {
				r.digests = appendOld(r.digests, was)
			}
		}
		p.reached = j.off + j.length
	}
	end()
	if len(heads) == 0 {
		return p, nil
	}
	f := frame{kind: kindRecords, length: uint32(len(data)), heads: heads, packed: data}
	if !s.o.Plain && len(data) > 0 {
		if packed := encoder().EncodeAll(data, old[:0]); len(packed) < len(data) {
			f.packing, f.packed = packedZstd, packed
		}
	}
	p.head, p.packed = f.appendHead(nil), f.packed
	return p, nil
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
	}
	for _, b := range p.buffers {
		buffers.Put(b)
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
