package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/dmsnap/dmsnap/block"
)

// DefaultClusterSize is the size of clusters where none is asked for, in bytes, as QEMU has it.
const DefaultClusterSize = 64 << 10

// ExportOptions say what kind of image Export writes.
type ExportOptions struct {
	ClusterSize int64       // bytes, a power of two from 512 to 2 MiB; 0: DefaultClusterSize
	Compress    bool        // compress each cluster that becomes smaller
	Compression Compression // with Compress

	// Backing, where not empty, makes an overlay: the name of the backing file, relative to the folder of the image, as
	// it is written to the header; its format, "raw" or "qcow2"; and the size of its disk in bytes.
	Backing       string
	BackingFormat string
	BackingSize   int64
	// Stored reports whether the overlay is to hold the byte at off of the disk, and for how many of the next n ≥ 1 bytes
	// that is so. Clusters without such a byte are left to the backing file. Nil: the overlay holds the whole disk.
	Stored func(off, n int64) (stored bool, follow int64)

	// Progress, where not nil, is called with the byte of the disk that was reached. An error of it ends the export.
	Progress func(reached int64) error
}

// A Target is a new file, which reads as zeros.
type Target interface {
	io.WriterAt
	Sync() error
}

// Sizes of the writer, in bytes.
const (
	batchBytes  = 1 << 20  // of the disk that are read and compressed together
	bufferBytes = 1 << 20  // that are written together
	padBytes    = 64 << 10 // largest gap that is filled with zeros instead of skipped
	window      = 4 << 10  // of deflate streams: what every reader accepts
	maxSharers  = 60000    // of one host cluster by compressed ones: counts have 16 bits
)

// ErrName reports a backing file name that other programs would take for something else, or that is too long.
var ErrName = errors.New("unsuitable name of a backing file")

// Export writes an image of the disk src to dst, which reads as zeros, and makes it durable (docs/spec/qcow2.md §12). The
// file is written from its beginning to its end, and the header last: an incomplete file is no image. Zeros of src take no
// space. Memory is bounded by the tables of the first level: 8 bytes for each L1 entry and each block of reference counts.
//
// Errors: options that don't fit src, ErrName, failed reads and writes, those of Progress. The file is of no use then.
func Export(dst Target, src block.Device, o ExportOptions) error {
	e, err := newExporter(dst, src, o)
	if err != nil {
		return err
	}
	for off := int64(0); off < e.size; {
		n, err := e.step(off)
		if err != nil {
			return err
		}
		off += n
		if o.Progress != nil {
			if err := o.Progress(off); err != nil {
				return err
			}
		}
	}
	return e.finish()
}

// An exporter is an export under way.
type exporter struct {
	o         ExportOptions
	src       block.Device
	size      int64
	bits      uint
	cs        int64
	l2Entries int64

	out output
	l1  []byte
	l2  []byte // the table of the L1 entry at
	at  int64
	any bool // l2 has entries

	// Reference counts of the clusters from base on, whose block is not written yet; those before are in blocks.
	base     int64
	counts   []uint16
	perBlock int64
	blocks   []byte // reference count table

	buf, zero []byte
}

func newExporter(dst Target, src block.Device, o ExportOptions) (*exporter, error) {
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultClusterSize
	}
	cs := o.ClusterSize
	if cs < 1<<minClusterBits || cs > 1<<maxClusterBits || cs&(cs-1) != 0 {
		return nil, fmt.Errorf("clusters of %d bytes: a power of two from 512 bytes to 2 MiB is required", cs)
	}
	e := &exporter{o: o, src: src, size: src.Size(), cs: cs, l2Entries: cs / 8, perBlock: cs / 2, out: output{dst: dst}}
	for e.bits = minClusterBits; 1<<e.bits < cs; e.bits++ {
	}
	if e.size%block.SectorSize != 0 {
		return nil, fmt.Errorf("a disk of %d bytes: whole sectors are required", e.size)
	}
	reach := e.l2Entries * cs
	entries := max(1, (e.size-1)/reach+1)
	if entries*8 > maxL1Bytes {
		return nil, fmt.Errorf("a disk of %d bytes is too large for clusters of %d bytes", e.size, cs)
	}
	if _, err := e.header(); err != nil {
		return nil, err
	}
	e.l1, e.l2 = make([]byte, entries*8), make([]byte, cs)
	e.buf, e.zero = make([]byte, max(cs, batchBytes)), make([]byte, cs)
	e.out.at = cs // the header comes last
	e.count(0, 0)
	return e, nil
}

// A runKind is how a run of clusters is represented.
type runKind uint8

const (
	runAbsent runKind = iota // left to the backing file
	runZero
	runData
)

// step exports a run of clusters that begins at off, and returns its length in bytes.
func (e *exporter) step(off int64) (int64, error) {
	kind, n, err := e.run(off)
	if err != nil {
		return 0, err
	}
	switch kind {
	case runZero:
		err = e.zeros(off, n)
	case runData:
		reach := e.l2Entries * e.cs
		n = min(n, int64(len(e.buf)), reach-off%reach)
		err = e.data(off, n)
	}
	return n, err
}

// run looks at what begins at off, which begins a cluster. n is in whole clusters, or ends with the disk.
func (e *exporter) run(off int64) (kind runKind, n int64, err error) {
	rest := e.size - off
	one := min(e.cs, rest)
	limit := rest
	if e.o.Stored != nil {
		stored, follow := e.o.Stored(off, rest)
		switch {
		case !stored && follow >= one:
			return runAbsent, e.whole(off, follow), nil
		case !stored:
			limit = one // a part of the cluster is stored
		default:
			limit = min(rest, (follow+e.cs-1)&^(e.cs-1))
		}
	}
	extents, err := block.Extents(e.src, off, limit)
	if err != nil {
		return 0, 0, err
	}
	for _, x := range extents {
		if x.Flags&block.ReadsZero == 0 {
			break
		}
		n += x.Length
	}
	if n >= one {
		return runZero, e.whole(off, n), nil
	}
	if n == 0 {
		n = extents[0].Length
	}
	return runData, min(limit, (n+e.cs-1)&^(e.cs-1)), nil
}

// whole rounds n bytes from off on down to whole clusters, where they do not end with the disk.
func (e *exporter) whole(off, n int64) int64 {
	if off+n == e.size {
		return n
	}
	return n &^ (e.cs - 1)
}

// zeros represents n bytes of zeros. A cluster is not allocated where it has no backing file.
func (e *exporter) zeros(off, n int64) error {
	if e.o.Backing == "" {
		return nil
	}
	for end := min(off+n, e.o.BackingSize); off < end; off += e.cs {
		if err := e.set(off, zeroFlag); err != nil {
			return err
		}
	}
	return nil
}

// data writes n bytes, at most a buffer, within the reach of one L2 table.
func (e *exporter) data(off, n int64) error {
	b := e.buf[:n]
	if _, err := e.src.ReadAt(b, off); err != nil {
		return err
	}
	if tail := n % e.cs; tail != 0 { // the disk ends within the cluster
		b = e.buf[:n+e.cs-tail]
		clear(b[n:])
	}
	var plain []int64 // bytes of b
	packed := e.compress(b)
	for i := int64(0); i < int64(len(b)); i += e.cs {
		switch c := b[i : i+e.cs]; {
		case bytes.Equal(c, e.zero):
			if err := e.zeros(off+i, e.cs); err != nil {
				return err
			}
		case packed != nil && packed[i/e.cs] != nil:
			if err := e.compressed(off+i, packed[i/e.cs]); err != nil {
				return err
			}
		default:
			plain = append(plain, i)
		}
	}
	for _, i := range plain { // together, so that compressed ones are too
		at, err := e.cluster(b[i : i+e.cs])
		if err != nil {
			return err
		}
		if err := e.set(off+i, uint64(at)|copiedFlag); err != nil {
			return err
		}
	}
	return nil
}

// compress returns each cluster of b compressed, nil for those of zeros and those that don't become smaller.
func (e *exporter) compress(b []byte) [][]byte {
	if !e.o.Compress {
		return nil
	}
	packed := make([][]byte, int64(len(b))/e.cs)
	next := make(chan int, len(packed))
	for i := range packed {
		next <- i
	}
	close(next)
	var all sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(packed)) {
		all.Go(func() {
			for i := range next {
				c := b[int64(i)*e.cs:][:e.cs]
				if bytes.Equal(c, e.zero) {
					continue
				}
				pack := deflate
				if e.o.Compression == Zstd {
					pack = encodeZstd
				}
				if p := pack(c); int64(len(p)) < e.cs {
					packed[i] = p
				}
			}
		})
	}
	all.Wait()
	return packed
}

var deflaters = sync.Pool{New: func() any {
	w, err := flate.NewWriterWindow(nil, window)
	if err != nil {
		panic(err) // the window is constant
	}
	return w
}}

// deflate returns p as a raw deflate stream.
func deflate(p []byte) []byte {
	w := deflaters.Get().(*flate.Writer)
	defer deflaters.Put(w)
	b := bytes.NewBuffer(make([]byte, 0, len(p)))
	w.Reset(b)
	_, err := w.Write(p)
	if err = errors.Join(err, w.Close()); err != nil {
		panic(err) // a buffer takes everything
	}
	return b.Bytes()
}

var zstdEncoder = sync.OnceValue(func() *zstd.Encoder {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(true))
	if err != nil {
		panic(err) // the options are constant
	}
	return w
})

// encodeZstd returns p as one zstd frame.
func encodeZstd(p []byte) []byte { return zstdEncoder().EncodeAll(p, make([]byte, 0, len(p))) }

// cluster writes a whole cluster at the next cluster boundary and returns where.
func (e *exporter) cluster(b []byte) (at int64, err error) {
	if err := e.settle(); err != nil {
		return 0, err
	}
	if err := e.out.align(e.cs); err != nil {
		return 0, err
	}
	at = e.out.position()
	e.count(at, at)
	return at, e.out.write(b)
}

// compressed writes a compressed cluster behind what was written last.
func (e *exporter) compressed(off int64, b []byte) error {
	if err := e.settle(); err != nil {
		return err
	}
	at := e.out.position()
	if i := at>>e.bits - e.base; i < int64(len(e.counts)) && e.counts[i] >= maxSharers {
		if err := e.out.align(e.cs); err != nil {
			return err
		}
		at = e.out.position()
	}
	last := at + int64(len(b)) - 1
	e.count(at, last)
	if err := e.out.write(b); err != nil {
		return err
	}
	return e.set(off, compressedFlag|uint64(last>>9-at>>9)<<(62-(e.bits-8))|uint64(at))
}

// count adds one to the reference counts of the clusters from the one with byte first to the one with byte last.
func (e *exporter) count(first, last int64) {
	for c := first >> e.bits; c <= last>>e.bits; c++ {
		for int64(len(e.counts)) <= c-e.base {
			e.counts = append(e.counts, 0)
		}
		e.counts[c-e.base]++
	}
}

// settle writes the blocks of reference counts for clusters that are finished.
func (e *exporter) settle() error {
	for e.out.position()>>e.bits >= e.base+e.perBlock {
		if err := e.out.align(e.cs); err != nil {
			return err
		}
		at := e.out.position() // its own count is in a later block
		if err := e.block(); err != nil {
			return err
		}
		e.count(at, at)
	}
	return nil
}

// block writes the next block of reference counts at the position, which is a multiple of the cluster size.
func (e *exporter) block() error {
	b := make([]byte, e.cs)
	n := min(e.perBlock, int64(len(e.counts)))
	for i, c := range e.counts[:n] {
		binary.BigEndian.PutUint16(b[2*i:], c)
	}
	e.counts = append(e.counts[:0], e.counts[n:]...)
	e.base += e.perBlock
	e.blocks = binary.BigEndian.AppendUint64(e.blocks, uint64(e.out.position()))
	return e.out.write(b)
}

// set sets the L2 entry of the cluster at byte off of the disk. Tables are filled in ascending order.
func (e *exporter) set(off int64, entry uint64) error {
	c := off >> e.bits
	if c/e.l2Entries != e.at {
		if err := e.finishTable(); err != nil {
			return err
		}
		e.at = c / e.l2Entries
	}
	binary.BigEndian.PutUint64(e.l2[c%e.l2Entries*8:], entry)
	e.any = true
	return nil
}

// finishTable writes the L2 table behind its last cluster.
func (e *exporter) finishTable() error {
	if !e.any {
		return nil
	}
	at, err := e.cluster(e.l2)
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint64(e.l1[e.at*8:], uint64(at)|copiedFlag)
	clear(e.l2)
	e.any = false
	return nil
}

// finish writes the tables that are not written yet, makes all durable, and then the header.
func (e *exporter) finish() error {
	if err := e.finishTable(); err != nil {
		return err
	}
	if err := e.settle(); err != nil {
		return err
	}
	if err := e.out.align(e.cs); err != nil {
		return err
	}
	l1 := e.out.position()
	e.count(l1, l1+int64(len(e.l1))-1)
	if err := e.out.write(e.l1); err != nil {
		return err
	}
	if err := e.out.align(e.cs); err != nil {
		return err
	}
	blocks, table := e.remaining()
	if table*e.cs > maxRefTable {
		return fmt.Errorf("clusters of %d bytes are too small for a file of %d bytes", e.cs, e.out.position())
	}
	at := e.out.position()
	e.count(at, at+(blocks+table)*e.cs-1)
	for range blocks {
		if err := e.block(); err != nil {
			return err
		}
	}
	refs := e.out.position()
	e.blocks = append(e.blocks, make([]byte, table*e.cs-int64(len(e.blocks)))...)
	if err := e.out.write(e.blocks); err != nil {
		return err
	}
	if err := e.out.flush(); err != nil {
		return err
	}
	header, err := e.header()
	if err != nil {
		return err
	}
	be := binary.BigEndian
	be.PutUint64(header[40:], uint64(l1))
	be.PutUint64(header[48:], uint64(refs))
	be.PutUint32(header[56:], uint32(table))
	if err := e.out.dst.Sync(); err != nil {
		return err
	}
	if _, err := e.out.dst.WriteAt(header, 0); err != nil {
		return err
	}
	return e.out.dst.Sync()
}

// remaining returns how many blocks of reference counts are still to be written, and how many clusters the table has,
// so that the blocks count both.
func (e *exporter) remaining() (blocks, table int64) {
	clusters, written := e.out.position()>>e.bits, int64(len(e.blocks)/8)
	for {
		table = ((written+blocks)*8 + e.cs - 1) / e.cs
		if (written+blocks)*e.perBlock >= clusters+blocks+table {
			return blocks, table
		}
		blocks++
	}
}

// header returns the first cluster, without the places of the tables.
func (e *exporter) header() ([]byte, error) {
	b := make([]byte, e.cs)
	be := binary.BigEndian
	be.PutUint32(b[0:], magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], uint32(e.bits))
	be.PutUint64(b[24:], uint64(e.size))
	be.PutUint32(b[36:], uint32(len(e.l1)/8))
	be.PutUint32(b[96:], 4) // counts of 16 bits
	be.PutUint32(b[100:], 112)
	if e.o.Compress && e.o.Compression == Zstd {
		be.PutUint64(b[72:], incompatCompression)
		b[104] = byte(Zstd)
	}
	if e.o.Backing == "" {
		return b, nil
	}
	name, format := e.o.Backing, e.o.BackingFormat
	before, _, _ := strings.Cut(name, "/")
	extension := 8 + (len(format)+7)&^7
	at := 112 + extension + 8
	switch {
	case strings.ContainsRune(before, ':') || strings.ContainsRune(name, 0):
		return nil, fmt.Errorf("%w: %q", ErrName, name)
	case len(name) > maxName || int64(at+len(name)) > e.cs:
		return nil, fmt.Errorf("%w: %d bytes are too many for clusters of %d bytes: %q", ErrName, len(name), e.cs, name)
	case format != "raw" && format != "qcow2":
		return nil, fmt.Errorf("format %q of the backing file: raw or qcow2 is required", format)
	}
	be.PutUint32(b[112:], extBackingFormat)
	be.PutUint32(b[116:], uint32(len(format)))
	copy(b[120:], format)
	be.PutUint64(b[8:], uint64(at))
	be.PutUint32(b[16:], uint32(len(name)))
	copy(b[at:], name)
	return b, nil
}

// An output is written from its beginning to its end.
type output struct {
	dst Target
	at  int64 // byte of dst where buf belongs
	buf []byte
}

func (o *output) position() int64 { return o.at + int64(len(o.buf)) }

// align moves on to a multiple of n.
func (o *output) align(n int64) error {
	gap := -o.position() & (n - 1)
	if gap <= padBytes {
		return o.write(make([]byte, gap))
	}
	if err := o.flush(); err != nil {
		return err
	}
	o.at += gap
	return nil
}

func (o *output) write(p []byte) error {
	if len(o.buf)+len(p) > bufferBytes {
		if err := o.flush(); err != nil {
			return err
		}
	}
	if len(p) >= bufferBytes {
		_, err := o.dst.WriteAt(p, o.at)
		o.at += int64(len(p))
		return err
	}
	o.buf = append(o.buf, p...)
	return nil
}

func (o *output) flush() error {
	if len(o.buf) == 0 {
		return nil
	}
	_, err := o.dst.WriteAt(o.buf, o.at)
	o.at, o.buf = o.at+int64(len(o.buf)), o.buf[:0]
	return err
}
