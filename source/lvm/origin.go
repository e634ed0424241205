package lvm

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/mapped"
	"github.com/dmsnap/dmsnap/store"
)

// An Origin is a volume with all its snapshots, as the devices that they consist of. A program that writes to one of the
// devices needs them all: a write to the origin has to be preserved in every snapshot.
type Origin struct {
	*Volume
	Dev       *mapped.Device // its own bytes; see mapped.Device.Writable
	Snapshots []Snapshot     // in the order of the metadata; also those whose names LVM does not allow
}

// A Snapshot is a snapshot of an Origin.
type Snapshot struct {
	Name     string
	Size     int64          // bytes that it shows
	COW      *mapped.Device // nil: Err says why
	Chunk    uint32         // sectors, by the text: for a store that was never used. The header counts in all others
	Unused   bool           // the COW volume holds no store yet: what it shows is the origin
	Invalid  bool           // the store is marked invalid
	Merging  bool           // it is to be merged, or partly is
	ReadOnly bool           // what it shows can't be written, by its status; origin writes are preserved all the same
	Err      error          // why it can't be opened
}

// CheckWritable returns why nothing may be written to the origin: because it can only be read, or because a snapshot could not
// preserve what it shows.
func (o *Origin) CheckWritable() error {
	if err := o.checkWritable(o.Dev); err != nil {
		return fmt.Errorf("logical volume %s/%s %w", o.Group.Name, o.Name, err)
	}
	for _, s := range o.Snapshots {
		err := s.Err
		if err == nil {
			err = o.checkWritable(s.COW)
		}
		if err != nil {
			return fmt.Errorf("logical volume %s/%s can't be written, because nothing could be preserved in its snapshot %q: %w", o.Group.Name, o.Name, s.Name, err)
		}
	}
	return nil
}

func (o *Origin) checkWritable(dev *mapped.Device) error {
	switch {
	case dev.Writable():
		return nil
	case len(o.Group.Attributes) > 0:
		return fmt.Errorf("can only be read: its group is %s", strings.Join(o.Group.Attributes, ", "))
	}
	return errors.New("can only be read")
}

// OpenOrigin returns the volume with its snapshots, of a snapshot its origin. The error is that of the origin and wraps
// ErrUnreadable; those of the snapshots are in them.
func (v *Volume) OpenOrigin() (*Origin, error) {
	g, under := v.Group, v.v
	if under.snapshot != nil {
		under = under.snapshot.origin
	}
	i := slices.IndexFunc(g.Volumes, func(o *Volume) bool { return o.v == under })
	if i < 0 {
		return nil, fmt.Errorf("logical volume %s/%s %w: its origin %q has no name that LVM allows", g.Name, v.Name, ErrUnreadable, under.name)
	}
	o := &Origin{Volume: g.Volumes[i]}
	dev, err := o.Volume.Open(Real)
	if err != nil {
		return nil, err
	}
	o.Dev = dev.(*mapped.Device)
	for _, t := range under.snapshots {
		o.Snapshots = append(o.Snapshots, g.openSnapshot(t))
	}
	return o, nil
}

// openSnapshot opens what is below a snapshot.
func (g *Group) openSnapshot(t *snapshotSegment) Snapshot {
	s := Snapshot{Name: t.cow.name, Size: g.viewSize(t), Merging: t.merging, ReadOnly: !t.cow.writable}
	s.Err = func() error {
		_, cow, err := g.parts(t)
		if err != nil {
			return err
		}
		s.COW = g.protect(cow, t.cow.part)
		h, err := store.ReadHeader(cow)
		switch {
		case err != nil:
			return err
		case h.Magic == 0:
			s.Unused = true
			if t.chunk < 0 || t.chunk > ondisk.MaxChunkSectors {
				return fmt.Errorf("chunk_size is %d sectors", t.chunk)
			}
			s.Chunk = uint32(t.chunk)
			_, err := ondisk.NewLayout(s.Chunk)
			return err
		}
		s.Invalid = h.Valid == 0
		return h.Check()
	}()
	return s
}
