package source

import (
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/qcow2"
)

// BackingFormat returns the format of a file that is to be the backing file of an overlay of a snapshot: its disk must have
// the size of the snapshot in bytes. It may be the origin itself, which was opened by originName.
func BackingFormat(path, originName string, origin *Disk, size int64) (string, error) {
	base, err := OpenWhole(path, block.Options{ReadOnly: true, Lock: block.LockShared})
	if err != nil {
		return "", err
	}
	defer base.Close()
	format, has := ondisk.RawFormat, base.Size()
	if same, err := isFile(base, originName); err != nil {
		return "", err
	} else if same { // the store records what its bytes are, whatever they look like
		format, has = origin.Format(), origin.Size()
	} else if c, err := image.Probe(base); err != nil {
		return "", block.WithPath(path, err)
	} else if c.Name == QCOW2 {
		info, err := qcow2.ReadInfo(base)
		if err != nil {
			return "", block.WithPath(path, err)
		}
		format, has = QCOW2, info.Size
	} else if err := (cowfile.OriginOptions{}).Check(base); err != nil {
		return "", block.WithPath(path, err)
	}
	if has != size {
		return "", fmt.Errorf("%s: a disk of %d bytes, the snapshot has %d: its content must be that of the origin", path, has, size)
	}
	return format, nil
}

// isFile reports whether a name is that of an open file.
func isFile(f *block.File, name string) (bool, error) {
	if !IsFile(name) {
		return false, nil
	}
	other, err := OpenWhole(name, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		return false, err
	}
	defer other.Close()
	return block.Same(f, other), nil
}
