package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/source/lvm"
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
			o, err := format.options(output)
			if err != nil {
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
			disk.remote.Context = ctx
			if o.Source, err = disk.options(block.Options{}); err != nil {
				return err
			}
			if output == standardOutput {
				o.To = c.OutOrStdout()
			}
			bar := progress.New(c.ErrOrStderr(), "export")
			defer bar.End()
			o.Force, o.Progress = force, bar.Show
			return adviseExport(offline.Export(ctx, inputs, output, o), inputs)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace OUT if it exists")
	c.Flags().StringVar(&control, "control", "", "control socket of the daemon that has NODE")
	disk.add(c.Flags())
	format.add(c.Flags())
	return c
}

// adviseExport adds what to do about an error of export.
func adviseExport(err error, inputs []string) error {
	switch {
	case errors.Is(err, offline.ErrWholeDisk):
		return fmt.Errorf("%w: ORIGIN COW OUT are required, or the address of a part of a disk (%[2]s#p1, %[2]s#VG/LV)", err, inputs[0])
	case errors.Is(err, offline.ErrNoOverlay), errors.Is(err, lvm.ErrNoSnapshot):
		return fmt.Errorf("--backing: %w: a snapshot is required, ORIGIN COW or the address of a snapshot volume", err)
	}
	return advise(imageAdvice(withOutputAdvice(err), "dmsnap export "+strings.Join(inputs, " ")+" -"))
}
