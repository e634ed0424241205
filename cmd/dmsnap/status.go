package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// fileStatus is the status of a store, read from its COW device.
type fileStatus struct {
	Path string `json:"path"`
	api.Figures
	Version uint32 `json:"version"`
	InUse   bool   `json:"in_use"` // another program has it open for writing
}

func newStatus() *cobra.Command {
	var control string
	var asJSON bool
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
			st, err := statusOf(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c, st)
			}
			return st.print(c.OutOrStdout())
		},
	}
	c.Flags().StringVar(&control, "control", "", "control socket of a running server")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// statusOf returns the status of the store on path, as it is on disk.
func statusOf(path string) (fileStatus, error) {
	cow, err := openAddress(path, block.Options{ReadOnly: true, Lock: block.LockShared}, true)
	if err != nil {
		return fileStatus{}, err
	}
	defer cow.Close()
	if err := checkStore(path, cow); err != nil {
		return fileStatus{}, err
	}
	s := fileStatus{Path: path, InUse: block.HasWriter(fileOf(path))}
	st, err := openWhileWritten(cow, s.InUse)
	if err != nil {
		return s, about(path, err)
	}
	s.Figures, s.Version = server.FiguresOf(statusOfStore(st)), st.Header().Version
	return s, nil
}

// statusOfStore is the status of a snapshot with this store.
func statusOfStore(st *store.Store) snapshot.Status {
	look := snapshot.Status{Target: snapshot.TargetSnapshot, State: snapshot.StateOK,
		ChunkSectors: st.Layout().ChunkSectors, Exceptions: st.Len(), Usage: st.Usage()}
	if st.Err() != nil {
		look.State = snapshot.StateInvalid
	}
	return look
}

// openWhileWritten loads a store. With written, which says that it has a writer, damage is retried: the store on disk is
// loadable at every instant, but parts read at different instants may not match.
func openWhileWritten(cow block.Device, written bool) (st *store.Store, err error) {
	tries := 1
	if written {
		tries = 5
	}
	for i := range tries {
		if i > 0 {
			time.Sleep(20 * time.Millisecond)
		}
		var corrupt *ondisk.CorruptError
		if st, err = store.OpenToRead(cow); !errors.As(err, &corrupt) {
			return st, err
		}
		block.Refresh(cow) // it may have grown; after an error the old size is used
	}
	return nil, err
}

func (s fileStatus) print(w io.Writer) error {
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
