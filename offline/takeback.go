package offline

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/source"
)

// TakeBack restores on the COW device path what an undo file that package repair or rescue wrote has, and the length of a file. It
// returns how many bytes that is. Errors: repair.ErrUndoFile and repair.ErrUndoOther, with nothing changed; those of opening.
func TakeBack(ctx context.Context, path, undoPath string) (int64, error) {
	dev, err := source.OpenWhole(path, block.Options{})
	if err != nil {
		return 0, err
	}
	defer dev.Close()
	if info, err := os.Stat(undoPath); err == nil && !info.Mode().IsRegular() {
		return 0, fmt.Errorf("%s: not a regular file", undoPath) // opening a pipe would wait for a writer
	}
	f, err := os.Open(undoPath)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, n, err := repair.TakeBack(ctx, f, dev)
	if errors.Is(err, repair.ErrUndoFile) || errors.Is(err, repair.ErrUndoOther) {
		return n, block.WithPath(undoPath, err)
	}
	if err != nil {
		return n, block.WithPath(path, err)
	}
	if size < dev.Size() { // the repair made it longer; the lock on it is still held
		if err := os.Truncate(path, size); err != nil {
			return n, err
		}
		if err := dev.Flush(); err != nil {
			return n, block.WithPath(path, err)
		}
	}
	return n, block.SyncDirectory(filepath.Dir(path))
}
