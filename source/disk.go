package source

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/source/lvm"
)

// FurtherPVs returns the further disks that Options named.
func (d *Disk) FurtherPVs() []lvm.Disk { return d.further }

// Name returns the name that the disk was opened by.
func (d *Disk) Name() string { return d.name }

// Format returns the format of the file or export: ondisk.RawFormat or QCOW2; of a disk that is fetched with its version
// (ondisk.OriginVersion).
func (d *Disk) Format() string { return d.format }

// ReadOnly reports whether the disk can't be written to as it is.
func (d *Disk) ReadOnly() bool { return d.onlyRead != "" || d.bottom.ReadOnly() }

// AllowWrites is that of block.File, for the disk and those with further physical volumes, all or none; cowfile.ErrOnlyRead where
// one is only read.
func (d *Disk) AllowWrites() error {
	if d.onlyRead != "" {
		return fmt.Errorf("%s: %s: %w", d.name, d.onlyRead, cowfile.ErrOnlyRead)
	}
	if err := d.bottom.AllowWrites(); err != nil {
		return err
	}
	for _, pv := range d.pvs {
		if err := pv.AllowWrites(); err != nil {
			return errors.Join(err, d.DenyWrites())
		}
	}
	return nil
}

// DenyWrites is that of block.File, likewise.
func (d *Disk) DenyWrites() error {
	if d.onlyRead != "" {
		return nil
	}
	errs := []error{d.bottom.DenyWrites()}
	for _, pv := range d.pvs {
		errs = append(errs, pv.DenyWrites())
	}
	return errors.Join(errs...)
}

// CheckUnused is that of block.File, for every file that is open.
func (d *Disk) CheckUnused() error {
	for _, f := range d.files {
		if err := f.CheckUnused(); err != nil {
			return err
		}
	}
	return nil
}

// Overlaps reports whether a change of f can change the disk.
func (d *Disk) Overlaps(f *block.File) bool {
	for _, file := range d.files {
		if block.Overlap(file, f) {
			return true
		}
	}
	return false
}

// HasWriter reports whether another program has a file of the disk open for writing.
func (d *Disk) HasWriter() bool { return d.bottom != nil && block.HasWriter(d.bottom.Path()) }

// Close closes everything that was opened, what is on top first.
func (d *Disk) Close() error {
	var errs []error
	for i := range d.closers {
		errs = append(errs, d.closers[len(d.closers)-1-i].Close())
	}
	d.closers = nil
	return errors.Join(errs...)
}
