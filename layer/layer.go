// Package layer has the format in which disks are kept in registries and object stores: a description, and for each layer a
// data blob and an index blob. It does no network I/O.
//
//	l, err := layer.Write(ctx, data, index, size, produce)      // a layer: what produce emits, compressed side by side
//	d := &layer.Description{Version: layer.Version, Size: size, Index: l.Index, Layers: []layer.Layer{l}}
//	tree, err := layer.NewTree(d.Index, d.Size, d.Layers)       // the index, of which only the needed pages are loaded
//	run, err := tree.Find(off, load)                            // which frame has the byte, or how far zeros reach
//
// The disk is divided into units of 64 KiB. The data blob of a layer has at most one frame a unit: the bytes of that unit that
// the layer has. The index says which bytes these are. Its pages form a tree of digests whose root is in the description, so
// that each page is verified alone. Besides the index of each layer there is one index of all layers together, which readers use:
// a read costs the same whatever the number of layers.
//
// docs/layers.md has the bytes.
//
// # Guarantees
//
//   - Everything that is read is verified by digest, then validated; errors name the page or the frame. No input allocates more
//     than one unit or one page.
//   - A [Tree] may be used concurrently. [Write] uses GOMAXPROCS workers, each with one unit in memory, and its output depends on
//     the input alone.
package layer

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// Version is that of the format.
const Version = 1

// Sizes of the format, in bytes.
const (
	UnitBytes = 64 << 10
	PageBytes = 4096

	sector = 512
)

// Bounds on what a description may say.
const (
	// MaxDescription bounds a description, in bytes.
	MaxDescription = 256 << 10
	// MaxLayers bounds the layers of a disk.
	MaxLayers = 256

	maxSize    = 1 << 56 // of a disk, and of a blob
	maxEntries = 1 << 40
)

// Media types of the description and the blobs.
const (
	MediaDisk        = "application/vnd.dmsnap.disk.v1"
	MediaDescription = "application/vnd.dmsnap.disk.description.v1+json"
	MediaData        = "application/vnd.dmsnap.disk.data.v1+zstd"
	MediaIndex       = "application/vnd.dmsnap.disk.index.v1"
)

// ErrCorrupt reports bytes that are not of the format, or do not have the digest that they must have.
var ErrCorrupt = errors.New("corrupt")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// A Digest is a SHA-256. As text it is "sha256:" and 64 hexadecimal digits.
type Digest [sha256.Size]byte

// DigestOf returns the digest of p.
func DigestOf(p []byte) Digest { return sha256.Sum256(p) }

// String returns the digest as text.
func (d Digest) String() string { return "sha256:" + d.Hex() }

// Hex returns the 64 digits.
func (d Digest) Hex() string { return hex.EncodeToString(d[:]) }

// MarshalText returns the digest as text.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads the digest from text.
func (d *Digest) UnmarshalText(text []byte) error {
	digits, is := strings.CutPrefix(string(text), "sha256:")
	b, err := hex.DecodeString(digits)
	if !is || err != nil || len(b) != len(d) || strings.ToLower(digits) != digits {
		return corrupt("digest %.80q", text)
	}
	copy(d[:], b)
	return nil
}

// A Blob is a sequence of bytes that is known by its digest.
type Blob struct {
	Digest Digest `json:"digest"`
	Size   int64  `json:"size"` // bytes
}

// An Index is the blob of an index.
type Index struct {
	Blob
	Root    Digest `json:"root"` // of its last page
	Entries int64  `json:"entries"`
}

// A Layer is a data blob and its index.
type Layer struct {
	Data  Blob  `json:"data"`
	Index Index `json:"index"`
	// ChunkSectors is the chunk size of the store that the layer was made of; 0: it is a whole disk.
	ChunkSectors uint32 `json:"chunk_sectors,omitempty"`
}

// A Description describes a disk: the first layer is the base, each following one is over those before it.
type Description struct {
	Version int     `json:"version"`
	Size    int64   `json:"size"`  // of the disk in bytes
	Index   Index   `json:"index"` // of all layers; of a single one it is its own
	Layers  []Layer `json:"layers"`
}

// Encode returns the description as JSON. The digest of that is the identity of the disk.
func (d *Description) Encode() ([]byte, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	return json.Marshal(d)
}

// ParseDescription reads a description.
func ParseDescription(text []byte) (*Description, error) {
	if len(text) > MaxDescription {
		return nil, corrupt("a description of %d bytes", len(text))
	}
	d := &Description{}
	if err := json.Unmarshal(text, d); err != nil {
		if errors.Is(err, ErrCorrupt) {
			return nil, err
		}
		return nil, corrupt("the description is no JSON of its form")
	}
	return d, d.check()
}

func (d *Description) check() error {
	switch {
	case d.Version != Version:
		return corrupt("a description of version %d", d.Version)
	case d.Size <= 0 || d.Size%sector != 0 || d.Size > maxSize:
		return corrupt("a disk of %d bytes", d.Size)
	case len(d.Layers) == 0 || len(d.Layers) > MaxLayers:
		return corrupt("%d layers", len(d.Layers))
	case len(d.Layers) == 1 && d.Index != d.Layers[0].Index:
		return corrupt("the index of a single layer is not that of the disk")
	}
	if err := d.Index.check(); err != nil {
		return err
	}
	for i, l := range d.Layers {
		if l.Data.Size < int64(len(dataStart)) || l.Data.Size > maxSize {
			return corrupt("layer %d: a data blob of %d bytes", i, l.Data.Size)
		}
		if s := l.ChunkSectors; (s == 0) != (i == 0) || s&(s-1) != 0 {
			return corrupt("layer %d: chunks of %d sectors", i, s)
		}
		if err := l.Index.check(); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return nil
}

func (x Index) check() error {
	if x.Entries < 0 || x.Entries > maxEntries {
		return corrupt("an index of %d entries", x.Entries)
	}
	if _, pages := geometry(x.Entries); x.Size != pages*PageBytes {
		return corrupt("an index of %d bytes for %d entries", x.Size, x.Entries)
	}
	return nil
}
