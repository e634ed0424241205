package source

import (
	"fmt"
	"os"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/remote"
)

// isPart reports whether a name is that of a part of a disk.
func isPart(name string) bool {
	a, err := address.Parse(name)
	return err == nil && !a.Plain()
}

// CheckDifferent refuses two names of one disk. Two parts of a disk are different.
func CheckDifferent(originName, cowName string) error {
	origin, err := address.Parse(originName)
	if err != nil {
		return err
	}
	cow, err := address.Parse(cowName)
	if err != nil {
		return err
	}
	cow = cow.Store()
	if isURI(origin.Path) || isURI(cow.Path) || !origin.Plain() && !cow.Plain() {
		if origin == cow {
			return fmt.Errorf("%s is origin and COW device", originName)
		}
		return nil
	}
	return cowfile.CheckDifferent(origin.Path, cow.Path)
}

// CheckWritable refuses a name whose disk is of a kind that is only read: cowfile.ErrOnlyRead. Other errors are left to opening it.
func CheckWritable(name string) error {
	path, why := Path(name), ""
	if isURI(path) {
		why = kindOfURI(path)
	} else if f, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockNone}); err == nil {
		if c, err := image.Probe(f); err == nil && c.Name == QCOW2 {
			why = imageKind
		}
		f.Close()
	}
	if why == "" {
		return nil
	}
	return fmt.Errorf("%s: %s: %w", name, why, cowfile.ErrOnlyRead)
}

// Path returns the file or the URI of a name.
func Path(name string) string {
	if a, err := address.Parse(name); err == nil {
		return a.Path
	}
	return name
}

// Paths returns the files or the URIs of names.
func Paths(names []string) []string {
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = Path(name)
	}
	return paths
}

// IsFile reports whether a name is that of a file or a block device as a whole.
func IsFile(name string) bool {
	a, err := address.Parse(name)
	return err == nil && a.Plain() && !isURI(a.Path)
}

// isURI reports whether a path is a URI of a disk. A file that exists by this name is meant itself.
func isURI(path string) bool {
	scheme, _, is := strings.Cut(path, "://")
	if !is || scheme != "nbd" && scheme != "nbds" && scheme != "nbd+unix" && scheme != "nbds+unix" && !remote.IsReference(path) && !remote.IsFile(path) {
		return false
	}
	_, err := os.Lstat(path)
	return err != nil
}
