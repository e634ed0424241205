package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func newExport() *cobra.Command {
	var force, raw bool
	c := &cobra.Command{
		Use:   "export ORIGIN COW OUT",
		Short: "Write a snapshot's content to a raw image",
		Long: `Write what the snapshot shows to OUT, as a sparse raw image; "-" is standard output.

OUT appears under its name when it is whole and on disk, never before. An existing file is replaced with
--force only. An invalid snapshot is refused.`,
		Example: `  dmsnap export disk.img disk.cow old.img
  dmsnap export disk.img disk.cow - | zstd > old.img.zst`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) (err error) {
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
	c.Flags().BoolVar(&force, "force", false, "replace OUT when it exists")
	addRaw(c.Flags(), &raw)
	return c
}

// openSnapshot opens a snapshot for reading alone, and refuses one that can't be read whole.
func openSnapshot(originPath, cowPath string, raw bool) (*snapshot.Snapshot, func() error, error) {
	origin, cow, both, err := openPair(originPath, cowPath, block.Options{ReadOnly: true}, raw)
	if err != nil {
		return nil, nil, err
	}
	snap, err := attachReadable(origin, cow)
	if err != nil {
		return nil, nil, errors.Join(about(cowPath, err), both.Close())
	}
	// Nothing was written through snap, so nothing is left to sync.
	return snap, both.Close, nil
}

func attachReadable(origin, cow block.Device) (*snapshot.Snapshot, error) {
	st, err := store.Open(cow)
	if err != nil {
		return nil, err
	}
	if err := st.Err(); err != nil {
		return nil, fmt.Errorf("%w: it was marked so when its COW device was full or failed, and its content is lost", err)
	}
	if err := st.CheckOrigin(origin.Size()); err != nil {
		return nil, err
	}
	return snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
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
