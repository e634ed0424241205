package qcow2

import (
	"errors"
	"fmt"
	"io"

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
