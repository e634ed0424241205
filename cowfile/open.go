// Package cowfile opens origins and COW devices by their paths, and makes COW files.
//
//	_, err := cowfile.Create("disk.img", "disk.cow", cowfile.Options{})
//	origin, cow, err := cowfile.OpenPair("disk.img", "disk.cow", block.Options{}, false)
//
// What it opens is locked as block.Options say (docs/decisions/0001-locks.md). A COW file that Create makes has its
// name only when the store in it is complete and durable. Every error names the path.
package cowfile

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// OpenDevice opens a path as a device.
func OpenDevice(path string, o block.Options) (*block.File, error) {
	f, err := block.Open(path, o)
	return f, block.WithPath(path, err)
}

// OpenOrigin opens an origin, which CheckOrigin must accept.
func OpenOrigin(path string, o block.Options, raw bool) (*block.File, error) {
	f, err := OpenDevice(path, o)
	if err != nil {
		return nil, err
	}
	if err := CheckOrigin(path, f, raw); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// CheckOrigin refuses an origin that does not end at a sector boundary, and, unless raw, one that is known not to be a
// raw disk, with an *image.NotRawError.
func CheckOrigin(path string, origin block.Device, raw bool) error {
	if !raw {
		if err := image.CheckRaw(origin); err != nil {
			return block.WithPath(path, err)
		}
	}
	if origin.Size()%ondisk.SectorSize != 0 {
		return fmt.Errorf("%s: size of %d bytes is not a whole number of %d-byte sectors", path, origin.Size(), ondisk.SectorSize)
	}
	return nil
}

// CheckDifferent refuses two paths of one disk before the second is opened: otherwise the error would be that the disk
// is in use, by the first. A COW device that does not exist is different.
func CheckDifferent(originPath, cowPath string) error {
	o, err := OpenDevice(originPath, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		return err
	}
	defer o.Close()
	c, err := OpenDevice(cowPath, block.Options{ReadOnly: true, Lock: block.LockNone})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.Close()
	if block.Overlap(o, c) {
		return fmt.Errorf("%s: %w (%s)", cowPath, snapshot.ErrSameDevice, originPath)
	}
	return nil
}

// OpenPair opens an origin, which CheckOrigin must accept, and a COW device that holds a store.
func OpenPair(originPath, cowPath string, o block.Options, raw bool) (origin, cow *block.File, err error) {
	if err := CheckDifferent(originPath, cowPath); err != nil {
		return nil, nil, err
	}
	if origin, err = OpenOrigin(originPath, o, raw); err != nil {
		return nil, nil, err
	}
	if cow, err = OpenDevice(cowPath, o); err != nil {
		origin.Close()
		return nil, nil, err
	}
	if err = CheckStore(cowPath, cow); err != nil {
		cow.Close()
		origin.Close()
		return nil, nil, err
	}
	return origin, cow, nil
}

// CheckStore refuses a COW device whose header is not one of a store that can be read: ondisk.ErrNoStore for one
// that is zero, else a *ondisk.CorruptError.
func CheckStore(path string, cow block.Device) error {
	h, err := store.ReadHeader(cow)
	if err == nil {
		err = h.Check()
	}
	return block.WithPath(path, err)
}
