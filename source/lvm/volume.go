package lvm

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/mapped"
	"github.com/dmsnap/dmsnap/store"
)

// A Layer is one of the devices of a logical volume.
type Layer string

const (
	// Active is the volume as it is when it is active: of a snapshot what it shows, of an origin into which a snapshot is to
	// be merged the result of that.
	Active Layer = ""
	// Real is an origin below its snapshots.
	Real Layer = "real"
	// COW is the COW volume of a snapshot: its exception store.
	COW Layer = "cow"
)

// A Volume is a logical volume.
type Volume struct {
	Group      *Group
	Name, ID   string
	Type       string // "linear", "striped", "mirror", "raid1", "snapshot", or the word of the metadata
	Size       int64  // bytes, of Active
	COWSize    int64  // bytes of the COW volume, of a snapshot
	Origin     string // of a snapshot
	Merging    bool   // a snapshot that is to be merged, or its origin
	IsOrigin   bool   // has snapshots
	Visible    bool   // to the user; not a part of another volume
	ReadOnly   bool   // by its status
	Readable   bool   // whether Active can be opened
	Reason     string // why not
	ChunkBytes int64  // of a snapshot, by the text; the header of the store counts

	v *volume
}

// fill makes the list of volumes.
func (g *Group) fill() {
	if g.Err == nil {
		g.meta.refuseOverlaps()
	}
	for _, v := range g.meta.volumes {
		if v.joins != nil || checkName(v.name) != nil {
			continue
		}
		out := &Volume{Group: g, Name: v.name, ID: v.id, Type: v.kind(), Size: v.extents * g.ExtentSize, IsOrigin: len(v.snapshots) > 0,
			Merging: v.merging() != nil, Visible: v.visible, ReadOnly: !v.writable, v: v}
		if t := v.snapshot; t != nil {
			out.Type, out.Origin, out.Merging = "snapshot", t.origin.name, t.merging
			out.Visible = !t.merging
			out.COWSize, out.Size, out.ChunkBytes = out.Size, g.viewSize(t), t.chunk*sectorSize
		}
		if err := out.check(); err != nil {
			out.Reason = err.Error()
		} else {
			out.Readable = true
		}
		g.Volumes = append(g.Volumes, out)
	}
	slices.SortFunc(g.Volumes, func(a, b *Volume) int { return strings.Compare(a.Name, b.Name) })
}

// kind names the type of a volume: that of its first segment which is not linear.
func (v *volume) kind() string {
	kind := "linear"
	for _, s := range v.segments {
		switch {
		case s.kind != "striped" && s.kind != "linear":
			return s.kind
		case s.kind == "striped":
			if k, _, _ := s.number("stripe_count"); k > 1 {
				kind = "striped"
			}
		}
	}
	return kind
}

// viewSize is the size of what a snapshot shows: while it is to be merged, that of its origin (docs/spec/lvm2.md §8.3).
func (g *Group) viewSize(t *snapshotSegment) int64 {
	if t.merging {
		return t.origin.extents * g.ExtentSize
	}
	if g.ExtentSize > 0 && t.extents > (1<<63-1)/g.ExtentSize {
		return 0 // longer than any origin: refused by check
	}
	return t.extents * g.ExtentSize
}

// data returns the device of the volume's own segments.
func (g *Group) data(v *volume) (*mapped.Device, error) {
	if g.Err != nil {
		return nil, g.Err
	}
	r := g.resolve(v, 0)
	return r.dev, r.err
}

// shown returns the snapshot whose exceptions Active shows; nil: none.
func (v *volume) shown() *snapshotSegment {
	if v.snapshot != nil {
		return v.snapshot
	}
	return v.merging()
}

// check says why Active can't be opened, without loading the store of a snapshot.
func (v *Volume) check() error {
	t := v.v.shown()
	if t == nil {
		_, err := v.Group.data(v.v)
		return err
	}
	_, cow, err := v.Group.parts(t)
	if err != nil {
		return err
	}
	h, err := store.ReadHeader(cow)
	switch {
	case err != nil:
		return fmt.Errorf("COW volume %q: %w", t.cow.name, err)
	case h.Magic == 0:
		return nil
	}
	if err := h.Check(); err != nil {
		return fmt.Errorf("COW volume %q: %w", t.cow.name, err)
	}
	if h.Valid == 0 {
		return fmt.Errorf("COW volume %q: %w", t.cow.name, store.ErrInvalid)
	}
	if t.chunk != 0 && int64(h.ChunkSectors) != t.chunk {
		v.Group.warn("snapshot %q: chunks of %d sectors by the metadata, of %d by the store, which counts", t.cow.name, t.chunk, h.ChunkSectors)
	}
	return nil
}

// parts returns the devices of a snapshot: the part of the origin that it shows, and the COW volume.
func (g *Group) parts(t *snapshotSegment) (origin, cow *mapped.Device, err error) {
	if cow, err = g.data(t.cow); err != nil {
		return nil, nil, fmt.Errorf("COW volume %q: %w", t.cow.name, err)
	}
	if origin, err = g.data(t.origin); err != nil {
		return nil, nil, fmt.Errorf("origin %q: %w", t.origin.name, err)
	}
	size := g.viewSize(t)
	if size <= 0 || size > origin.Size() {
		return nil, nil, fmt.Errorf("it is %d extents long, and its origin %q %d", t.extents, t.origin.name, t.origin.extents)
	}
	if size == origin.Size() {
		return origin, cow, nil
	}
	origin, err = mapped.New("", []mapped.Target{{Length: size, Areas: []mapped.Area{{Dev: origin}}}})
	return origin, cow, err
}

// Open returns a layer of the volume as a device, which does not own the disks. What may be written is in the package comment;
// the other devices refuse changes with block.ErrReadOnly. While a view is open, nothing may write to what is below it.
//
// Real is there for every volume that is no snapshot, COW for snapshots. The error wraps ErrUnreadable and says why; the
// errors of package store (ErrInvalid) are in it.
func (v *Volume) Open(layer Layer) (block.Device, error) {
	dev, err := v.open(layer)
	if err != nil {
		return nil, fmt.Errorf("logical volume %s/%s %w: %w", v.Group.Name, v.Name, ErrUnreadable, err)
	}
	return dev, nil
}

func (v *Volume) open(layer Layer) (block.Device, error) {
	g, t := v.Group, v.v.shown()
	switch layer {
	case Active:
		if t != nil {
			return g.view(t)
		}
		dev, err := g.data(v.v)
		if err != nil {
			return nil, err
		}
		return g.protect(dev, len(v.v.snapshots) > 0 || !v.Visible || v.v.part), nil
	case Real:
		if v.v.snapshot != nil {
			return nil, errors.New("it is a snapshot, no origin")
		}
	case COW:
		if v.v.snapshot == nil {
			return nil, errors.New("it is no snapshot, so it has no COW volume")
		}
	default:
		return nil, fmt.Errorf("there is no layer %q", string(layer))
	}
	dev, err := g.data(v.v)
	if err != nil {
		return nil, err
	}
	// A write to a part of another volume changes that one.
	return g.protect(dev, v.v.part || !v.Visible && v.v.snapshot == nil && len(v.v.snapshots) == 0), nil
}

// protect makes a device read-only where it must be, or where another host may use the group.
func (g *Group) protect(dev *mapped.Device, must bool) *mapped.Device {
	if must || len(g.Attributes) > 0 || g.meta.locked {
		return dev.ReadOnly()
	}
	return dev
}

// view returns what a snapshot shows. A COW volume whose magic is zero was never used: it shows its origin.
func (g *Group) view(t *snapshotSegment) (block.Device, error) {
	origin, cow, err := g.parts(t)
	if err != nil {
		return nil, err
	}
	st, err := store.OpenToRead(cow)
	if err != nil && !errors.Is(err, ondisk.ErrNoStore) {
		return nil, fmt.Errorf("COW volume %q: %w", t.cow.name, err)
	}
	view, err := store.NewView(origin, st)
	if err != nil {
		return nil, fmt.Errorf("COW volume %q: %w", t.cow.name, err)
	}
	return view, nil
}

// OpenSnapshotParts returns what a snapshot is made of: the part of its origin that it shows, and its COW volume, both for reading.
// The error wraps ErrUnreadable, or ErrNoSnapshot. A store that is invalid or damaged is no error.
func (v *Volume) OpenSnapshotParts() (origin, cow block.Device, err error) {
	t := v.v.snapshot
	if t == nil {
		return nil, nil, fmt.Errorf("logical volume %s/%s: %w", v.Group.Name, v.Name, ErrNoSnapshot)
	}
	o, c, err := v.Group.parts(t)
	if err != nil {
		return nil, nil, fmt.Errorf("logical volume %s/%s %w: %w", v.Group.Name, v.Name, ErrUnreadable, err)
	}
	return o.ReadOnly(), c.ReadOnly(), nil
}
