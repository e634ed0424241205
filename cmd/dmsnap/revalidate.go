package main

import (
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/rescue"
)

// revalidated is what rescue --revalidate prints as JSON.
type revalidated struct {
	Path    string `json:"path"`  // of the valid store
	Bytes   int64  `json:"bytes"` // that it has
	Changed bool   `json:"changed"`
	Kept    int64  `json:"kept_bytes"` // of the snapshot that are certain
}

// say prints what marking a store valid means; with --in-place before it is done.
func (o *rescueOptions) say(c *cobra.Command, v *rescue.Revalidation, cowPath string) error {
	if o.asJSON {
		return nil
	}
	return printf(c, "%s: %s are certain; all other ranges show the current content of the origin, and ranges that were "+
		"overwritten since the store became invalid can no longer be distinguished\n", cowPath, bytesText(v.KeptBytes()))
}

// copyValid makes the copy of --revalidate.
func (o *rescueOptions) copyValid(c *cobra.Command, cowPath, newPath string) error {
	cow, err := o.disk.openStoreDevice(cowPath, o.liveRead)
	if err != nil {
		return err
	}
	defer cow.Close()
	ctx, stop := untilSignal()
	defer stop()
	v, err := rescue.NewRevalidation(ctx, cow)
	if err != nil {
		return about(cowPath, err)
	}
	err = writeOutputDevice(newPath, o.force, []string{cowPath}, cow.Size(), func(out *block.File) error {
		return v.Copy(ctx, out)
	})
	if err != nil {
		return about(cowPath, err)
	}
	if o.asJSON {
		return printJSON(c, revalidated{newPath, cow.Size(), true, v.KeptBytes()})
	}
	if err := o.say(c, v, cowPath); err != nil {
		return err
	}
	return printf(c, "%s: a valid copy of %s\n", newPath, cowPath)
}

// markValid marks the store itself valid, after its undo file is durable.
func (o *rescueOptions) markValid(c *cobra.Command, cowPath string) error {
	cow, err := openDevice(cowPath, block.Options{})
	if err != nil {
		return err
	}
	defer cow.Close()
	ctx, stop := untilSignal()
	defer stop()
	v, err := rescue.NewRevalidation(ctx, cow)
	if err != nil {
		return about(cowPath, err)
	}
	changed, err := v.InPlace(ctx, func(write func(io.Writer) error) error {
		err := writeOutput(o.undo, o.force, []string{cowPath}, func(f *os.File) error { return write(f) })
		if err != nil {
			return err
		}
		return o.say(c, v, cowPath)
	})
	if err != nil {
		return about(cowPath, err)
	}
	if o.asJSON {
		return printJSON(c, revalidated{cowPath, cow.Size(), changed, v.KeptBytes()})
	}
	if !changed {
		return printf(c, "%s: is already valid; nothing was changed\n", cowPath)
	}
	return printf(c, "%s: valid again; to undo this: dmsnap repair %[1]s --undo-apply %s\n", cowPath, o.undo)
}
