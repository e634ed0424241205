package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// figures are what is said of every snapshot, offline or served. The JSON names are promises.
type figures struct {
	Store            string         `json:"store"` // P, PO or N; the disk does not tell P from PO
	State            snapshot.State `json:"state"`
	Valid            bool           `json:"valid"`
	ChunkSectors     uint32         `json:"chunk_sectors"`
	Exceptions       uint64         `json:"exceptions"`
	SectorsAllocated uint64         `json:"sectors_allocated"`
	TotalSectors     uint64         `json:"total_sectors"`
	MetadataSectors  uint64         `json:"metadata_sectors"`
	Percent          float64        `json:"percent"`            // allocated of total
	Full             bool           `json:"full"`               // no room for the last write that needed some: such writes fail or wait
	Unmarked         bool           `json:"unmarked,omitempty"` // invalid, but the COW device could not be marked so
	Error            string         `json:"error,omitempty"`    // why the store refuses writes
	Dmsetup          string         `json:"dmsetup"`            // the kernel's status text
}

// figuresOf takes the figures from a status.
func figuresOf(st snapshot.Status) figures {
	f := figures{Store: st.Store.String(), State: st.State, Valid: st.State != snapshot.StateInvalid,
		ChunkSectors: st.ChunkSectors, Exceptions: st.Exceptions, SectorsAllocated: st.Allocated,
		TotalSectors: st.Total, MetadataSectors: st.Metadata, Full: st.Full, Dmsetup: st.Text()}
	f.Unmarked = st.Unmarked
	if st.Err != nil {
		f.Error = st.Err.Error()
	}
	if st.Total > 0 {
		f.Percent = 100 * float64(st.Allocated) / float64(st.Total)
	}
	return f
}

// fileStatus is what status says of a COW device that is looked at from outside.
type fileStatus struct {
	Path string `json:"path"`
	figures
	Version uint32 `json:"version"`
	InUse   bool   `json:"in_use"` // some program has it open for writing
}

func newStatus() *cobra.Command {
	var control string
	var asJSON bool
	c := &cobra.Command{
		Use:   "status {COW | --control PATH}",
		Short: "Tell how a snapshot fares",
		Long: `Tell how a snapshot fares: the kernel's status text and the figures behind it. Nothing is written.

With COW the store on that file or device is read, also while it is served; what its server has not
made durable yet does not show. With --control the server is asked about its origin, all its snapshots
and a merge.

States: ok, invalid, failed, overflow, merging, merge-failed.`,
		Example: `  dmsnap status disk.cow
  dmsnap status --json disk.cow
  dmsnap status --control /run/dmsnap.ctl`,
		Args: func(c *cobra.Command, args []string) error {
			if control != "" && len(args) > 0 {
				return errors.New("either COW or --control PATH, not both")
			}
			if control == "" && len(args) != 1 {
				return errors.New("one COW is needed, or --control PATH")
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
	c.Flags().StringVar(&control, "control", "", "ask the server with this control socket")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// statusOf reads the store on path, as it is on disk.
func statusOf(path string) (fileStatus, error) {
	cow, err := openDevice(path, block.Options{ReadOnly: true, Lock: block.LockShared})
	if err != nil {
		return fileStatus{}, err
	}
	defer cow.Close()
	if err := checkStore(path, cow); err != nil {
		return fileStatus{}, err
	}
	s := fileStatus{Path: path, InUse: hasWriter(path)}
	st, err := openWhileWritten(cow, s.InUse)
	if err != nil {
		return s, about(path, err)
	}
	s.figures, s.Version = figuresOf(statusOfStore(st)), st.Header().Version
	return s, nil
}

// statusOfStore is the status that a snapshot of this store would have.
func statusOfStore(st *store.Store) snapshot.Status {
	look := snapshot.Status{Target: snapshot.TargetSnapshot, State: snapshot.StateOK,
		ChunkSectors: st.Layout().ChunkSectors, Exceptions: st.Len(), Usage: st.Usage()}
	if st.Err() != nil {
		look.State = snapshot.StateInvalid
	}
	return look
}

// openWhileWritten loads a store that its owner may be writing to. Such a store is sound at every
// moment, but reading takes longer than a moment: what was read early may not fit what was read late.
// So what can't be is looked at again.
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
		if st, err = store.Open(cow); !errors.As(err, &corrupt) {
			return st, err
		}
		block.Refresh(cow) // it may have grown; when that can't be told, the old size stands
	}
	return nil, err
}

// hasWriter reports whether a program holds the lock of one that writes (docs/decisions/0001-locks.md).
// It asks and takes nothing: a lock taken to find out, however short, could turn a server away that is
// starting just now.
func hasWriter(path string) bool {
	const writerByte = 101
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: writerByte, Len: 1}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l)
	return err == nil && l.Type != unix.F_UNLCK
}

func (s fileStatus) print(w io.Writer) error {
	use := ""
	if s.InUse {
		use = ", in use"
	}
	fmt.Fprintf(w, "%s: %s%s\n", s.Path, s.State, use)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	s.figures.print(t)
	return t.Flush()
}

// print writes the figures as rows of a table.
func (f figures) print(w io.Writer) {
	fmt.Fprintf(w, "  dmsetup\t%s\n", f.Dmsetup)
	if f.Full {
		fmt.Fprintf(w, "  full\twrites that need room fail or wait; see dmsnap grow\n")
	}
	if f.Error != "" {
		fmt.Fprintf(w, "  error\t%s\n", f.Error)
	}
	if f.Unmarked {
		fmt.Fprintf(w, "  unmarked\tthe COW device could not be marked invalid: don't use it as a snapshot again\n")
	}
	fmt.Fprintf(w, "  chunk\t%s (%d sectors)\n", bytesText(int64(f.ChunkSectors)*ondisk.SectorSize), f.ChunkSectors)
	fmt.Fprintf(w, "  exceptions\t%d\n", f.Exceptions)
	fmt.Fprintf(w, "  used\t%s of %s (%.1f %%), %s of it metadata\n", bytesText(int64(f.SectorsAllocated)*ondisk.SectorSize),
		bytesText(int64(f.TotalSectors)*ondisk.SectorSize), f.Percent, bytesText(int64(f.MetadataSectors)*ondisk.SectorSize))
}
