// Package offline changes disks and stores that are not served, by their names: it merges snapshots into their origins, receives
// streams, exports snapshots, imports overlays, compacts and repairs stores and takes repairs back.
//
//	res, err := offline.Merge(ctx, []string{"disk.img", "disk.cow"}, offline.MergeOptions{Undo: "before.cow"})
//
// Names are those of package source. Guarantees: what is changed is locked until the call returns. A call that was
// interrupted, by its context or by a crash, is repeated to continue it. Calls on different disks may be concurrent.
package offline

import (
	"errors"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/source"
)

// writeDevice makes an output file of a size, which is none of the inputs, and has it filled as a device.
func writeDevice(path string, replace bool, inputs []string, size int64, fill func(*block.File) error) error {
	return newfile.WriteDevice(path, newfile.Options{Replace: replace, Inputs: source.Paths(inputs)}, size, fill)
}

// closers are closed in order.
type closers []io.Closer

// Close closes all of them.
func (cs closers) Close() error {
	var errs []error
	for _, c := range cs {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
