package ondisk

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// Labels are in the first sector of a store, after the header, in bytes that the format leaves unused and the
// kernel does not read (docs/spec/dm-snapshot.md §2.2). The sector is replaced whole or not at all. A kernel that marks
// the store invalid overwrites them with zeros.

// A SealedLabel says that a store is a sealed layer: disks are made of it, and it is never written again.
//
//	192     magic, 16 bytes
//	208     zeros, 16
//	224     CRC-32C of the 32 bytes before it, 4
type SealedLabel struct{}

const (
	sealedLabelAt    = 192
	sealedLabelMagic = "dmsnap sealed 1\x00"
)

// ErrSealed reports a change of a store that has a SealedLabel.
var ErrSealed = errors.New("the store is a sealed layer, which is never written")

// Encode puts t in a store's first sector.
func (t SealedLabel) Encode(sector []byte) {
	encodeID(sector[sealedLabelAt:], sealedLabelMagic, [16]byte{})
}

// CheckUnsealed returns ErrSealed when the first sector of a device is that of a store with a SealedLabel.
func CheckUnsealed(sector []byte) error {
	if _, sealed := decodeID(sector[sealedLabelAt:], sealedLabelMagic); sealed && DecodeHeader(sector).Magic == Magic {
		return ErrSealed
	}
	return nil
}

// An UndoLabel links a store that is merged with the undo store that reverts the merge. Both stores carry it.
//
//	256     magic, 16 bytes
//	272     id, 16 bytes, random
//	288     exceptions that there were to merge, 8 bytes
//	296     size of the origin in bytes, 8
//	304     1: the store was merged to its end; 2: it is the undo store; 8
//	312     CRC-32C of the 56 bytes before it, 4
type UndoLabel struct {
	ID         [16]byte
	Exceptions uint64
	OriginSize int64
	Merged     bool
	Undo       bool
}

const (
	undoLabelMagic  = "dmsnap undo id 1"
	undoLabelAt     = 256
	undoLabelBytes  = 60
	undoLabelMerged = 1
	undoLabelUndo   = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encode puts t in a store's first sector.
func (t UndoLabel) Encode(sector []byte) {
	b := sector[undoLabelAt:][:undoLabelBytes]
	copy(b, undoLabelMagic)
	copy(b[16:], t.ID[:])
	binary.LittleEndian.PutUint64(b[32:], t.Exceptions)
	binary.LittleEndian.PutUint64(b[40:], uint64(t.OriginSize))
	flags := uint64(0)
	if t.Merged {
		flags |= undoLabelMerged
	}
	if t.Undo {
		flags |= undoLabelUndo
	}
	binary.LittleEndian.PutUint64(b[48:], flags)
	binary.LittleEndian.PutUint32(b[56:], crc32.Checksum(b[:56], castagnoli))
}

// DecodeUndoLabel reads the label of a store's first sector; ok is false where there is none.
func DecodeUndoLabel(sector []byte) (t UndoLabel, ok bool) {
	b := sector[undoLabelAt:][:undoLabelBytes]
	if string(b[:16]) != undoLabelMagic || binary.LittleEndian.Uint32(b[56:]) != crc32.Checksum(b[:56], castagnoli) {
		return t, false
	}
	copy(t.ID[:], b[16:])
	t.Exceptions = binary.LittleEndian.Uint64(b[32:])
	t.OriginSize = int64(binary.LittleEndian.Uint64(b[40:]))
	flags := binary.LittleEndian.Uint64(b[48:])
	t.Merged, t.Undo = flags&undoLabelMerged != 0, flags&undoLabelUndo != 0
	return t, true
}

// A ChangeLabel links a store that is changed in place with the undo file that reverts the change, which has the same
// id.
//
//	320     magic, 16 bytes
//	336     id, 16 bytes, random
//	352     CRC-32C of the 32 bytes before it, 4
type ChangeLabel struct{ ID [16]byte }

// Position of a ChangeLabel in the first sector of a store.
const (
	ChangeLabelAt    = 320
	ChangeLabelBytes = 36

	changeLabelMagic = "dmsnap undo id 2"
)

// Encode puts t in a store's first sector.
func (t ChangeLabel) Encode(sector []byte) { encodeID(sector[ChangeLabelAt:], changeLabelMagic, t.ID) }

// DecodeChangeLabel reads the label of a store's first sector; ok is false where there is none.
func DecodeChangeLabel(sector []byte) (t ChangeLabel, ok bool) {
	t.ID, ok = decodeID(sector[ChangeLabelAt:], changeLabelMagic)
	return t, ok
}

// A MergeLabel links a store with the side file of the origin that it is being merged into, which has the same id.
//
//	384     magic, 16 bytes
//	400     id, 16 bytes, random
//	416     CRC-32C of the 32 bytes before it, 4
type MergeLabel struct{ ID [16]byte }

const (
	mergeLabelAt    = 384
	mergeLabelMagic = "dmsnap merge id1"
)

// Encode puts t in a store's first sector.
func (t MergeLabel) Encode(sector []byte) { encodeID(sector[mergeLabelAt:], mergeLabelMagic, t.ID) }

// DecodeMergeLabel reads the label of a store's first sector; ok is false where there is none.
func DecodeMergeLabel(sector []byte) (t MergeLabel, ok bool) {
	t.ID, ok = decodeID(sector[mergeLabelAt:], mergeLabelMagic)
	return t, ok
}

// An OriginLabel records the format of the origin that a store is for, where that is not raw: without it the store's
// origin is a raw disk, whatever its bytes look like by now. It is kept when the store is marked invalid.
//
//	448     magic, 16 bytes
//	464     name of the format, 16 bytes, filled up with zeros
//	480     CRC-32C of the 32 bytes before it, 4
//
// Of an origin that is one version of something remote it records which: Format is "FORMAT@" and 48 hexadecimal digits
// (OriginVersion), the name is "FORMAT+id", and there follow
//
//	484     the version, 24 bytes
//	508     CRC-32C of the 60 bytes before it, 4
//
// Programs that don't know versions refuse the name of the format.
type OriginLabel struct{ Format string }

// RawFormat is the format of an origin whose bytes are the disk.
const RawFormat = "raw"

const (
	originLabelAt    = 448
	originLabelMagic = "dmsnap origin 1\x00"
	originVersion    = "+id" // after the name of the format

	originVersionBytes = 24
)

// OriginVersion returns the format of an origin that is the version with this digest.
func OriginVersion(format string, digest [32]byte) string {
	return fmt.Sprintf("%s@%x", format, digest[:originVersionBytes])
}

// CutOriginVersion returns the format without a version, and the version; empty: there is none.
func CutOriginVersion(format string) (name, version string) {
	name, version, _ = strings.Cut(format, "@")
	return name, version
}

// Encode puts t in a store's first sector. A format of RawFormat, or none, puts nothing there. It panics when the name is
// longer than 16 bytes, or the version is none.
func (t OriginLabel) Encode(sector []byte) {
	if t.Format == "" || t.Format == RawFormat {
		return
	}
	name, version := CutOriginVersion(t.Format)
	if version != "" {
		name += originVersion
	}
	var id [16]byte
	if copy(id[:], name) < len(name) {
		panic("ondisk: name of an origin's format: " + t.Format)
	}
	b := sector[originLabelAt:]
	encodeID(b, originLabelMagic, id)
	if version == "" {
		return
	}
	digest, err := hex.DecodeString(version)
	if err != nil || len(digest) != originVersionBytes {
		panic("ondisk: version of an origin: " + t.Format)
	}
	copy(b[36:], digest)
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
}

// DecodeOriginLabel reads the label of a store's first sector: RawFormat where there is none. A damaged one is a
// *CorruptError, since the store shows wrong content over an origin that is read in another format.
func DecodeOriginLabel(sector []byte) (OriginLabel, error) {
	b := sector[originLabelAt:]
	if string(b[:16]) != originLabelMagic {
		return OriginLabel{RawFormat}, nil
	}
	id, ok := decodeID(b, originLabelMagic)
	name, versioned := strings.CutSuffix(strings.TrimRight(string(id[:]), "\x00"), originVersion)
	if versioned {
		ok = ok && binary.LittleEndian.Uint32(b[60:]) == crc32.Checksum(b[:60], castagnoli)
	}
	if !ok || name == "" || strings.Contains(name, "@") {
		return OriginLabel{}, &CorruptError{Place: fmt.Sprintf("header, byte 0x%x", originLabelAt), What: "the label with the origin's format is damaged"}
	}
	if versioned {
		name = fmt.Sprintf("%s@%x", name, b[36:60])
	}
	return OriginLabel{name}, nil
}

// encodeID writes a label that consists of a magic and an id.
func encodeID(b []byte, magic string, id [16]byte) {
	copy(b, magic)
	copy(b[16:], id[:])
	binary.LittleEndian.PutUint32(b[32:], crc32.Checksum(b[:32], castagnoli))
}

// decodeID reads what encodeID wrote.
func decodeID(b []byte, magic string) (id [16]byte, ok bool) {
	if string(b[:16]) != magic || binary.LittleEndian.Uint32(b[32:]) != crc32.Checksum(b[:32], castagnoli) {
		return id, false
	}
	copy(id[:], b[16:])
	return id, true
}
