package offline

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/store"
)

// Grow makes a COW file size bytes long. A file that is longer already is refused.
func Grow(path string, size int64) error {
	cow, err := source.OpenWhole(path, block.Options{})
	if err != nil {
		return err
	}
	if err = cowfile.CheckStore(path, cow); err == nil {
		// A file that was truncated must not get its size back: zeros would take the place of the lost content.
		_, err = store.Open(cow)
		err = block.WithPath(path, err)
	}
	if err == nil {
		if size < cow.Size() {
			err = fmt.Errorf("%s already has %d bytes, and can't be made shorter", path, cow.Size())
		} else {
			err = block.WithPath(path, errors.Join(cow.Grow(size), cow.Flush()))
		}
	}
	return errors.Join(err, cow.Close())
}
