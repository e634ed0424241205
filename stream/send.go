package stream

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"iter"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/store"
)

// A Source is what can be sent: two devices, and where they may differ.
type Source struct {
	kind     Kind
	old, new block.Device // old is nil for a whole disk
	changed  func() iter.Seq2[diff.Extent, error]
}

// Between is what the view of one store has and that of another has not. Both are of one origin; a nil store stands for
// the origin itself. Nothing may write to the devices while the source is used, nor close them. Errors are those of
// diff.Between.
func Between(origin block.Device, old, new *store.Store) (*Source, error) {
	d, err := diff.Between(origin, old, new)
	if err != nil {
		return nil, err
	}
	was, is := d.Views()
	return &Source{Delta, was, is, func() iter.Seq2[diff.Extent, error] {
		return func(yield func(diff.Extent, error) bool) {
			for e := range d.Extents() {
				if !yield(e, nil) {
					return
				}
			}
		}
	}}, nil
}

// Of is what new has and old has not, of two devices of one size: they may differ where changed says so, by the lowest bit of
// the flags of extents, as an NBD server does in a context of changed blocks. It may stop early, but not before the first byte.
// Nothing may write to the devices while the source is used.
func Of(old, new block.Device, changed func(off, n int64) ([]block.Extent, error)) *Source {
	return &Source{Delta, old, new, func() iter.Seq2[diff.Extent, error] {
		return extentsOf(new.Size(), changed, func(e block.Extent) bool { return e.Flags&1 != 0 })
	}}
}

// extentsOf yields those of a disk's extents that are wanted.
func extentsOf(size int64, extents func(off, n int64) ([]block.Extent, error), wanted func(block.Extent) bool) iter.Seq2[diff.Extent, error] {
	return func(yield func(diff.Extent, error) bool) {
		for off := int64(0); off < size; {
			list, err := extents(off, size-off)
			if err == nil && len(list) == 0 {
				err = fmt.Errorf("no extents at byte %d", off)
			}
			if err != nil {
				yield(diff.Extent{}, err)
				return
			}
			for _, e := range list {
				if wanted(e) && !yield(diff.Extent{Off: off, Length: e.Length}, nil) {
					return
				}
				off += e.Length
			}
		}
	}
}

// Whole is a disk as it is. Nothing may write to it while the source is used.
func Whole(dev block.Device) *Source {
	return &Source{Disk, nil, dev, func() iter.Seq2[diff.Extent, error] {
		return extentsOf(dev.Size(), func(off, n int64) ([]block.Extent, error) { return block.Extents(dev, off, n) },
			func(e block.Extent) bool { return e.Flags&block.ReadsZero == 0 })
	}}
}

// Kind says what is sent.
func (s *Source) Kind() Kind { return s.kind }

// Size returns the size of the disk in bytes.
func (s *Source) Size() int64 { return s.new.Size() }

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

// buffers are for data of one frame each. That of many small frames is not kept in them.
var buffers = sync.Pool{New: func() any { return new([maxData]byte) }}

// buffer returns n ≤ maxData bytes, whose content is anything; recycle gives them up.
func buffer(n int) []byte {
	if n <= maxData/2 {
		return make([]byte, n)
	}
	return buffers.Get().(*[maxData]byte)[:n]
}

func recycle(b []byte) {
	if cap(b) == maxData {
		buffers.Put((*[maxData]byte)(b[:maxData]))
	}
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

// encoder and decoder are made once; both are safe for concurrent use.
var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
})

var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*maxData), zstd.WithDecoderConcurrency(0))
	if err != nil {
		panic(err)
	}
	return d
})

// inOrder does work on jobs, several at once, and hands the results to done in the order of the jobs. It returns the
// first error of jobs, work or done, in that order of jobs, or ctx's cause. No work is under way then; jobs may still be
// asked for a job whose work will not begin.
func inOrder[J, R any](ctx context.Context, jobs iter.Seq2[J, error], work func(J) (R, error), done func(R) error) error {
	type result struct {
		r   R
		err error
	}
	// The channel holds the futures of work that is under way or finished: its capacity bounds both.
	futures, stop := make(chan chan result, min(runtime.GOMAXPROCS(0), 8)), make(chan struct{})
	var (
		running sync.WaitGroup
		mu      sync.Mutex // for stopped, and for adding to running
		stopped bool
	)
	begin := func(j J, future chan result) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		running.Go(func() {
			r, err := work(j)
			future <- result{r, err}
		})
	}
	go func() {
		defer close(futures)
		for j, err := range jobs {
			future := make(chan result, 1)
			if err != nil {
				future <- result{err: err}
			} else {
				begin(j, future)
			}
			select {
			case futures <- future:
			case <-stop:
				return
			}
			if err != nil {
				return
			}
		}
	}()
	defer func() {
		mu.Lock()
		stopped = true
		mu.Unlock()
		close(stop)
		running.Wait()
	}()
	for {
		var future chan result
		select {
		case f, more := <-futures:
			if !more {
				return nil
			}
			future = f
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		select {
		case r := <-future:
			if r.err != nil {
				return r.err
			}
			if err := done(r.r); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
