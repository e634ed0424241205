package cowfile

import (
	"errors"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// ErrOnlyRead reports an origin that was to be written to, and is of a kind that is only read.
var ErrOnlyRead = errors.New("it can only be read")

// ErrOtherVersion reports a store that is for another version of its origin.
var ErrOtherVersion = errors.New("the origin is another version of the disk than the one that the store was made for")

// An Origin is a disk that was opened as the origin of snapshots.
type Origin interface {
	block.Device
	io.Closer
	// Format is that of the file below: ondisk.RawFormat, or what the labels of its stores record.
	Format() string
	// ReadOnly, AllowWrites, DenyWrites and CheckUnused are as those of block.File. Of an origin that is only read,
	// AllowWrites fails with ErrOnlyRead.
	ReadOnly() bool
	AllowWrites() error
	DenyWrites() error
	CheckUnused() error
	// Overlaps reports whether a change of the file can change the origin.
	Overlaps(f *block.File) bool
}

// IsFetched reports whether reads of an origin may wait for a server, which what was read once does not: it has a method of that name
// that says so.
func IsFetched(o Origin) bool {
	f, is := o.(interface{ IsFetched() bool })
	return is && f.IsFetched()
}

// OriginOptions say how an origin is opened.
type OriginOptions struct {
	block.Options
	// Raw: the bytes are the disk, whatever they look like.
	Raw bool
	// Format is that of the stores' labels (store.OriginFormat), or empty: it is found out. Without a label it is raw, also
	// when the disk begins like an image: a guest can write that.
	Format string
}

// An Opener opens an origin by its name. An error names the origin.
type Opener func(name string, o OriginOptions) (Origin, error)

// OpenRaw is the Opener of raw disks: files and block devices. Another format is an *image.NotRawError.
func OpenRaw(path string, o OriginOptions) (Origin, error) {
	f, err := OpenDevice(path, o.Options)
	if err != nil {
		return nil, err
	}
	if err = o.CheckRaw(f); err == nil && !o.Raw && o.Format != "" && o.Format != ondisk.RawFormat {
		err = fmt.Errorf("the store is for an origin of format %s, which is not opened", o.Format)
	}
	if err != nil {
		f.Close()
		return nil, block.WithPath(path, err)
	}
	return rawOrigin{f}, nil
}

type rawOrigin struct{ *block.File }

func (rawOrigin) Format() string                { return ondisk.RawFormat }
func (o rawOrigin) Overlaps(f *block.File) bool { return block.Overlap(o.File, f) }

// CheckRaw refuses an origin that is known to be no raw disk, with an *image.NotRawError, unless o says that it is one.
func (o OriginOptions) CheckRaw(origin block.Device) error {
	if o.Raw {
		return nil
	}
	err := image.CheckRaw(origin)
	var other *image.NotRawError
	if o.Format == ondisk.RawFormat && errors.As(err, &other) && other.Kind.Name == "qcow2" {
		return nil
	}
	return err
}

// Check refuses an origin as CheckSize and CheckRaw do.
func (o OriginOptions) Check(origin block.Device) error {
	if err := CheckSize(origin); err != nil {
		return err
	}
	return o.CheckRaw(origin)
}

// CheckSize refuses an origin whose last bytes are in no sector.
func CheckSize(origin block.Device) error {
	if size := origin.Size(); size%ondisk.SectorSize != 0 {
		return fmt.Errorf("size of %d bytes is not a whole number of %d-byte sectors", size, ondisk.SectorSize)
	}
	return nil
}

// CheckFormat returns an error unless the label of the store on cow has the format of origin. part says that the origin is a
// part of a disk: a store without a label is for it whatever the format of the disk is.
func CheckFormat(origin Origin, cow block.Device, part bool) error {
	label, err := store.OriginFormat(cow)
	if part && label == ondisk.RawFormat {
		return err
	}
	if err == nil && label != origin.Format() {
		if name, version := ondisk.CutOriginVersion(label); version != "" {
			if other, _ := ondisk.CutOriginVersion(origin.Format()); name == other {
				return fmt.Errorf("%w: the store is for version %s", ErrOtherVersion, version)
			}
		}
		err = fmt.Errorf("the store is for an origin of format %s, and the origin was opened as %s", label, origin.Format())
	}
	return err
}

// FormatOf returns the format of the origin by the labels of those COW devices that hold a store; empty: none does. It
// is an error when they differ. Devices that can't be read are ignored; opening them fails later.
func FormatOf(cowPaths ...string) (format string, err error) {
	for _, path := range cowPaths {
		f, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockNone})
		if err != nil {
			continue
		}
		label := ""
		if h, err := store.ReadHeader(f); err == nil && h.Check() == nil {
			label, err = store.OriginFormat(f)
			if err != nil {
				f.Close()
				return "", block.WithPath(path, err)
			}
		}
		f.Close()
		if format != "" && label != "" && label != format {
			return "", fmt.Errorf("%s: the store is for an origin of format %s, the others are for %s", path, label, format)
		}
		if label != "" {
			format = label
		}
	}
	return format, nil
}
