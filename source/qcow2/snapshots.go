package qcow2

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// maxListBytes bounds how much of a snapshot table or a bitmap directory is read.
const maxListBytes = 64 << 20

// A Snapshot is an internal snapshot of an image. Strings are as they are in the file: quote them in messages.
type Snapshot struct {
	ID, Name    string
	Time        time.Time
	Size        int64 // of the disk in bytes, rounded down to whole sectors
	VMStateSize uint64

	l1 table
}

// Snapshots lists the internal snapshots of the image in file, whose header is info. What could be read before an error
// is returned with it.
func Snapshots(file block.Device, info *Info) ([]Snapshot, error) {
	all, _, err := readSnapshots(file, info)
	return all, err
}

// readSnapshots is Snapshots, and returns how many bytes the table has.
func readSnapshots(file block.Device, info *Info) (all []Snapshot, length int64, err error) {
	be := binary.BigEndian
	at, start := info.header.snapshotsOffset, info.header.snapshotsOffset
	for n := range info.Snapshots {
		place := fmt.Sprintf("snapshot %d, image byte %d", n, at)
		if at-start > maxListBytes {
			return all, at - start, corrupt(place, "the snapshot table is longer than %d bytes", maxListBytes)
		}
		var b [40]byte
		if err := readInside(file, b[:], at, place); err != nil {
			return all, at - start, err
		}
		idBytes, nameBytes, extraBytes := int64(be.Uint16(b[12:])), int64(be.Uint16(b[14:])), int64(be.Uint32(b[36:]))
		if extraBytes > 64<<10 {
			return all, at - start, corrupt(place, "%d bytes of extra data", extraBytes)
		}
		rest := make([]byte, extraBytes+idBytes+nameBytes)
		if err := readInside(file, rest, at+40, place); err != nil {
			return all, at - start, err
		}
		s := Snapshot{
			ID: string(rest[extraBytes:][:idBytes]), Name: string(rest[extraBytes+idBytes:]),
			Time: time.Unix(int64(be.Uint32(b[16:])), int64(be.Uint32(b[20:]))), Size: info.Size,
			VMStateSize: uint64(be.Uint32(b[32:])),
			l1:          table{int64(be.Uint64(b[0:])), int64(be.Uint32(b[8:]))},
		}
		if extraBytes >= 8 {
			s.VMStateSize = be.Uint64(rest)
		}
		if extraBytes >= 16 {
			size := be.Uint64(rest[8:])
			if size >= 1<<63 {
				return all, at - start, corrupt(place, "a disk of %d bytes", size)
			}
			s.Size = int64(size) &^ (block.SectorSize - 1)
		}
		all = append(all, s)
		at += (40 + int64(len(rest)) + 7) &^ 7
	}
	return all, at - start, nil
}

// Snapshots lists the internal snapshots; see the function of that name.
func (i *Image) Snapshots() ([]Snapshot, error) { return Snapshots(i.file, i.info) }

// Snapshot returns the disk of an internal snapshot of this image. It is used like the image itself.
func (i *Image) Snapshot(s Snapshot) (*Disk, error) {
	place := fmt.Sprintf("snapshot %q", s.Name)
	reach := i.l2Entries << i.bits
	need := s.Size / reach
	if s.Size%reach != 0 {
		need++
	}
	switch t := s.l1; {
	case t.offset < 0 || t.offset%i.info.ClusterSize != 0:
		return nil, corrupt(place, "the offset 0x%x of its L1 table is invalid", uint64(t.offset))
	case t.entries*8 > maxL1Bytes || t.entries < need:
		return nil, corrupt(place, "an L1 table of %d entries for a disk of %d bytes", t.entries, s.Size)
	case t.offset > i.file.Size() || t.entries*8 > i.file.Size()-t.offset:
		return nil, corrupt(place, "its L1 table ends behind the end of the file")
	}
	return &Disk{image: i, l1: s.l1, size: s.Size, name: s.ID + " " + s.Name}, nil
}

// A Bitmap is a dirty bitmap that is stored in an image.
type Bitmap struct {
	Name        string
	Granularity int64 // bytes of the disk that a bit stands for
	InUse       bool  // a program had it open when it died: its content is wrong
	Auto        bool  // it records writes

	table table
}

// bitmapsExtension is where the bitmap directory is.
type bitmapsExtension struct {
	count, offset, bytes int64
	consistent           bool
}

// takeBitmaps takes the bitmaps extension over.
func (i *Info) takeBitmaps(e extensions, autoclear uint64) error {
	consistent := autoclear&autoclearBitmaps != 0
	if e.bitmaps == nil {
		return nil
	}
	if len(e.bitmaps) != 24 {
		if !consistent {
			return nil
		}
		return corrupt("bitmaps extension", "%d bytes, not 24", len(e.bitmaps))
	}
	be := binary.BigEndian
	b := bitmapsExtension{int64(be.Uint32(e.bitmaps)), int64(be.Uint64(e.bitmaps[16:])), int64(be.Uint64(e.bitmaps[8:])), consistent}
	if b.count == 0 && consistent {
		return corrupt("bitmaps extension", "no bitmaps")
	}
	i.header.bitmaps = b
	return nil
}

// Bitmaps lists the dirty bitmaps of the image in file, whose header is info. consistent is false where a program that
// knows no bitmaps changed the disk since they were written. What could be read before an error is returned with it.
func Bitmaps(file block.Device, info *Info) (all []Bitmap, consistent bool, err error) {
	x := info.header.bitmaps
	be := binary.BigEndian
	if x.count > 65535 || x.bytes < 0 || x.bytes > maxListBytes || x.offset < 0 {
		return nil, x.consistent, corrupt("bitmaps extension", "%d bitmaps in %d bytes at byte %d", x.count, x.bytes, x.offset)
	}
	for at, n := int64(0), int64(0); n < x.count; n++ {
		place := fmt.Sprintf("bitmap %d, image byte %d", n, x.offset+at)
		var b [24]byte
		if x.bytes-at < int64(len(b)) {
			return all, x.consistent, corrupt(place, "the directory of %d bytes ends before it", x.bytes)
		}
		if err := readInside(file, b[:], x.offset+at, place); err != nil {
			return all, x.consistent, err
		}
		nameBytes, extra := int64(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
		if b[17] < 9 || b[17] > 31 || nameBytes > maxName || extra > x.bytes-at-24 || nameBytes > x.bytes-at-24-extra {
			return all, x.consistent, corrupt(place, "granularity 2^%d, a name of %d bytes, %d bytes of extra data", b[17], nameBytes, extra)
		}
		name := make([]byte, nameBytes)
		if err := readInside(file, name, x.offset+at+24+extra, place); err != nil {
			return all, x.consistent, err
		}
		flags := be.Uint32(b[12:])
		t := table{int64(be.Uint64(b[:])), int64(be.Uint32(b[8:]))}
		all = append(all, Bitmap{string(name), 1 << b[17], flags&1 != 0, flags&2 != 0, t})
		at += (24 + extra + nameBytes + 7) &^ 7
	}
	return all, x.consistent, nil
}

// Bitmaps lists the dirty bitmaps; see the function of that name.
func (i *Image) Bitmaps() (all []Bitmap, consistent bool, err error) { return Bitmaps(i.file, i.info) }

// readInside reads what must be inside the file.
func readInside(file block.Device, p []byte, at int64, place string) error {
	if at < 0 || at > file.Size() || int64(len(p)) > file.Size()-at {
		return corrupt(place, "it ends behind the end of the file (byte %d)", file.Size())
	}
	if _, err := file.ReadAt(p, at); err != nil {
		return fmt.Errorf("%s: %w", place, err)
	}
	return nil
}
