package source

import (
	"errors"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
)

// Sides are an origin and the devices of one or two stores over it, for reading.
type Sides struct {
	Origin *Disk // of a snapshot volume the part of its origin that it shows
	COWs   []*Disk
	Names  []string // by which the COWs are called in messages: of a snapshot volume its address

	closers []io.Closer
}

// Close closes everything.
func (s *Sides) Close() error {
	var errs []error
	for _, c := range s.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// OpenSides opens what names stand for: ORIGIN COW, ORIGIN COW COW2, or the addresses of one or two snapshot volumes of one origin.
// One name that is no snapshot volume is lvm.ErrNoSnapshot.
func OpenSides(names []string, o Options) (*Sides, error) {
	o.ReadOnly = true
	s := &Sides{}
	if err := s.open(names, o); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Sides) open(names []string, o Options) error {
	first, err := s.addSnapshot(names[0], o)
	switch {
	case errors.Is(err, lvm.ErrNoSnapshot) && len(names) > 1:
		return s.openPair(names, o)
	case err != nil || len(names) == 1:
		return err
	case len(names) > 2:
		return fmt.Errorf("%s is a snapshot with its origin: only one other snapshot may follow", names[0])
	}
	second, err := s.addSnapshot(names[1], o)
	if err != nil {
		return err
	}
	if first.Group.ID != second.Group.ID || first.Origin != second.Origin {
		return fmt.Errorf("%s is a snapshot of %s/%s, %s one of %s/%s: they have no origin in common",
			names[0], first.Group.Name, first.Origin, names[1], second.Group.Name, second.Origin)
	}
	return nil
}

// addSnapshot opens a snapshot volume; the disks of its physical volumes are opened once. Of two the longer origin is kept: it grew in between.
func (s *Sides) addSnapshot(name string, o Options) (*lvm.Volume, error) {
	a, err := address.Parse(name)
	if err != nil {
		return nil, err
	}
	if !a.MayBeSnapshot() {
		return nil, block.WithPath(name, lvm.ErrNoSnapshot)
	}
	d := &Disk{name: a.String()}
	s.closers = append(s.closers, d)
	whole, err := d.openWhole(a.Path, o)
	if err != nil {
		return nil, err
	}
	if err := d.openPVs(o); err != nil {
		return nil, err
	}
	if err := d.checkUnused(a, whole, o); err != nil {
		return nil, err
	}
	b, err := address.OpenSnapshotParts(a, whole, d.further...)
	if err != nil {
		return nil, err
	}
	if err := o.checkComplete(name, b.COW); err != nil {
		return nil, err
	}
	d.Forward = block.NewForward(b.Origin)
	s.COWs = append(s.COWs, &Disk{Forward: block.NewForward(b.COW), name: a.Store().String(), format: d.format, bottom: d.bottom, files: d.files, onlyRead: d.onlyRead})
	s.Names = append(s.Names, name)
	if s.Origin == nil || d.Size() > s.Origin.Size() {
		s.Origin = d
	}
	return b.Volume, nil
}

// openPair opens an origin and its stores.
func (s *Sides) openPair(names []string, o Options) (err error) {
	for _, cow := range names[1:] {
		if err := CheckDifferent(names[0], cow); err != nil {
			return err
		}
	}
	if s.Origin, err = OpenOriginOf(names[0], names[1], o); err != nil {
		return err
	}
	s.closers = append(s.closers, s.Origin)
	for _, name := range names[1:] {
		cow, err := OpenStore(name, o)
		if err != nil {
			return err
		}
		s.closers, s.COWs, s.Names = append(s.closers, cow), append(s.COWs, cow), append(s.Names, name)
		if err := o.checkComplete(names[0], cow); err != nil {
			return err
		}
		if o.Raw {
			continue
		}
		if err := CheckFormat(s.Origin, name, cow); err != nil {
			return err
		}
	}
	return nil
}
