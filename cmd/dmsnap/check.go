package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/internal/text"
)

type checkOptions struct {
	origin    string
	level     levelFlag
	chunkSize sizeFlag
	liveRead  bool
	disk      diskFlags
	asJSON    bool
}

// repairText is a repairability in words of the command line.
func repairText(r check.Repairability) string {
	if r == check.WithChunkSize {
		return "with --chunk-size"
	}
	return string(r)
}

func newCheck() *cobra.Command {
	o := checkOptions{level: levelFlag{check.Note}}
	c := &cobra.Command{
		Use:   "check COW",
		Short: "Check a store for every known problem",
		Long: `Check the store on COW for every known problem. Nothing is written, and no data is read: only the header and
the slots, including those after the end mark.

Each problem has a code, a place and a severity. error: the store can't be loaded or shows wrong content.
warning: it may soon. note: only space is lost. docs/problems.md lists all codes, with the behaviour of Linux and
the remedy.

A store in use is refused. With --live-read it is checked nevertheless; a write in progress may then be reported
as a problem.

COW may be the address of a snapshot volume of LVM in a disk: DISK#VG/SNAP.

Exit status: 0 no problem was found, 1 problems were found, 2 trouble.`,
		Example: `  dmsnap check disk.cow
  dmsnap check disk.cow --origin disk.img
  dmsnap check --level error --json disk.cow`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return o.run(c, args[0])
		},
	}
	f := c.Flags()
	f.StringVar(&o.origin, "origin", "", "also check the store against the size of this origin")
	f.Var(&o.level, "level", "report problems of at least this severity: note, warning or error")
	f.Var(&o.chunkSize, "chunk-size", "use this chunk size instead of the one in the header")
	o.disk.add(f)
	f.BoolVar(&o.liveRead, "live-read", false, "check a store that is in use")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	return c
}

// levelFlag is the value of --level.
type levelFlag struct{ check.Severity }

func (f *levelFlag) Set(s string) error {
	for _, l := range []check.Severity{check.Note, check.Warning, check.Error} {
		if s == l.String() {
			f.Severity = l
			return nil
		}
	}
	return errors.New("must be note, warning or error")
}

func (f *levelFlag) Type() string { return "LEVEL" }

// orHeader is the chunk size of --chunk-size in sectors; 0, the one in the header, without it.
func (f *sizeFlag) orHeader() (uint32, error) {
	if !f.set {
		return 0, nil
	}
	return f.chunkSectors()
}

// openStoreDevice opens a device that holds a store for reading: of a snapshot volume the COW volume. One that has a writer is
// refused, unless live is set.
func (d *diskFlags) openStoreDevice(path string, live bool) (openDisk, error) {
	f, err := d.openStore(path, block.Options{ReadOnly: true, Lock: readingLock(live)})
	return f, adviseLive(err, live)
}

// readingLock is the lock of a verb that has --live-read.
func readingLock(live bool) block.LockMode {
	if live {
		return block.LockShared
	}
	return block.LockRead
}

// adviseLive adds --live-read to the error of a disk that has a writer.
func adviseLive(err error, live bool) error {
	if errors.Is(err, block.ErrInUse) && !live {
		return fmt.Errorf("%w; --live-read reads it nevertheless", err)
	}
	return err
}

func (o *checkOptions) run(c *cobra.Command, path string) error {
	sectors, err := o.chunkSize.orHeader()
	if err != nil {
		return err
	}
	opts := check.Options{ChunkSectors: sectors}
	if o.origin != "" {
		// Only its size is used.
		origin, err := o.disk.openOrigin(o.origin, path, block.Options{ReadOnly: true, Lock: block.LockShared})
		if err != nil {
			return err
		}
		defer origin.Close()
		opts.Origin = origin
	}
	cow, err := o.disk.openStoreDevice(path, o.liveRead)
	if err != nil {
		return err
	}
	defer cow.Close()
	ctx, stop := untilSignal()
	defer stop()
	bar := progress.New(c.ErrOrStderr(), "check")
	opts.Progress = bar.Show
	r, err := inspect.Check(ctx, cow, opts, o.liveRead && block.HasWriter(fileOf(path)))
	bar.End()
	if err != nil {
		return about(path, err)
	}
	res := r.Result(path, o.level.Severity, repairText)
	if o.asJSON {
		err = printJSON(c, res)
	} else {
		err = res.WriteText(c.OutOrStdout())
	}
	if err == nil && !res.Clean {
		err = errNo
	}
	return err
}

// plural is "1 problem" or "2 problems".
func plural(n uint64, what string) string { return text.Count(n, what) }
