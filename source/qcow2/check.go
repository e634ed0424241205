package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/dmsnap/dmsnap/block"
)

// A Report is what Check found.
type Report struct {
	Errors int64 // damage: wrong tables, and clusters with fewer references counted than there are
	Leaks  int64 // clusters with more references counted than there are: space that is lost, and nothing else
	// Problems are the first maxProblems of both.
	Problems []Problem
}

// A Problem is one finding of Check.
type Problem struct {
	Leak  bool
	Place string // in the file
	What  string
}

func (p Problem) String() string { return p.Place + ": " + p.What }

// Bounds of Check.
const (
	maxProblems   = 100
	maxCheckBytes = 1 << 30 // of tables
	countsPerPage = 1 << 10
	maxCountPages = 1 << 16 // 256 MiB
)

// ErrTooLarge reports an image that Check does not finish: its tables, or the places in the file that they name, are
// too many.
var ErrTooLarge = errors.New("the image has more metadata than is checked")

// Check compares the reference counts of the image in file with the references that there are, and checks the entries
// of its tables (docs/spec/qcow2.md §4 and §11). It reads tables only: no data, no other file. Images that are not sound can be
// readable, and encrypted ones are checked like others. Nothing is changed.
//
// It needs 256 MiB of memory and reads 1 GiB at most. Errors: the cause of ctx; an *ondisk.CorruptError where the reference counts
// can't be found; ErrTooLarge; failed reads.
func Check(ctx context.Context, file block.Device, info *Info) (*Report, error) {
	c := &checker{ctx: ctx, file: file, info: info, bits: info.header.clusterBits, left: maxCheckBytes, blocks: newCache(tableCacheBytes)}
	c.clusters = (file.Size()-1)>>c.bits + 1
	for _, step := range []func() error{c.readCountTable, c.useHeader, c.useActive, c.useSnapshots, c.useBitmaps, c.compare} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return &c.report, nil
}

// A checker is one run of Check.
type checker struct {
	ctx      context.Context
	file     block.Device
	info     *Info
	bits     uint  // log2 of the cluster size
	clusters int64 // of the file, the last one as far as it goes
	left     int64 // bytes that may still be read
	table    []uint64
	blocks   *cache // of reference counts, by their byte of the file
	uses     *counts
	report   Report
}

// A place is entry n of a table; where n is negative, the table itself.
type place struct {
	of string
	n  int64
}

func (p place) String() string {
	if p.n < 0 {
		return p.of
	}
	return fmt.Sprintf("entry %d of the %s", p.n, p.of)
}

func whole(of string) place { return place{of, -1} }

func (c *checker) problem(leak bool, at place, format string, a ...any) {
	if leak {
		c.report.Leaks++
	} else {
		c.report.Errors++
	}
	if len(c.report.Problems) < maxProblems {
		c.report.Problems = append(c.report.Problems, Problem{leak, at.String(), fmt.Sprintf(format, a...)})
	}
}

// read reads metadata; what is behind the end of the file reads as zeros.
func (c *checker) read(p []byte, at int64, what string) error {
	if err := context.Cause(c.ctx); err != nil {
		return err
	}
	if c.left -= int64(len(p)); c.left < 0 {
		return ErrTooLarge
	}
	return readPadded(c.file, p, at, what)
}

// entries calls do for each word of a table that is not zero, as far as the file goes.
func (c *checker) entries(t table, width int, what string, do func(n int64, words []byte) error) error {
	bytes := min(t.entries*int64(width), max(0, c.file.Size()-t.offset))
	page := make([]byte, min(1<<16, (bytes+15)&^15))
	for at := int64(0); at < bytes; at += int64(len(page)) {
		if err := c.read(page, t.offset+at, what); err != nil {
			return err
		}
		for in := 0; in < len(page) && at+int64(in) < bytes; in += width {
			if b := page[in : in+width]; !block.IsZero(b) {
				if err := do((at+int64(in))/int64(width), b); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// use counts references to the clusters of n bytes at off.
func (c *checker) use(off, n int64, times uint32, at place) error {
	if n <= 0 {
		return nil
	}
	if off > math.MaxInt64-n {
		c.problem(false, at, "%d bytes at the offset 0x%x", n, off)
		return nil
	}
	first, last := off>>c.bits, (off+n-1)>>c.bits
	if last >= c.clusters {
		c.problem(false, at, "it ends behind the end of the file (byte %d)", c.file.Size())
		last = c.clusters - 1
	}
	for ; first <= last; first++ {
		if err := c.uses.add(first, times); err != nil {
			return err
		}
	}
	return nil
}

// aligned reports an offset that is none of a cluster, or that is behind the end of the file, as an error.
func (c *checker) aligned(offset int64, at place) bool {
	switch {
	case offset&(c.info.ClusterSize-1) != 0:
		c.problem(false, at, "the offset 0x%x is not a multiple of the cluster size", offset)
	case offset>>c.bits >= c.clusters:
		c.problem(false, at, "the offset 0x%x is behind the end of the file (byte %d)", offset, c.file.Size())
	default:
		return true
	}
	return false
}

// readCountTable reads the reference count table, and counts it and the blocks that it names.
func (c *checker) readCountTable() error {
	t := c.info.header.counts
	c.uses = newCounts()
	c.table = make([]uint64, t.entries)
	if err := c.use(t.offset, t.entries*8, 1, whole("reference count table")); err != nil {
		return err
	}
	return c.entries(t, 8, "the reference count table", func(n int64, b []byte) error {
		at := place{"reference count table", n}
		entry := binary.BigEndian.Uint64(b)
		if entry&(1<<9-1) != 0 {
			c.problem(false, at, "reserved bits are set (0x%016x)", entry)
		}
		offset := entry &^ (1<<9 - 1)
		switch {
		case offset == 0:
			return nil
		case offset&uint64(c.info.ClusterSize-1) != 0 || offset > math.MaxInt64:
			if n*c.perBlock() < c.clusters {
				return corrupt(at.String(), "the offset 0x%x is not one of a cluster", offset)
			}
			c.problem(false, at, "the offset 0x%x is not one of a cluster", offset)
			return nil
		case offset>>c.bits >= uint64(c.clusters):
			c.problem(false, at, "the offset 0x%x is behind the end of the file (byte %d)", offset, c.file.Size())
			return nil
		}
		c.table[n] = offset
		return c.use(int64(offset), c.info.ClusterSize, 1, at)
	})
}

// useHeader counts what the header names beside tables of the disk.
func (c *checker) useHeader() error {
	if err := c.use(0, c.info.ClusterSize, 1, whole("header")); err != nil {
		return err
	}
	e := c.info.header.encryption
	if e.offset < 0 || e.bytes < 0 || e.offset > math.MaxInt64-e.bytes {
		c.problem(false, whole("encryption header"), "%d bytes at byte %d", e.bytes, e.offset)
		return nil
	}
	return c.use(e.offset, e.bytes, 1, whole("encryption header"))
}

// useActive counts the references of the present state of the disk, and checks its copied flags.
func (c *checker) useActive() error {
	tables := newCounts()
	if err := c.useL1(c.info.header.l1, true, "L1 table", tables); err != nil {
		return err
	}
	return c.useL2(tables, true)
}

// useSnapshots counts those of internal snapshots.
func (c *checker) useSnapshots() error {
	snapshots, bytes, err := readSnapshots(c.file, c.info)
	if err != nil {
		c.problem(false, whole("snapshot table"), "%v", err)
	}
	if err := c.use(c.info.header.snapshotsOffset, bytes, 1, whole("snapshot table")); err != nil {
		return err
	}
	tables := newCounts()
	for _, s := range snapshots {
		what := fmt.Sprintf("L1 table of snapshot %q", s.Name)
		if s.l1.offset < 0 || s.l1.offset&(c.info.ClusterSize-1) != 0 || s.l1.entries*8 > maxL1Bytes {
			c.problem(false, whole(what), "%d entries at the offset 0x%x", s.l1.entries, uint64(s.l1.offset))
			continue
		}
		if err := c.useL1(s.l1, false, what, tables); err != nil {
			return err
		}
	}
	return c.useL2(tables, false)
}

// useL1 counts the clusters of an L1 table and, in tables, the L2 tables that it names.
func (c *checker) useL1(t table, active bool, what string, tables *counts) error {
	if err := c.use(t.offset, t.entries*8, 1, whole(what)); err != nil {
		return err
	}
	return c.entries(t, 8, what, func(n int64, b []byte) error {
		at := place{what, n}
		entry := binary.BigEndian.Uint64(b)
		offset := int64(entry & offsetMask)
		if offset == 0 {
			c.problem(false, at, "it has no offset and is not zero (0x%016x)", entry)
			return nil
		}
		if entry&^(offsetMask|copiedFlag) != 0 {
			c.problem(false, at, "reserved bits are set (0x%016x)", entry)
		}
		if !c.aligned(offset, at) {
			return nil
		}
		if active {
			if err := c.checkCopied(entry, at); err != nil {
				return err
			}
		}
		return tables.add(offset>>c.bits, 1)
	})
}

// checkCopied checks the copied flag of an entry: it says that the reference count is 1.
func (c *checker) checkCopied(entry uint64, at place) error {
	n, err := c.count(int64(entry&offsetMask) >> c.bits)
	if err == nil && (n == 1) != (entry&copiedFlag != 0) {
		c.problem(false, at, "the copied flag disagrees with a reference count of %d (0x%016x)", n, entry)
	}
	return err
}

// useL2 counts what L2 tables name, each as often as it is named itself.
func (c *checker) useL2(tables *counts, active bool) error {
	return tables.each(func(cluster int64, times uint32) error {
		offset := cluster << c.bits
		what := fmt.Sprintf("L2 table at byte 0x%x", offset)
		if err := c.use(offset, c.info.ClusterSize, times, whole(what)); err != nil {
			return err
		}
		width := 8
		if c.info.ExtendedL2 {
			width = 16
		}
		t := table{offset, c.info.ClusterSize / int64(width)}
		return c.entries(t, width, what, func(n int64, b []byte) error {
			return c.useEntry(b, times, active, place{what, n})
		})
	})
}

// useEntry counts what an L2 entry names.
func (c *checker) useEntry(b []byte, times uint32, active bool, at place) error {
	entry := binary.BigEndian.Uint64(b)
	if entry&compressedFlag != 0 {
		if entry&copiedFlag != 0 {
			c.problem(false, at, "a compressed cluster with the copied flag (0x%016x)", entry)
		}
		if c.info.ExternalData {
			c.problem(false, at, "compressed data in an image with an external data file")
			return nil
		}
		host, sectors := compressedAt(entry, c.bits)
		if host>>56 != 0 {
			c.problem(false, at, "reserved bits are set (0x%016x)", entry)
			return nil
		}
		first := host &^ (block.SectorSize - 1)
		return c.use(first, (sectors+1)*block.SectorSize, times, at)
	}
	const known = offsetMask | copiedFlag | zeroFlag // the last one is ignored where there are subclusters
	offset := int64(entry & offsetMask)
	if c.info.ExtendedL2 {
		allocated := offset != 0 || c.info.ExternalData && entry&copiedFlag != 0
		if state := binary.BigEndian.Uint64(b[8:]); state&(state>>subclusters)&math.MaxUint32 != 0 {
			c.problem(false, at, "a subcluster has data and is zeros (0x%016x)", state)
		} else if state&math.MaxUint32 != 0 && !allocated {
			c.problem(false, at, "subclusters have data, the cluster has no offset (0x%016x)", state)
		}
	}
	if entry&^known != 0 {
		c.problem(false, at, "reserved bits are set (0x%016x)", entry)
	}
	switch {
	case offset == 0:
		return nil
	case c.info.ExternalData:
		if offset&(c.info.ClusterSize-1) != 0 || entry&copiedFlag == 0 {
			c.problem(false, at, "the offset in the external data file is not a multiple of the cluster size, or lacks the copied flag (0x%016x)", entry)
		}
		return nil
	case !c.aligned(offset, at):
		return nil
	}
	if active {
		if err := c.checkCopied(entry, at); err != nil {
			return err
		}
	}
	return c.use(offset, c.info.ClusterSize, times, at)
}

// useBitmaps counts the directory, tables and data of dirty bitmaps.
func (c *checker) useBitmaps() error {
	x := c.info.header.bitmaps
	bitmaps, consistent, err := Bitmaps(c.file, c.info)
	if err != nil {
		c.problem(false, whole("bitmaps"), "%v", err)
		return nil
	}
	if !consistent || x.count == 0 {
		return nil
	}
	if err := c.use(x.offset, x.bytes, 1, whole("bitmap directory")); err != nil {
		return err
	}
	for _, b := range bitmaps {
		what := fmt.Sprintf("table of bitmap %q", b.Name)
		if b.table.offset < 0 || b.table.entries*8 > math.MaxInt64-b.table.offset || !c.aligned(b.table.offset, whole(what)) {
			continue
		}
		if err := c.use(b.table.offset, b.table.entries*8, 1, whole(what)); err != nil {
			return err
		}
		err := c.entries(b.table, 8, what, func(n int64, e []byte) error {
			at := place{what, n}
			offset := int64(binary.BigEndian.Uint64(e) & offsetMask)
			if offset == 0 || !c.aligned(offset, at) {
				return nil
			}
			return c.use(offset, c.info.ClusterSize, 1, at)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
