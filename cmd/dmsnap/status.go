package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
)

func newStatus() *cobra.Command {
	var control string
	var asJSON bool
	var disk diskFlags
	c := &cobra.Command{
		Use:   "status {COW | --control PATH}",
		Short: "Show the status of a snapshot or a server",
		Long: `Show the status of a snapshot: the status text of the kernel and the figures behind it. Nothing is written.

With COW, the store on that file or device is read, also while it is served; changes that its server has not yet
made durable are not shown. With --control, the server reports its origin, all its snapshots and the merge.

COW may be the address of a snapshot volume of LVM in a disk: DISK#VG/SNAP.

States: ok, invalid, failed, overflow, merging, merge-failed.`,
		Example: `  dmsnap status disk.cow
  dmsnap status --json disk.cow
  dmsnap status --control ctl.sock`,
		Args: func(c *cobra.Command, args []string) error {
			if control != "" && len(args) > 0 {
				return errors.New("either COW or --control PATH, not both")
			}
			if control == "" && len(args) != 1 {
				return errors.New("one COW is required, or --control PATH")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if control != "" {
				return serverStatus(c, control, asJSON)
			}
			st, err := disk.statusOf(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c, st)
			}
			return textTo(c).Status(st)
		},
	}
	c.Flags().StringVar(&control, "control", "", "control socket of a running server")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	disk.addOpening(c.Flags())
	return c
}

// statusOf returns the status of the store on path, as it is on disk.
func (d *diskFlags) statusOf(path string) (inspect.Status, error) {
	cow, err := d.openStore(path, block.Options{ReadOnly: true, Lock: block.LockShared})
	if err != nil {
		return inspect.Status{}, err
	}
	defer cow.Close()
	if err := checkStore(path, cow); err != nil {
		return inspect.Status{}, err
	}
	s, err := inspect.StatusOf(path, cow, block.HasWriter(fileOf(path)))
	return s, about(path, err)
}

// textTo returns a writer of texts to the verb's standard output.
func textTo(c *cobra.Command) inspect.TextWriter {
	return inspect.TextWriter{W: c.OutOrStdout(), Full: "; see dmsnap grow"}
}
