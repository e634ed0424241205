package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/store"
)

func newExport() *cobra.Command {
	var force bool
	var control string
	var disk diskFlags
	var format imageFormat
	c := &cobra.Command{
		Use:   "export {ORIGIN COW | ADDRESS | --control PATH NODE} OUT",
		Short: "Write the content of a snapshot, a node, a logical volume or a partition to a raw or qcow2 image",
		Long: `Write the content of the snapshot in COW to OUT, a sparse raw image; "-" is standard output.

ADDRESS is a part of a disk: DISK#p2 is partition 2, DISK#vg/snap a logical volume as it is when it is active,
DISK#vg/base:real an origin without a merge into it, and DISK#vg/snap:cow a COW volume. It may also be a qcow2 image or an
NBD URI as a whole.

With --control PATH, NODE is a node, a checkpoint or a disk of a daemon, whose content at this moment is read while it is used.

With --format qcow2, OUT is a qcow2 image. With --backing BASE it is an overlay that has only what the store has: BASE
must have the content of ORIGIN, or be ORIGIN; of a snapshot volume, that of its origin. The name is written to the
image as it is given.

OUT gets its name when it is complete and durable, never before. An existing file is replaced only with --force.
An invalid snapshot is refused.`,
		Example: `  dmsnap export disk.img disk.cow old.img
  dmsnap export disk.img disk.cow - | zstd > old.img.zst
  dmsnap export disk.img disk.cow old.qcow2 --format qcow2 --compress
  dmsnap export disk.img disk.cow changes.qcow2 --format qcow2 --backing disk.img
  dmsnap export 'vm.img#vg0/later' later.img
  dmsnap export vm1 vm1.img --control fleet/control.sock`,
		Args: cobra.RangeArgs(2, 3),
		RunE: func(c *cobra.Command, args []string) (err error) {
			inputs, output := args[:len(args)-1], args[len(args)-1]
			if err := format.check(output); err != nil {
				return err
			}
			if output == standardOutput {
				if err := checkNoTerminal(c, "redirect it"); err != nil {
					return err
				}
			}
			ctx, stop := untilSignal()
			defer stop()
			if control != "" {
				done, err := nodeSource(ctx, control, inputs, output, force)
				if err != nil {
					return err
				}
				defer done()
			}
			from, err := disk.openExported(inputs, format.backing != "")
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, from.close()) }()
			bar := newProgress(c.ErrOrStderr(), "export")
			defer bar.end()
			if format.format == "qcow2" {
				return format.write(ctx, inputs, output, force, from, bar)
			}
			if output == standardOutput {
				return writeImageToStandardOutput(ctx, c, inputs, from.Size(), func(out block.Device) error {
					return copyImage(ctx, out, from, bar)
				})
			}
			err = writeOutputDevice(output, force, inputs, from.Size(), func(out *block.File) error {
				return copyImage(ctx, out, from, bar)
			})
			return imageAdvice(err, "dmsnap export "+strings.Join(inputs, " ")+" -")
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace OUT if it exists")
	c.Flags().StringVar(&control, "control", "", "control socket of the daemon that has NODE")
	disk.add(c.Flags())
	format.add(c.Flags())
	return c
}

// An exportSource is what export writes.
type exportSource struct {
	block.Device
	origin openDisk // of a snapshot; nil: there is none
	close  func() error
}

// openExported opens what export writes: of an origin and a COW the snapshot, or a part of a disk. overlay says that an
// address has to be that of a snapshot volume.
func (d *diskFlags) openExported(inputs []string, overlay bool) (x exportSource, err error) {
	switch {
	case len(inputs) == 2:
		return d.openSnapshot(inputs[0], inputs[1])
	case overlay:
		sides, err := d.openSides(inputs, false)
		if err != nil {
			return x, fmt.Errorf("--backing: %w", err)
		}
		return snapshotOf(sides.Origin, sides.COWs[0], sides.Names[0], sides)
	}
	dev, err := d.open(inputs[0], block.Options{ReadOnly: true})
	if err != nil {
		return x, err
	}
	if source.IsFile(inputs[0]) && dev.Format() == ondisk.RawFormat {
		return x, errors.Join(fmt.Errorf("%[1]s is a raw disk as a whole: ORIGIN COW OUT are required, or the address of a part of a disk (%[1]s#p1, %[1]s#VG/LV)", inputs[0]), dev.Close())
	}
	return exportSource{dev, nil, dev.Close}, nil
}

// openSnapshot opens the view of a snapshot. A snapshot that can't be read completely is refused.
func (d *diskFlags) openSnapshot(originName, cowName string) (exportSource, error) {
	origin, cow, both, err := d.openPair(originName, cowName, block.Options{ReadOnly: true})
	if err != nil {
		return exportSource{}, err
	}
	return snapshotOf(origin, cow, cowName, both)
}

// snapshotOf returns the view of a store over its origin, which both closes.
func snapshotOf(origin, cow openDisk, cowName string, both io.Closer) (exportSource, error) {
	view, err := viewOf(origin, cow)
	if err != nil {
		return exportSource{}, errors.Join(about(cowName, err), both.Close())
	}
	return exportSource{view, origin, both.Close}, nil
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

// copyImage copies a device to out, which reads as zeros or takes what is written in order.
func copyImage(ctx context.Context, out, from block.Device, bar *progressBar) error {
	size, done := from.Size(), int64(0)
	return block.Copy(out, 0, from, 0, size, block.IntoZeros, func(n int64) error {
		done += n
		bar.show(done, size)
		return context.Cause(ctx)
	})
}
