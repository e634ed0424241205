package offline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source"
)

// keep writes the undo store of a merge, or opens an existing one that belongs to it. It stays open, and locked, during
// the merge.
func (o *MergeOptions) keep(ctx context.Context, in *mergeInputs, size int64) (*block.File, error) {
	kept, err := o.openUndo(in, false)
	replace := o.Force && errors.Is(err, merge.ErrNotUndo)
	if err == nil || !replace && !errors.Is(err, fs.ErrNotExist) {
		return kept, err
	}
	if err := o.writeUndo(ctx, in, size, replace); err != nil {
		return nil, err
	}
	return o.openUndo(in, false)
}

// openUndo opens an undo store that belongs to the merge.
func (o *MergeOptions) openUndo(in *mergeInputs, readOnly bool) (*block.File, error) {
	for _, file := range in.files {
		err := source.CheckDifferent(file, o.Undo)
		if errors.Is(err, snapshot.ErrSameDevice) {
			err = fmt.Errorf("%s: is the same file as %s", o.Undo, file)
		}
		if err != nil {
			return nil, err
		}
	}
	kept, err := source.OpenWhole(o.Undo, block.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	if err = merge.CheckUndo(in.origin, in.cow, kept); err == nil {
		// The process that named it may have been killed before the name was durable.
		err = block.SyncDirectory(filepath.Dir(o.Undo))
	}
	if err != nil {
		kept.Close()
		return nil, block.WithPath(o.Undo, err)
	}
	return kept, nil
}

// writeUndo writes the undo store, of size bytes; it gets its name when it is complete and durable.
func (o *MergeOptions) writeUndo(ctx context.Context, in *mergeInputs, size int64, replace bool) error {
	err := writeDevice(o.Undo, replace, in.files, size, func(dst *block.File) error {
		return merge.WriteUndo(ctx, in.origin, in.cow, dst, merge.Options{Progress: report(o.UndoProgress)})
	})
	if err != nil {
		err = fmt.Errorf("%w; the merge did not begin", err)
	}
	return block.WithPath(o.Undo, err)
}

// checkUndo refuses an undo store that a merge would refuse. It writes nothing.
func (o *MergeOptions) checkUndo(in *mergeInputs) error {
	if o.Undo == "" {
		return nil
	}
	kept, err := o.openUndo(in, true)
	switch {
	case err == nil:
		return kept.Close()
	case errors.Is(err, fs.ErrNotExist), o.Force && errors.Is(err, merge.ErrNotUndo):
		return nil
	}
	return err
}
