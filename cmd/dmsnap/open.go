package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// about puts the path in front of an error that does not name it as the place.
func about(path string, err error) error {
	if err == nil || strings.Contains(" "+err.Error(), " "+path+":") {
		return err
	}
	return fmt.Errorf("%s: %w", path, err)
}

// openDevice opens a path as a device; the error names the path.
func openDevice(path string, o block.Options) (*block.File, error) {
	f, err := block.Open(path, o)
	return f, about(path, err)
}

// openOrigin opens an origin, which checkOrigin must accept.
func openOrigin(path string, o block.Options, raw bool) (*block.File, error) {
	f, err := openDevice(path, o)
	if err != nil {
		return nil, err
	}
	if err := checkOrigin(path, f, raw); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// addRaw adds the flag of every verb that takes an origin.
func addRaw(f *pflag.FlagSet, raw *bool) {
	f.BoolVar(raw, "raw", false, "ORIGIN's own bytes are the disk, although it looks like an image of another format")
}

// checkOrigin refuses an origin whose last bytes no chunk would have, and, unless raw, one that is known to be no raw
// disk.
func checkOrigin(path string, origin block.Device, raw bool) error {
	if !raw {
		err := image.CheckRaw(origin)
		var notRaw *image.NotRawError
		if errors.As(err, &notRaw) {
			err = fmt.Errorf("%w; --raw uses its bytes as they are", err)
		}
		if err != nil {
			return about(path, err)
		}
	}
	if origin.Size()%ondisk.SectorSize != 0 {
		return fmt.Errorf("%s: size of %d bytes is not a whole number of %d-byte sectors", path, origin.Size(), ondisk.SectorSize)
	}
	return nil
}

// checkDifferent refuses one disk under two names before the second is opened: the lock of the first
// would otherwise be found and blamed.
func checkDifferent(originPath, cowPath string) error {
	o, err := block.Open(originPath, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		return about(originPath, err)
	}
	defer o.Close()
	c, err := block.Open(cowPath, block.Options{ReadOnly: true, Lock: block.LockNone})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it is going to be made, or missed by whoever opens it
	}
	if err != nil {
		return about(cowPath, err)
	}
	defer c.Close()
	if block.Same(o, c) {
		return fmt.Errorf("%s: %w (%s)", cowPath, snapshot.ErrSameDevice, originPath)
	}
	return nil
}

// openPair opens an origin and a COW device that holds a store. Both are closed by the closer.
func openPair(originPath, cowPath string, o block.Options, raw bool) (origin, cow *block.File, both io.Closer, err error) {
	if err := checkDifferent(originPath, cowPath); err != nil {
		return nil, nil, nil, err
	}
	if origin, err = openOrigin(originPath, o, raw); err != nil {
		return nil, nil, nil, err
	}
	if cow, err = openDevice(cowPath, o); err != nil {
		origin.Close()
		return nil, nil, nil, err
	}
	if err = checkStore(cowPath, cow); err != nil {
		closers{cow, origin}.Close()
		return nil, nil, nil, err
	}
	return origin, cow, closers{cow, origin}, nil
}

// checkStore refuses a COW device whose header is not one of a store that can be read.
func checkStore(path string, cow block.Device) error {
	h, err := store.ReadHeader(cow)
	if err == nil {
		err = h.Check()
	}
	if errors.Is(err, ondisk.ErrNoStore) {
		err = fmt.Errorf("%w; make one with dmsnap create", err)
	}
	return about(path, err)
}

// closers closes all, in order.
type closers []io.Closer

func (cs closers) Close() error {
	var errs []error
	for _, c := range cs {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
