package main

import (
	"bufio"
	"errors"
	"math"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/store"
)

func newList() *cobra.Command {
	var asJSON, liveRead bool
	var disk diskFlags
	c := &cobra.Command{
		Use:   "list COW",
		Short: "List the exceptions of a store as runs",
		Long: `List the exceptions of the store in COW: which chunks of the origin are stored in which chunks of COW, in the order
of the origin. Chunks that are consecutive on both sides form one line, a run. Nothing is written.

COW may be the address of a snapshot volume of LVM in a disk: DISK#VG/SNAP.

dmsnap dump shows the same store slot by slot, as it is on disk, sound or damaged.`,
		Example: `  dmsnap list disk.cow
  dmsnap list --json disk.cow`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			cow, st, err := disk.openStoreToRead(args[0], liveRead)
			if err != nil {
				return err
			}
			defer cow.Close()
			ctx, stop := untilSignal()
			defer stop()
			w := bufio.NewWriterSize(c.OutOrStdout(), 64<<10)
			list := inspect.ListText
			if asJSON {
				list = inspect.ListJSON
			}
			return errors.Join(list(ctx, w, args[0], st), w.Flush())
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&liveRead, "live-read", false, "read a store that is in use")
	disk.addOpening(c.Flags())
	return c
}

// largestDisk bounds the origin chunks of a store, in bytes: no disk is larger, and offsets up to it can be added
// without overflow. Opening a store does not check origin chunks, since the origin is unknown.
const largestDisk = math.MaxInt64

// openStoreToRead loads a store that is valid and complete. A store that has a writer is refused, unless live is set;
// then the result is the state of the disk a moment ago.
func (d *diskFlags) openStoreToRead(path string, live bool) (openDisk, *store.Store, error) {
	cow, err := d.openStoreDevice(path, live)
	if err != nil {
		return nil, nil, err
	}
	st, err := loadStore(path, cow, live)
	if err != nil {
		cow.Close()
		return nil, nil, err
	}
	return cow, st, nil
}

// loadStore loads the store on an open device; see openStoreToRead.
func loadStore(path string, cow block.Device, live bool) (*store.Store, error) {
	if err := checkStore(path, cow); err != nil {
		return nil, err
	}
	st, err := inspect.OpenStore(cow, live && block.HasWriter(fileOf(path)))
	if err == nil {
		err = errors.Join(st.Err(), st.CheckOrigin(largestDisk))
	}
	return st, about(path, err)
}
