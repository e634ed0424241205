package qcow2

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/dmsnap/dmsnap/block"
)

// maxChain is the largest number of images over each other.
const maxChain = 64

// FileOptions say what OpenFile may open beside the image.
type FileOptions struct {
	// Follow opens the backing files that the images name, as far as their names are harmless: relative, without
	// scheme and "..", a regular file below the folder of the image that names it.
	Follow bool
	// Backing is the path of the image's backing file, whatever the image calls it. Backing files of that one need Follow.
	Backing string
	// Data is the path of the image's external data file.
	Data string
	// Lock is the lock on each file.
	Lock block.LockMode
	// Strict refuses images that are marked corrupt.
	Strict bool
}

// A File is an image that was opened with its chain of backing files.
type File struct {
	*Image
	top   block.Device  // where the image is, if that was open
	files []*block.File // that it opened, the image first
}

// ErrUnsafeName reports a backing file name that is not followed.
var ErrUnsafeName = errors.New("this name of a backing file is not followed")

// ErrNoFormat reports an image that does not record the format of its backing file. It is not guessed: a guest can
// write the beginning of an image into a raw disk.
var ErrNoFormat = errors.New("the image does not record the format of its backing file")

// OpenFile opens the image at path for reading, with its backing files as far as o allows. Names in the image are never
// opened otherwise. Errors name the path of the image that they are about.
func OpenFile(path string, o FileOptions) (*File, error) {
	f := &File{}
	dev, err := f.openFile(path, o.Lock)
	if err != nil {
		return nil, err
	}
	return f.finish(dev, path, o)
}

// OpenOn is OpenFile of an image in a device that is open. path is where backing files are looked for; empty: names in the
// image are not followed. The caller closes dev after the image's last use; Close closes the other files.
func OpenOn(dev block.Device, path string, o FileOptions) (*File, error) {
	return (&File{top: dev}).finish(dev, path, o)
}

// finish opens the image in dev.
func (f *File) finish(dev block.Device, path string, o FileOptions) (*File, error) {
	image, err := f.open(dev, path, o)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	f.Image = image
	return f, nil
}

// Files returns the files that it opened: its chain of backing files, and for OpenFile the image first.
func (f *File) Files() []*block.File { return f.files }

// Close closes the files that it opened.
func (f *File) Close() error {
	var errs []error
	for _, file := range f.files {
		errs = append(errs, file.Close())
	}
	return errors.Join(errs...)
}

// open opens one image of the chain, which is in dev.
func (f *File) open(dev block.Device, path string, o FileOptions) (*Image, error) {
	options := Options{Strict: o.Strict}
	if o.Data != "" {
		options.Data = func(string) (block.Device, error) { return f.openFile(o.Data, o.Lock) }
	}
	if o.Follow && path != "" || o.Backing != "" {
		options.Backing = func(name, format string) (block.Device, error) {
			at := o.Backing
			if at == "" {
				var err error
				if at, err = Beside(path, name); err != nil {
					return nil, err
				}
			}
			backing := FileOptions{Follow: o.Follow, Lock: o.Lock, Strict: o.Strict}
			switch format {
			case "raw":
				return f.openFile(at, o.Lock)
			case "qcow2":
				dev, err := f.openFile(at, o.Lock)
				if err != nil {
					return nil, err
				}
				return f.open(dev, at, backing)
			case "":
				return nil, fmt.Errorf("backing file %q: %w", name, ErrNoFormat)
			}
			return nil, fmt.Errorf("backing file %q: format %q: %w", name, format, ErrUnsupportedFeature)
		}
	}
	image, err := Open(dev, options)
	if err != nil {
		return nil, block.WithPath(path, err)
	}
	return image, nil
}

// openFile opens one file, which must not be open yet: a chain with a loop has no end.
func (f *File) openFile(path string, lock block.LockMode) (*block.File, error) {
	if len(f.files) >= maxChain {
		return nil, fmt.Errorf("%s: more than %d images over each other", path, maxChain)
	}
	dev, err := block.Open(path, block.Options{ReadOnly: true, Lock: lock})
	if err != nil {
		return nil, err
	}
	loop := f.top != nil && block.Same(f.top, dev)
	for _, other := range f.files {
		loop = loop || block.Same(other, dev)
	}
	if loop {
		return nil, errors.Join(fmt.Errorf("%s: is open already in this chain of images: the chain is a loop", path), dev.Close())
	}
	f.files = append(f.files, dev)
	return dev, nil
}

// Beside returns the path of a backing file that the image at path names: a regular file below the image's folder.
// Errors: ErrUnsafeName for any other name, and for a symbolic link that leads out of the folder; that of the
// operating system.
func Beside(path, name string) (string, error) {
	refuse := func(why string) error { return fmt.Errorf("backing file %q: %w: %s", name, ErrUnsafeName, why) }
	before, _, _ := strings.Cut(name, "/")
	switch {
	case name == "" || strings.ContainsRune(name, 0):
		return "", refuse("it is no name")
	case strings.ContainsRune(before, ':'):
		return "", refuse("it has a scheme")
	case filepath.IsAbs(name):
		return "", refuse("it is absolute")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", refuse(`it has a ".."`)
		}
	}
	folder, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	at, err := filepath.EvalSymlinks(filepath.Join(folder, name))
	if err != nil {
		return "", fmt.Errorf("backing file %q: %w", name, err)
	}
	if inside, err := filepath.Rel(folder, at); err != nil || !filepath.IsLocal(inside) {
		return "", refuse("a symbolic link leads out of the image's folder")
	}
	info, err := os.Stat(at)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", refuse("it is not a regular file")
	}
	return at, nil
}
