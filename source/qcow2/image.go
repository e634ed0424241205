// Package qcow2 reads and writes disk images in QEMU's qcow2 format, versions 2 and 3 (docs/spec/qcow2.md).
//
//	img, err := qcow2.Open(file, qcow2.Options{})     // file is any block.Device
//	_, err = img.ReadAt(p, off)                       // the disk in the image, read-only
//	err = qcow2.Export(out, disk, qcow2.ExportOptions{})  // a new image of a disk
//
// An [Image] is a block.Device with extents. Reading needs no reference counts, so that images with wrong ones (the dirty
// bit) are read like others. Compressed clusters (deflate, zstd), zero clusters, subclusters, internal snapshots and
// external data files are read; encrypted images are refused.
//
// An image opens nothing else by itself: a backing file or an external data file that it names is supplied by the caller
// ([Options]), or the image is refused.
//
// # Guarantees
//
// Any bytes may stand in the file: a damaged image is an *ondisk.CorruptError with the place, memory is bounded (16 KiB
// pages of tables up to 8 MiB, decompressed clusters up to 8 MiB, and two clusters for each concurrent read), and a lookup
// has depth two, so that no loop is possible. Clusters that begin behind the end of the file are errors: the file is
// truncated.
//
// Reads may be concurrent. The file must not change meanwhile.
package qcow2

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
)

// Sizes of the caches in bytes.
const (
	tableCacheBytes   = 8 << 20
	clusterCacheBytes = 8 << 20
)

// Options supply what an image needs beside its own file. The caller closes the devices after the image's last use.
type Options struct {
	// Backing returns the device of the backing file. format is the name that the image records for it, or empty. Nil: an
	// image that names a backing file is refused.
	Backing func(name, format string) (block.Device, error)
	// Data returns the external data file; name may be empty. Nil: an image with such a file is refused.
	Data func(name string) (block.Device, error)
	// Strict refuses an image that is marked corrupt.
	Strict bool
}

// A NeedsFileError reports an image that needs another file, which was not supplied.
type NeedsFileError struct {
	Data   bool   // an external data file, not a backing file
	Name   string // by the image's word; may be empty
	Format string // of a backing file; may be empty
}

func (e *NeedsFileError) Error() string {
	if e.Data {
		return fmt.Sprintf("the image keeps its content in an external data file (%q), which is not opened by the image's word", e.Name)
	}
	return fmt.Sprintf("the image is laid over the backing file %q, which is not opened by the image's word", e.Name)
}

// ErrMarkedCorrupt reports an image whose corrupt bit is set.
var ErrMarkedCorrupt = errors.New("the image is marked corrupt")

// An Image is the disk in an image, in its present state.
type Image struct {
	Disk
	info       *Info
	file       block.Device
	content    block.Device // where the clusters are: file, or the external data file
	backing    block.Device // nil: none
	bits       uint         // log2 of the cluster size
	l2Entries  int64        // of one table
	entryBytes int64
	pageBytes  int64
	tables     *cache // pages of L1 and L2 tables, by their byte of the file
	clusters   *cache // decompressed clusters, by their L2 entries
}

// Open opens the image in file, which the caller closes after the image's last use.
//
// Errors: those of ReadInfo, ErrEncrypted, *NeedsFileError, ErrMarkedCorrupt, those of the functions in o.
func Open(file block.Device, o Options) (*Image, error) {
	info, err := ReadInfo(file)
	if err != nil {
		return nil, err
	}
	if info.Encryption != "" {
		return nil, fmt.Errorf("%w (%s)", ErrEncrypted, info.Encryption)
	}
	if info.Corrupt && o.Strict {
		return nil, ErrMarkedCorrupt
	}
	i := &Image{
		info: info, file: file, content: file, bits: info.header.clusterBits, entryBytes: 8,
		pageBytes: min(pageBytes, info.ClusterSize),
		tables:    newCache(tableCacheBytes), clusters: newCache(clusterCacheBytes),
	}
	if info.ExtendedL2 {
		i.entryBytes = 16
	}
	i.l2Entries = info.ClusterSize / i.entryBytes
	i.Disk = Disk{image: i, l1: info.header.l1, size: info.Size}
	if info.Size > 0 {
		if _, err := i.l1Entry(0); err != nil {
			return nil, err
		}
	}
	if info.ExternalData {
		if o.Data == nil {
			return nil, &NeedsFileError{Data: true, Name: info.DataFile}
		}
		if i.content, err = o.Data(info.DataFile); err != nil {
			return nil, err
		}
	}
	if info.Backing != "" {
		if o.Backing == nil {
			return nil, &NeedsFileError{Name: info.Backing, Format: info.BackingFormat}
		}
		if i.backing, err = o.Backing(info.Backing, info.BackingFormat); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// Info returns what the header says.
func (i *Image) Info() Info { return *i.info }

// metadata returns the page of a table that begins at byte at of the file; the table begins at byte start. What the end
// of the file cuts off reads as zeros; a table that begins behind it is an error.
func (i *Image) metadata(start, at int64, what string) ([]byte, error) {
	if size := i.file.Size(); start >= size {
		return nil, corrupt(what, "it begins at byte %d, the file ends at byte %d: is it truncated?", start, size)
	}
	return i.tables.get(at, func() ([]byte, error) {
		p := make([]byte, i.pageBytes)
		if err := readPadded(i.file, p, at, what); err != nil {
			return nil, err
		}
		return p, nil
	})
}
