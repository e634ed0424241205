package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/store"
)

func newExport() *cobra.Command {
	var force, raw bool
	var format imageFormat
	c := &cobra.Command{
		Use:   "export ORIGIN COW OUT",
		Short: "Write the content of a snapshot to a raw or qcow2 image",
		Long: `Write the content of the snapshot in COW to OUT, a sparse raw image; "-" is standard output.

With --format qcow2, OUT is a qcow2 image. With --backing BASE it is an overlay that has only what the store has: BASE
must have the content of ORIGIN, or be ORIGIN. The name is written to the image as it is given.

OUT gets its name when it is complete and durable, never before. An existing file is replaced only with --force.
An invalid snapshot is refused.`,
		Example: `  dmsnap export disk.img disk.cow old.img
  dmsnap export disk.img disk.cow - | zstd > old.img.zst
  dmsnap export disk.img disk.cow old.qcow2 --format qcow2 --compress
  dmsnap export disk.img disk.cow changes.qcow2 --format qcow2 --backing disk.img`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if err := format.check(args[2]); err != nil {
				return err
			}
			if args[2] == standardOutput {
				if err := checkNoTerminal(c, "redirect it"); err != nil {
					return err
				}
			}
			snap, closeAll, err := openSnapshot(args[0], args[1], raw)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeAll()) }()
			ctx, stop := untilSignal()
			defer stop()
			bar := newProgress(c.ErrOrStderr(), "export")
			defer bar.end()
			if format.format == "qcow2" {
				return format.write(ctx, args, force, snap, bar)
			}
			if args[2] == standardOutput {
				return writeImageToStandardOutput(ctx, c, args[:2], snap.Size(), func(out block.Device) error {
					return copyImage(ctx, out, snap, bar)
				})
			}
			err = writeOutputDevice(args[2], force, args[:2], snap.Size(), func(out *block.File) error {
				return copyImage(ctx, out, snap, bar)
			})
			return imageAdvice(err, "dmsnap export ORIGIN COW -")
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace OUT if it exists")
	addRaw(c.Flags(), &raw)
	format.add(c.Flags())
	return c
}

// openSnapshot opens the view of a snapshot. A snapshot that can't be read completely is refused.
func openSnapshot(originPath, cowPath string, raw bool) (*store.View, func() error, error) {
	origin, cow, both, err := openPair(originPath, cowPath, block.Options{ReadOnly: true}, raw)
	if err != nil {
		return nil, nil, err
	}
	view, err := viewOf(origin, cow)
	if err != nil {
		return nil, nil, errors.Join(about(cowPath, err), both.Close())
	}
	return view, both.Close, nil
}

func viewOf(origin, cow block.Device) (*store.View, error) {
	st, err := store.OpenToRead(cow)
	if err != nil {
		return nil, err
	}
	if err := st.Err(); err != nil {
		return nil, fmt.Errorf("%w: it was marked so when its COW device was full or failed, and its content is lost", err)
	}
	return store.NewView(origin, st)
}

// copyImage copies what the snapshot shows to out, which reads as zeros or takes what is written in order.
func copyImage(ctx context.Context, out block.Device, snap block.Device, bar *progressBar) error {
	size, done := snap.Size(), int64(0)
	return block.Copy(out, 0, snap, 0, size, block.IntoZeros, func(n int64) error {
		done += n
		bar.show(done, size)
		return context.Cause(ctx)
	})
}
