package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/dump"
	"github.com/dmsnap/dmsnap/internal/progress"
)

type dumpOptions struct {
	format    string
	out       string
	chunkSize sizeFlag
	asJSON    bool
	pack      bool
	data      bool
	liveRead  bool
	force     bool
	disk      diskFlags
}

func newDump() *cobra.Command {
	var o dumpOptions
	c := &cobra.Command{
		Use:   "dump COW",
		Short: "Write the metadata of a store as text",
		Long: `Write the metadata of the store on COW, sound or damaged, as text: the header, the size, and every slot that is not
zero. dmsnap restore makes a store from it, with the same metadata byte for byte. The data is not included, so the
text can be given to others; it does show which chunks were changed.

COW may be the address of a snapshot volume of LVM in a disk: DISK#VG/SNAP.

--pack writes the same compressed, for a bug report. --data adds the data chunks.

If parts of the metadata can't be read, the dump marks them and has the rest; the exit status is 2.`,
		Example: `  dmsnap dump disk.cow
  dmsnap dump --pack disk.cow --output disk.dmsnap
  dmsnap dump --json disk.cow`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.format, "format", "text", "text or json")
	f.BoolVar(&o.asJSON, "json", false, "the same as --format json")
	f.BoolVar(&o.pack, "pack", false, "write the metadata compressed")
	f.BoolVar(&o.data, "data", false, "include the data chunks")
	f.StringVarP(&o.out, "output", "o", "-", "output file; \"-\" is standard output")
	f.BoolVar(&o.force, "force", false, "replace the output file if it exists")
	f.Var(&o.chunkSize, "chunk-size", "use this chunk size instead of the one in the header")
	f.BoolVar(&o.liveRead, "live-read", false, "read a store that is in use")
	o.disk.addOpening(f)
	c.MarkFlagsMutuallyExclusive("pack", "data")
	c.MarkFlagsMutuallyExclusive("pack", "json")
	c.MarkFlagsMutuallyExclusive("pack", "format")
	c.MarkFlagsMutuallyExclusive("json", "format")
	return c
}

// form returns the function that writes the requested format.
func (o *dumpOptions) form() (func(context.Context, io.Writer, block.Device, dump.Options) error, error) {
	switch {
	case o.pack:
		return dump.Pack, nil
	case o.asJSON || o.format == "json":
		return dump.JSON, nil
	case o.format == "text":
		return dump.Text, nil
	}
	return nil, fmt.Errorf("--format %q: must be text or json", o.format)
}

func (o *dumpOptions) run(c *cobra.Command, path string) error {
	form, err := o.form()
	if err != nil {
		return err
	}
	sectors, err := o.chunkSize.orHeader()
	if err != nil {
		return err
	}
	if o.pack && o.out == standardOutput {
		if err := checkNoTerminal(c, "give --output FILE, or redirect it"); err != nil {
			return err
		}
	}
	cow, err := o.disk.openStoreDevice(path, o.liveRead)
	if err != nil {
		return err
	}
	defer cow.Close()
	ctx, stop := untilSignal()
	defer stop()
	bar := progress.New(c.ErrOrStderr(), "dump")
	defer bar.End()
	write := func(w io.Writer) error {
		return form(ctx, w, cow, dump.Options{ChunkSectors: sectors, Data: o.data, Progress: bar.Show})
	}
	if o.out == standardOutput {
		return about(path, write(c.OutOrStdout()))
	}
	var gaps error // a dump with gaps is kept
	err = writeOutput(o.out, o.force, []string{path}, func(f *os.File) error {
		w := bufio.NewWriter(f)
		if err := write(w); errors.Is(err, dump.ErrUnreadable) {
			gaps = err
		} else if err != nil {
			return err
		}
		return w.Flush()
	})
	return about(path, errors.Join(err, gaps))
}
