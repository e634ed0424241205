package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

func newGrow() *cobra.Command {
	var control string
	var asJSON bool
	c := &cobra.Command{
		Use:   "grow {COW SIZE | --control PATH NAME SIZE}",
		Short: "Make a COW file longer",
		Long: `Make a COW file longer, so that its snapshot can hold more. With --control it is that of a snapshot that
is being served: clients go on meanwhile, and writes that wait for room (serve --on-full=pause) look for
it at once. The new space takes no room on disk before it is used.

A COW on a block device is made longer by whoever made it (lvextend); dmsnap notices that by itself.`,
		Example: `  dmsnap grow disk.cow 10GiB
  dmsnap grow --control /run/dmsnap.ctl vm1 10GiB`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			size, err := parseSize(args[1])
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
				if asJSON {
					return printJSON(c, s)
				}
				return printf(c, "%s  %s\n", printable(s.Name), s.Dmsetup)
			}
			if err := growFile(args[0], size); err != nil {
				return err
			}
			st, err := statusOf(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c, st)
			}
			return printf(c, "%s  %s\n", args[0], st.Dmsetup)
		},
	}
	c.Flags().StringVar(&control, "control", "", "the control socket of the server that serves the snapshot")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// growFile makes a COW file that nobody uses longer.
func growFile(path string, size int64) error {
	cow, err := openDevice(path, block.Options{})
	if err != nil {
		return err
	}
	if err = checkStore(path, cow); err == nil {
		// One that was cut must not be made as long as it was: zeros would pass for what is gone.
		_, err = store.Open(cow)
		err = about(path, err)
	}
	if err == nil {
		if size < cow.Size() {
			err = fmt.Errorf("%s has %d bytes already, and can't be made shorter", path, cow.Size())
		} else {
			err = about(path, errors.Join(cow.Grow(size), cow.Flush()))
		}
	}
	return errors.Join(err, cow.Close())
}
