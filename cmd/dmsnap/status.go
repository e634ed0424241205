package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
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
			return printStatus(c.OutOrStdout(), st)
		},
	}
	c.Flags().StringVar(&control, "control", "", "control socket of a running server")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	disk.addPVs(c.Flags())
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

// printStatus writes a status as text.
func printStatus(w io.Writer, s inspect.Status) error {
	use := ""
	if s.InUse {
		use = ", in use"
	}
	fmt.Fprintf(w, "%s: %s%s\n", s.Path, s.State, use)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	printFigures(t, s.Figures)
	return t.Flush()
}

// printFigures writes figures as rows of a table.
func printFigures(w io.Writer, f api.Figures) {
	fmt.Fprintf(w, "  dmsetup\t%s\n", f.Dmsetup)
	if f.Full {
		fmt.Fprintf(w, "  full\twrites that require space fail or wait; see dmsnap grow\n")
	}
	if f.Error != "" {
		fmt.Fprintf(w, "  error\t%s\n", f.Error)
	}
	if f.Unmarked {
		fmt.Fprintf(w, "  unmarked\tthe COW device could not be marked invalid: do not use it as a snapshot again\n")
	}
	fmt.Fprintf(w, "  chunk\t%s (%d sectors)\n", bytesText(int64(f.ChunkSectors)*ondisk.SectorSize), f.ChunkSectors)
	fmt.Fprintf(w, "  exceptions\t%d\n", f.Exceptions)
	fmt.Fprintf(w, "  used\t%s of %s (%.1f %%), %s of it metadata\n", bytesText(int64(f.SectorsAllocated)*ondisk.SectorSize),
		bytesText(int64(f.TotalSectors)*ondisk.SectorSize), f.Percent, bytesText(int64(f.MetadataSectors)*ondisk.SectorSize))
}
