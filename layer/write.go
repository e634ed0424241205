package layer

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// A data blob is dataStart, a skippable frame of zstd, and the frames, each a zstd frame of its own: zstd(1) unpacks the
// blob to the contents of all its frames.
var dataStart = append([]byte{0x50, 0x2a, 0x4d, 0x18, 16, 0, 0, 0}, "dmsnap layer 1\n\x00"...)

// maxPacked bounds a frame: one that does not compress has some bytes more than its content.
const maxPacked = UnitBytes + 1<<10

// encoders compress one unit at a time each; the level is one at which 50 hosts read what one writes.
var encoders = sync.Pool{New: func() any {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(UnitBytes), zstd.WithSingleSegment(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
}}

var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*UnitBytes), zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
})

// Spare is how many bytes behind the content Unpack may overwrite: with them the decoder copies in larger steps.
const Spare = 16

// Unpack returns the content of a frame in dst, whose capacity is at least f.Length, better f.Length + Spare. It writes no
// more than that, whatever the frame says.
func (f *Frame) Unpack(dst, packed []byte) ([]byte, error) {
	if len(packed) != f.Packed || f.Length > UnitBytes {
		return nil, corrupt("a frame of %d bytes instead of %d", len(packed), f.Packed)
	}
	got, err := decoder().DecodeAll(packed, dst[:0:min(cap(dst), f.Length+Spare)])
	if err != nil || len(got) != f.Length || DigestOf(got) != f.Content {
		return nil, corrupt("the frame at byte %d of the data of layer %d has another digest", f.Off, f.Layer)
	}
	return got, nil
}

// An IndexWriter writes an index.
type IndexWriter struct {
	w      io.Writer
	sum    hash.Hash
	size   int64 // of the disk
	page   []byte
	first  int64 // place of its first entry
	nodes  []node
	end    int64
	result Index
}

type node struct {
	place  int64
	digest Digest
}

// NewIndexWriter returns a writer of the index of a disk of size bytes. 40 bytes a page, which has 63 entries, stay in memory.
func NewIndexWriter(w io.Writer, size int64) *IndexWriter {
	return &IndexWriter{w: w, sum: sha256.New(), size: size, page: newPage(0)}
}

// Add adds an entry after those that were added before.
func (w *IndexWriter) Add(e Entry) error {
	if e.Place < w.end || e.Length <= 0 || e.End() > w.size {
		return fmt.Errorf("layer: an entry of %d bytes at byte %d after byte %d of %d", e.Length, e.Place, w.end, w.size)
	}
	w.end = e.End()
	for most := int64(1) << 40; e.Length > most; e = e.from(e.Place + most) { // a length of 32 bits in sectors
		part := e
		part.Length = most
		if err := w.add(part); err != nil {
			return err
		}
	}
	return w.add(e)
}

func (w *IndexWriter) add(e Entry) error {
	if len(w.page) == pageHeader {
		w.first = e.Place
	}
	n := len(w.page)
	w.page = w.page[:n+leafEntry]
	e.encode(w.page[n:])
	w.result.Entries++
	if len(w.page) < pageHeader+leafEntries*leafEntry {
		return nil
	}
	return w.endPage(0, leafEntry)
}

// endPage writes the page and begins another one.
func (w *IndexWriter) endPage(level, length int) error {
	b := w.page[:PageBytes]
	clear(b[len(w.page):])
	binary.LittleEndian.PutUint16(b[10:], uint16((len(w.page)-pageHeader)/length))
	w.nodes = append(w.nodes, node{w.first, DigestOf(b)})
	w.sum.Write(b)
	w.result.Size += PageBytes
	w.page = newPage(level)
	_, err := w.w.Write(b)
	return err
}

// Close writes the pages above the leaves and returns the index.
func (w *IndexWriter) Close() (Index, error) {
	if len(w.page) > pageHeader || w.result.Entries == 0 {
		if err := w.endPage(0, leafEntry); err != nil {
			return Index{}, err
		}
	}
	for level := 1; len(w.nodes) > 1; level++ {
		beneath := w.nodes
		w.nodes = nil
		for len(beneath) > 0 {
			w.page = newPage(level)
			w.first = beneath[0].place
			n := min(innerEntries, len(beneath))
			for _, child := range beneath[:n] {
				w.page = binary.LittleEndian.AppendUint64(w.page, uint64(child.place))
				w.page = append(w.page, child.digest[:]...)
			}
			beneath = beneath[n:]
			if err := w.endPage(level, innerEntry); err != nil {
				return Index{}, err
			}
		}
	}
	w.result.Root = w.nodes[0].digest
	w.sum.Sum(w.result.Digest[:0])
	return w.result, nil
}

// A Unit is what a layer has of one unit of the disk.
type Unit struct {
	Pieces []Piece // ascending
	Data   []byte  // the bytes of those pieces that are not zeros, in order; at most UnitBytes
}

// A Piece is a range of the disk, in whole sectors. One that is not of zeros is within the unit.
type Piece struct {
	Place, Length int64
	Zero          bool
}

// job is a unit that is being compressed.
type job struct {
	unit   Unit
	packed []byte
	sum    Digest
	done   chan struct{}
}

// Write writes a layer of a disk of size bytes to data and index. produce emits its units in ascending order; it must not use
// a unit any more that it has emitted. Buffer gives it memory for the next one.
func Write(ctx context.Context, data, index io.Writer, size int64, produce func(emit func(Unit) error) error) (Layer, error) {
	workers := runtime.GOMAXPROCS(0)
	todo, inOrder := make(chan *job), make(chan *job, workers)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	for range workers {
		running.Go(func() {
			e := encoders.Get().(*zstd.Encoder)
			defer encoders.Put(e)
			for j := range todo {
				if len(j.unit.Data) > 0 {
					j.packed, j.sum = e.EncodeAll(j.unit.Data, make([]byte, 0, maxPacked)), DigestOf(j.unit.Data)
				}
				close(j.done)
			}
		})
	}
	w := &writer{data: data, sum: sha256.New(), index: NewIndexWriter(index, size)}
	var written error
	running.Go(func() {
		for written = w.begin(); ; {
			if written != nil {
				cancel(written)
			}
			j, more := <-inOrder
			if !more {
				return
			}
			<-j.done
			if written == nil {
				written = w.add(j)
			}
			Recycle(j.unit.Data)
		}
	})
	err := produce(func(u Unit) error {
		if len(u.Data) > UnitBytes {
			return errors.New("layer: a unit that is too long")
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		j := &job{unit: u, done: make(chan struct{})}
		select {
		case todo <- j:
			inOrder <- j
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(todo)
	close(inOrder)
	running.Wait()
	if err = cmp.Or(written, err); err != nil {
		return Layer{}, err
	}
	return w.end()
}

// writer writes compressed units.
type writer struct {
	data  io.Writer
	sum   hash.Hash
	size  int64
	index *IndexWriter
}

func (w *writer) begin() error { return w.write(dataStart) }

func (w *writer) write(p []byte) error {
	w.sum.Write(p)
	w.size += int64(len(p))
	_, err := w.data.Write(p)
	return err
}

func (w *writer) add(j *job) error {
	frame := Frame{Off: w.size, Packed: len(j.packed), Length: len(j.unit.Data), Content: j.sum}
	skip := int64(0)
	for _, p := range j.unit.Pieces {
		e := Entry{Place: p.Place, Length: p.Length}
		if !p.Zero {
			e.Frame, e.Skip = frame, skip
			skip += p.Length
		}
		if err := w.index.Add(e); err != nil {
			return err
		}
	}
	if skip != int64(len(j.unit.Data)) {
		return errors.New("layer: a unit whose pieces are not its data")
	}
	return w.write(j.packed)
}

func (w *writer) end() (l Layer, err error) {
	l.Data.Size = w.size
	w.sum.Sum(l.Data.Digest[:0])
	l.Index, err = w.index.Close()
	return l, err
}

var buffers = sync.Pool{New: func() any { return new([UnitBytes]byte) }}

// Buffer returns memory for the data of a unit, of UnitBytes, whose content is anything. Write takes it back.
func Buffer() []byte { return buffers.Get().(*[UnitBytes]byte)[:] }

// Recycle takes memory of Buffer back that Write did not get.
func Recycle(b []byte) {
	if cap(b) == UnitBytes {
		buffers.Put((*[UnitBytes]byte)(b[:UnitBytes]))
	}
}

var zeroUnit [UnitBytes]byte

// IsZero reports whether p, of at most UnitBytes, is zeros.
func IsZero(p []byte) bool { return bytes.Equal(p, zeroUnit[:len(p)]) }
