package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Limits of the format and of QEMU (docs/spec/qcow2.md §2.1).
const (
	magic           = 0x514649fb
	minClusterBits  = 9
	maxClusterBits  = 21
	maxL1Bytes      = 32 << 20
	maxRefTable     = 8 << 20
	maxSnapshots    = 65536
	maxName         = 1023
	v2HeaderBytes   = 72
	v3HeaderBytes   = 104
	maxFormatName   = 15
	featureNameSize = 48
)

// Incompatible and autoclear feature bits.
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	incompatKnown       = incompatDirty | incompatCorrupt | incompatDataFile | incompatCompression | incompatExtendedL2

	compatLazyRefcounts = 1 << 0

	autoclearBitmaps = 1 << 0
	autoclearRawData = 1 << 1
)

// Types of header extensions.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
)

// A Compression is the algorithm of an image's compressed clusters.
type Compression uint8

const (
	Deflate Compression = iota
	Zstd
)

func (c Compression) String() string {
	if c == Zstd {
		return "zstd"
	}
	return "deflate"
}

// Info is what the header of an image says. Names are as they are in the file: quote them in messages.
type Info struct {
	Version       int
	Size          int64 // of the virtual disk in bytes, rounded down to whole sectors
	ClusterSize   int64 // bytes
	Compression   Compression
	ExtendedL2    bool   // clusters have 32 subclusters
	Backing       string // name of the backing file; empty: there is none
	BackingFormat string // empty: not recorded
	ExternalData  bool   // the content of the disk is in another file
	DataFile      string // name of that file; empty: not recorded
	Encryption    string // "AES" or "LUKS"; empty: not encrypted
	Dirty         bool   // reference counts may be wrong; reading is not affected
	Corrupt       bool   // a program found the metadata damaged and marked the image
	LazyRefcounts bool
	Snapshots     int // internal snapshots that the header announces

	header header
}

// header is the part of Info that only this package needs.
type header struct {
	clusterBits     uint
	l1              table
	counts          table // the reference count table
	countOrder      uint  // log2 of the bits of a reference count
	encryption      byteRange
	snapshotsOffset int64
	bitmaps         bitmapsExtension
	rawData         bool
}

// A table is an array of 8-byte entries in the file.
type table struct {
	offset  int64 // bytes
	entries int64
}

// A byteRange is a run of bytes of the file, as found.
type byteRange struct{ offset, bytes int64 }

// ErrEncrypted reports an image whose content is encrypted.
var ErrEncrypted = errors.New("the image is encrypted")

// ErrUnsupportedFeature reports an image with a version or a feature that this package does not know.
var ErrUnsupportedFeature = errors.New("unsupported image feature")

func corrupt(place, format string, a ...any) error {
	return &ondisk.CorruptError{Place: place, What: fmt.Sprintf(format, a...)}
}

// ReadInfo reads the header of the image in file. It opens nothing else and reads one cluster at most.
//
// Errors: an *ondisk.CorruptError for a header that breaks the format, ErrUnsupportedFeature, failed reads. An encrypted
// image is described, not refused.
func ReadInfo(file block.Device) (*Info, error) {
	size := file.Size()
	if size < v2HeaderBytes {
		return nil, corrupt("header", "the file has %d bytes, fewer than a header", size)
	}
	first := make([]byte, min(size, 112))
	if _, err := file.ReadAt(first, 0); err != nil {
		return nil, fmt.Errorf("read the header: %w", err)
	}
	if m := binary.BigEndian.Uint32(first); m != magic {
		return nil, corrupt("header, byte 0", "magic is 0x%08x, not 0x%08x: not a qcow2 image", m, magic)
	}
	version := binary.BigEndian.Uint32(first[4:])
	if version != 2 && version != 3 {
		return nil, fmt.Errorf("header, byte 4: version %d: %w", version, ErrUnsupportedFeature)
	}
	if version == 3 && size < v3HeaderBytes {
		return nil, corrupt("header", "the file has %d bytes, fewer than a version 3 header", size)
	}
	bits := binary.BigEndian.Uint32(first[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return nil, corrupt("header, byte 20", "cluster_bits is %d, not %d to %d", bits, minClusterBits, maxClusterBits)
	}
	b := make([]byte, 1<<bits) // what the file lacks reads as zeros
	if _, err := file.ReadAt(b[:min(size, 1<<bits)], 0); err != nil {
		return nil, fmt.Errorf("read the header: %w", err)
	}
	return parseHeader(b)
}

// parseHeader parses the first cluster.
func parseHeader(b []byte) (*Info, error) {
	be := binary.BigEndian
	i := &Info{Version: int(be.Uint32(b[4:])), ClusterSize: int64(len(b))}
	h := &i.header
	h.clusterBits = uint(be.Uint32(b[20:]))
	length := uint32(v2HeaderBytes)
	h.countOrder = 4
	var incompat, compat, autoclear uint64
	if i.Version == 3 {
		length = be.Uint32(b[100:])
		if length < v3HeaderBytes || length%8 != 0 || int64(length) > i.ClusterSize {
			return nil, corrupt("header, byte 100", "header_length is %d", length)
		}
		incompat, compat, autoclear = be.Uint64(b[72:]), be.Uint64(b[80:]), be.Uint64(b[88:])
		order := be.Uint32(b[96:])
		if order > 6 {
			return nil, corrupt("header, byte 96", "refcount_order is %d, not 0 to 6", order)
		}
		h.countOrder = uint(order)
	}
	if err := i.tables(b); err != nil {
		return nil, err
	}
	e, err := parseExtensions(b, int64(length))
	if err != nil {
		return nil, err
	}
	if unknown := incompat &^ incompatKnown; unknown != 0 {
		return nil, fmt.Errorf("header, byte 72: incompatible features %s: %w", e.featureNames(unknown), ErrUnsupportedFeature)
	}
	i.Dirty, i.Corrupt = incompat&incompatDirty != 0, incompat&incompatCorrupt != 0
	i.ExternalData, i.ExtendedL2 = incompat&incompatDataFile != 0, incompat&incompatExtendedL2 != 0
	i.LazyRefcounts, h.rawData = compat&compatLazyRefcounts != 0, autoclear&autoclearRawData != 0
	compression := byte(0)
	if length > v3HeaderBytes {
		compression = b[104]
	}
	if (compression != 0) != (incompat&incompatCompression != 0) {
		return nil, corrupt("header, byte 104", "compression type %d does not agree with the feature bits", compression)
	}
	if compression > byte(Zstd) {
		return nil, fmt.Errorf("header, byte 104: compression type %d: %w", compression, ErrUnsupportedFeature)
	}
	i.Compression = Compression(compression)
	if i.ExtendedL2 && h.clusterBits < 14 {
		return nil, corrupt("header, byte 20", "clusters of %d bytes are too small for subclusters", i.ClusterSize)
	}
	if h.rawData && !i.ExternalData {
		return nil, corrupt("header, byte 88", "raw external data without an external data file")
	}
	switch crypt := be.Uint32(b[32:]); crypt {
	case 0:
	case 1:
		i.Encryption = "AES"
	case 2:
		i.Encryption = "LUKS"
	default:
		return nil, fmt.Errorf("header, byte 32: encryption method %d: %w", crypt, ErrUnsupportedFeature)
	}
	if e.encryption != nil && i.Encryption != "LUKS" {
		return nil, corrupt("header extensions", "an encryption header in an image without LUKS")
	}
	if len(e.encryption) >= 16 {
		h.encryption = byteRange{int64(be.Uint64(e.encryption)), int64(be.Uint64(e.encryption[8:]))}
	}
	if err := i.backing(b, e); err != nil {
		return nil, err
	}
	if i.ExternalData {
		i.DataFile = e.dataFile
	}
	return i, i.takeBitmaps(e, autoclear)
}

// tables checks size and the places of the tables.
func (i *Info) tables(b []byte) error {
	be, h := binary.BigEndian, &i.header
	size := be.Uint64(b[24:])
	if size >= 1<<63 {
		return corrupt("header, byte 24", "size is %d bytes", size)
	}
	i.Size = int64(size) &^ (block.SectorSize - 1)
	h.l1 = table{int64(be.Uint64(b[40:])), int64(be.Uint32(b[36:]))}
	if h.l1.entries*8 > maxL1Bytes {
		return corrupt("header, byte 36", "an L1 table of %d entries is too large", h.l1.entries)
	}
	entry := int64(8)
	if i.Version == 3 && be.Uint64(b[72:])&incompatExtendedL2 != 0 {
		entry = 16
	}
	reach := i.ClusterSize / entry << h.clusterBits // bytes of the disk that an L1 entry stands for
	if need := (size + uint64(reach) - 1) / uint64(reach); uint64(h.l1.entries) < need {
		return corrupt("header, byte 36", "an L1 table of %d entries is too small for a disk of %d bytes, which needs %d", h.l1.entries, size, need)
	}
	refOffset, refBytes := int64(be.Uint64(b[48:])), int64(be.Uint32(b[56:]))<<h.clusterBits
	if refBytes > maxRefTable || refBytes == 0 {
		return corrupt("header, byte 56", "a reference count table of %d bytes", refBytes)
	}
	h.counts = table{refOffset, refBytes / 8}
	h.snapshotsOffset = int64(be.Uint64(b[64:]))
	n := be.Uint32(b[60:])
	if n > maxSnapshots {
		return corrupt("header, byte 60", "%d snapshots are more than %d", n, maxSnapshots)
	}
	i.Snapshots = int(n)
	for _, t := range []struct {
		at             int
		name           string
		offset, length int64
	}{
		{40, "L1 table", h.l1.offset, h.l1.entries * 8},
		{48, "reference count table", refOffset, refBytes},
		{64, "snapshot table", h.snapshotsOffset, 0},
	} {
		if t.offset < 0 || t.offset%i.ClusterSize != 0 || t.offset+t.length < 0 {
			return corrupt(fmt.Sprintf("header, byte %d", t.at), "the offset 0x%x of the %s is invalid", uint64(t.offset), t.name)
		}
	}
	return nil
}

// backing takes the name of the backing file over.
func (i *Info) backing(b []byte, e extensions) error {
	offset, length := binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[16:])
	if offset == 0 {
		return nil
	}
	if offset > uint64(len(b)) || length > maxName || uint64(length) > uint64(len(b))-offset {
		return corrupt("header, byte 8", "a backing file name of %d bytes at byte %d", length, offset)
	}
	if length == 0 {
		return nil
	}
	i.Backing, i.BackingFormat = string(b[offset:][:length]), e.backingFormat
	if strings.ContainsRune(i.Backing, 0) {
		return corrupt(fmt.Sprintf("header, byte %d", offset), "a NUL in the backing file name %q", i.Backing)
	}
	if i.header.rawData {
		return corrupt("header, byte 8", "a backing file, and raw external data")
	}
	return nil
}

// extensions are the header extensions that this package uses.
type extensions struct {
	backingFormat, dataFile string
	features                []byte
	bitmaps                 []byte // nil: absent
	encryption              []byte // nil: absent
}

// parseExtensions parses the extensions of the first cluster b, which begin at byte at.
func parseExtensions(b []byte, at int64) (e extensions, err error) {
	end := int64(len(b))
	if offset := binary.BigEndian.Uint64(b[8:]); offset != 0 && offset < uint64(end) {
		end = int64(offset)
	}
	seen := map[uint32]bool{}
	for end-at >= 8 {
		kind, length := binary.BigEndian.Uint32(b[at:]), int64(binary.BigEndian.Uint32(b[at+4:]))
		place := fmt.Sprintf("header extension 0x%08x, byte %d", kind, at)
		if length > end-at-8 {
			return e, corrupt(place, "%d bytes do not fit in the header", length)
		}
		if kind == extEnd {
			break
		}
		data := b[at+8:][:length]
		switch kind {
		case extBackingFormat, extDataFile:
			if seen[kind] {
				return e, corrupt(place, "stands there twice")
			}
			if kind == extBackingFormat && len(data) > maxFormatName {
				return e, corrupt(place, "a format name of %d bytes", len(data))
			}
			if strings.ContainsRune(string(data), 0) {
				return e, corrupt(place, "a NUL in the name %q", data)
			}
			if kind == extBackingFormat {
				e.backingFormat = string(data)
			} else {
				e.dataFile = string(data)
			}
		case extFeatureNames:
			e.features = data
		case extBitmaps:
			e.bitmaps = data
		case extEncryption:
			e.encryption = data
		}
		seen[kind] = true
		at += 8 + (length+7)&^7
	}
	return e, nil
}

// featureNames names incompatible feature bits, from the image's own table where that has them.
func (e extensions) featureNames(bits uint64) string {
	var names []string
	for bit := range 64 {
		if bits>>bit&1 == 0 {
			continue
		}
		name := fmt.Sprintf("bit %d", bit)
		for t := e.features; len(t) >= featureNameSize; t = t[featureNameSize:] {
			if t[0] == 0 && int(t[1]) == bit {
				name += fmt.Sprintf(" (%q)", strings.TrimRight(string(t[2:featureNameSize]), "\x00"))
				break
			}
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}
