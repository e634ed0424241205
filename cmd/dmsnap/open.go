package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/store"
)

// about prefixes an error with the path, unless it has it.
func about(path string, err error) error { return block.WithPath(path, err) }

// openDevice opens a path as a device; the error names the path.
func openDevice(path string, o block.Options) (*block.File, error) {
	return cowfile.OpenDevice(path, o)
}

// An openDisk is a device that was opened by an address.
type openDisk interface {
	block.Device
	io.Closer
}

// A partOfDisk is a partition or a logical volume of a file that it owns.
type partOfDisk struct {
	block.Forward
	io.Closer
}

// openAddress opens an address for reading; as a store: of a snapshot volume its COW volume. The error names the address.
// Of a disk that the kernel uses itself, by a mount or as part of an active volume group, a part is refused unless o has
// block.LockShared.
func openAddress(text string, o block.Options, asStore bool) (openDisk, error) {
	a, err := address.Parse(text)
	if err != nil {
		return nil, err
	}
	if asStore {
		a = a.Store()
	}
	f, err := openDevice(a.Path, o)
	if err != nil {
		return nil, err
	}
	if a.Plain() {
		return f, nil
	}
	dev, err := openPart(a, f, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return partOfDisk{block.NewForward(dev), f}, nil
}

// openPart opens what a names on f.
func openPart(a address.Address, f *block.File, o block.Options) (block.Device, error) {
	if o.Lock != block.LockShared {
		if err := f.CheckUnused(); err != nil {
			return nil, about(a.Path, err)
		}
	}
	if err := advise(image.CheckRaw(f)); err != nil {
		return nil, about(a.Path, err)
	}
	return address.Open(a, f)
}

// fileOf is the file of an address, or the text itself where it is none.
func fileOf(text string) string {
	if a, err := address.Parse(text); err == nil {
		return a.Path
	}
	return text
}

// filesOf are the files of addresses.
func filesOf(texts []string) []string {
	files := make([]string, len(texts))
	for i, text := range texts {
		files[i] = fileOf(text)
	}
	return files
}

// openOrigin opens an origin, which checkOrigin must accept.
func openOrigin(path string, o block.Options, raw bool) (*block.File, error) {
	f, err := cowfile.OpenOrigin(path, o, raw)
	return f, advise(err)
}

// addRaw adds the flag of every verb that takes an origin.
func addRaw(f *pflag.FlagSet, raw *bool) {
	f.BoolVar(raw, "raw", false, "use the bytes of ORIGIN as the disk, even if it looks like an image of another format")
}

// checkOrigin refuses an origin whose last bytes are in no chunk and, unless raw, one that is known not to be a raw disk.
func checkOrigin(path string, origin block.Device, raw bool) error {
	return advise(cowfile.CheckOrigin(path, origin, raw))
}

// checkDifferent refuses two paths of one disk. Two parts of a disk are different.
func checkDifferent(originPath, cowPath string) error {
	origin, err := address.Parse(originPath)
	if err != nil {
		return err
	}
	cow, err := address.Parse(cowPath)
	if err != nil {
		return err
	}
	if cow = cow.Store(); !origin.Plain() && !cow.Plain() {
		if origin == cow {
			return fmt.Errorf("%s is origin and COW device", originPath)
		}
		return nil
	}
	originPath, cowPath = origin.Path, cow.Path
	return cowfile.CheckDifferent(originPath, cowPath)
}

// openPair opens an origin and a COW device that holds a store. Both are closed by the closer.
func openPair(originPath, cowPath string, o block.Options, raw bool) (origin, cow *block.File, both io.Closer, err error) {
	if origin, cow, err = cowfile.OpenPair(originPath, cowPath, o, raw); err != nil {
		return nil, nil, nil, advise(err)
	}
	return origin, cow, closers{cow, origin}, nil
}

// checkStore refuses a COW device whose header is not one of a store that can be read.
func checkStore(path string, cow block.Device) error { return advise(cowfile.CheckStore(path, cow)) }

// advise adds the remedy, a verb or a flag, to an error.
func advise(err error) error {
	var notRaw *image.NotRawError
	var notEmpty *image.NotEmptyError
	switch {
	case errors.Is(err, merge.ErrUnfinished):
		return fmt.Errorf("%w; --force goes on all the same", err)
	case errors.Is(err, lvm.ErrActive):
		return fmt.Errorf("%w; deactivate it first (vgchange -an)", err)
	case errors.Is(err, ondisk.ErrNoStore):
		return fmt.Errorf("%w; create one with dmsnap create", err)
	case errors.As(err, &notRaw):
		return fmt.Errorf("%w; --raw uses its bytes as the disk", err)
	case errors.Is(err, store.ErrExists):
		return fmt.Errorf("%w; --force creates a new one over it", err)
	case errors.As(err, &notEmpty):
		return fmt.Errorf("%w; --force overwrites it", err)
	}
	return err
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
