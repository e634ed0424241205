package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
)

// keep writes the undo store of a merge, or opens an existing one that belongs to it. It stays open, and locked, during
// the merge.
func (o *offlineMerge) keep(ctx context.Context, c *cobra.Command, in *mergeInputs, size int64) (*block.File, error) {
	kept, err := o.openUndo(in, false)
	replace := o.force && errors.Is(err, merge.ErrNotUndo)
	if err == nil || !replace && !errors.Is(err, fs.ErrNotExist) {
		return kept, err
	}
	if err := o.writeUndo(ctx, c, in, size, replace); err != nil {
		return nil, err
	}
	return o.openUndo(in, false)
}

// openUndo opens an undo store that belongs to the merge.
func (o *offlineMerge) openUndo(in *mergeInputs, readOnly bool) (*block.File, error) {
	for _, file := range in.files {
		err := checkDifferent(file, o.undo)
		if errors.Is(err, snapshot.ErrSameDevice) {
			err = fmt.Errorf("%s: is the same file as %s", o.undo, file)
		}
		if err != nil {
			return nil, err
		}
	}
	kept, err := openDevice(o.undo, block.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	if err = merge.CheckUndo(in.origin, in.cow, kept); err == nil {
		// The process that named it may have been killed before the name was durable.
		err = block.SyncDirectory(filepath.Dir(o.undo))
	}
	if err != nil {
		kept.Close()
		if errors.Is(err, merge.ErrNotUndo) {
			err = fmt.Errorf("%w; choose another name, or use --force to replace it", err)
		}
		return nil, about(o.undo, err)
	}
	return kept, nil
}

// writeUndo writes the undo store, of size bytes; it gets its name when it is complete and durable.
func (o *offlineMerge) writeUndo(ctx context.Context, c *cobra.Command, in *mergeInputs, size int64, replace bool) error {
	bar := newProgress(c.ErrOrStderr(), "keep")
	err := writeOutputDevice(o.undo, replace, in.files, size, func(dst *block.File) error {
		return merge.WriteUndo(ctx, in.origin, in.cow, dst, merge.Options{Progress: func(p merge.Progress) {
			bar.show(p.MergedBytes(), p.TotalBytes())
		}})
	})
	bar.end()
	if err != nil {
		err = fmt.Errorf("%w; the merge did not begin", err)
	}
	return about(o.undo, err)
}

// checkUndo refuses an undo store that a merge would refuse. It writes nothing.
func (o *offlineMerge) checkUndo(in *mergeInputs) error {
	if o.undo == "" {
		return nil
	}
	kept, err := o.openUndo(in, true)
	switch {
	case err == nil:
		return kept.Close()
	case errors.Is(err, fs.ErrNotExist), o.force && errors.Is(err, merge.ErrNotUndo):
		return nil
	}
	return err
}
