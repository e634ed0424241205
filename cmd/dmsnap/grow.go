package main

import (
	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/server/api"
)

func newGrow() *cobra.Command {
	var control string
	var asJSON bool
	c := &cobra.Command{
		Use:   "grow {COW SIZE | --control PATH NAME SIZE}",
		Short: "Make a COW file longer",
		Long: `Make a COW file longer, so that its snapshot can hold more changes. With --control it is the COW file of a served
snapshot: clients continue meanwhile, and writes that wait for space (serve --on-full=pause) are retried at once.
The new space takes no space on disk before it is used.

A COW on a block device is made longer with the tool that manages the device (lvextend); dmsnap detects that.`,
		Example: `  dmsnap grow disk.cow 10GiB
  dmsnap grow --control ctl.sock vm1 10GiB`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			size, err := bytesize.Parse(args[1])
			if err != nil {
				return err
			}
			if control != "" {
				ctx, stop := untilSignal()
				defer stop()
				s, err := api.NewClient(control).Grow(ctx, args[0], size)
				if err != nil {
					return err
				}
				return printResult(c, asJSON, s, "%s  %s\n", printable(s.Name), s.Dmsetup)
			}
			if err := offline.Grow(args[0], size); err != nil {
				return advise(err)
			}
			st, err := (&diskFlags{}).statusOf(args[0])
			if err != nil {
				return err
			}
			return printResult(c, asJSON, st, "%s  %s\n", args[0], st.Dmsetup)
		},
	}
	c.Flags().StringVar(&control, "control", "", "control socket of the server that serves the snapshot")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
