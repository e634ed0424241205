package qcow2

import (
	"encoding/binary"
	"fmt"
	"strings"
)

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
