// Package cowfile opens origins and COW devices by their paths, and makes COW files.
//
//	_, err := cowfile.Create("disk.img", "disk.cow", cowfile.Options{})
//	origin, err := cowfile.OpenRaw("disk.img", cowfile.OriginOptions{})
//	cow, err := cowfile.OpenDevice("disk.cow", block.Options{})
//
// Origins in other formats, over NBD, or inside a disk are opened by an [Opener]: package source has one.
//
// # Guarantees
//
//   - What is opened is locked as [block.Options] say (docs/decisions/0001-locks.md) until it is closed; what others use is
//     block.ErrInUse.
//   - A COW file that Create makes has its name only when the store in it is complete and durable. When Create fails no file
//     is left that was not there before, and a file or device that holds something is not changed without
//     Options.Overwrite. CreateUnsynced leaves durability to the caller.
//   - An origin and a COW device that share a byte are refused (snapshot.ErrSameDevice), whatever they are called.
//   - Errors name the path and wrap their cause: errors.Is finds [ErrSize], [ErrOnlyRead], [ErrOtherVersion] and those of
//     packages block, image, ondisk and store.
//   - Functions may be called concurrently; of two that create the same file one fails. Devices are those of package block.
package cowfile

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// OpenDevice opens a path as a device. A sealed layer (store.Store.Seal) is opened for reading only: else it is
// ondisk.ErrSealed.
func OpenDevice(path string, o block.Options) (*block.File, error) {
	f, err := block.Open(path, o)
	if err != nil || o.ReadOnly {
		return f, block.WithPath(path, err)
	}
	if err := store.CheckUnsealed(f); err != nil {
		f.Close()
		return nil, block.WithPath(path, err)
	}
	return f, nil
}

// CheckDifferent refuses two paths of one disk before the second is opened: otherwise the error would be that the disk
// is in use, by the first. A COW device that does not exist is different.
func CheckDifferent(originPath, cowPath string) error {
	o, err := OpenDevice(originPath, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		return err
	}
	defer o.Close()
	return CheckCOW(rawOrigin{o}, originPath, cowPath)
}

// CheckCOW is CheckDifferent for an origin that is open.
func CheckCOW(origin Origin, originName, cowPath string) error {
	c, err := OpenDevice(cowPath, block.Options{ReadOnly: true, Lock: block.LockNone})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.Close()
	if origin.Overlaps(c) {
		return fmt.Errorf("%s: %w (%s)", cowPath, snapshot.ErrSameDevice, originName)
	}
	return nil
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
