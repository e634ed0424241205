package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/store"
)

type diffOptions struct {
	format   string
	granule  sizeFlag
	asJSON   bool
	verify   bool
	liveRead bool
	disk     diskFlags
}

func newDiff() *cobra.Command {
	var o diffOptions
	c := &cobra.Command{
		Use:   "diff {ORIGIN COW [COW2] | SNAPSHOT [SNAPSHOT2]}",
		Short: "Show where a snapshot differs from its origin, or two snapshots from each other",
		Long: `Show where the snapshot in COW differs from ORIGIN or, with COW2, where the snapshots in COW and COW2 differ from
each other. Nothing is written.

SNAPSHOT is the address of a snapshot volume of LVM in a disk, DISK#VG/SNAP, and stands for its origin and its COW volume.

Chunks with an exception may differ; all other chunks are equal, and are not read. Thus the answer is fast and may
be too large: a chunk is stored whole when one byte of it is written, or when the same bytes are written again, and
two snapshots of one origin each keep the chunks that were changed on the origin since. --verify reads these chunks
on both sides and compares them, to the sector (512 bytes).

Formats:
  text    a line for each range, and a summary
  ranges  lines of OFFSET and LENGTH in bytes, decimal, ascending, of the differences, and nothing else
  json    the whole disk as a list of {"start", "length", "changed", "stored"} in bytes, ascending, without
          gaps, one to a line; stored: a store has exceptions for it. Compatible with qemu-img map
  bitmap  a bit for each --granularity bytes of the disk, lowest bit of a byte first, 1 where something differs

Exit status: 0 no difference, 1 differences, 2 trouble; after 2 the output is incomplete.`,
		Example: `  dmsnap diff disk.img disk.cow
  dmsnap diff --verify disk.img monday.cow tuesday.cow
  dmsnap diff 'vm.img#vg0/before' 'vm.img#vg0/later'
  dmsnap diff --format ranges --verify disk.img disk.cow | while read off len; do
      dd if=disk.img of=copy.img iflag=skip_bytes,count_bytes oflag=seek_bytes conv=notrunc \
         skip=$off seek=$off count=$len status=none
  done`,
		Args: cobra.RangeArgs(1, 3),
		RunE: func(c *cobra.Command, args []string) error {
			if o.asJSON {
				o.format = "json"
			}
			return o.run(c, args)
		},
	}
	f := c.Flags()
	f.StringVar(&o.format, "format", "text", "text, ranges, json or bitmap")
	f.Var(&o.granule, "granularity", "bytes for each bit of a bitmap, a power of two (default 64KiB)")
	f.BoolVar(&o.asJSON, "json", false, "the same as --format json")
	f.BoolVar(&o.verify, "verify", false, "compare the content of ranges that may differ")
	o.disk.add(f)
	f.BoolVar(&o.liveRead, "live-read", false, "read an origin and stores that are in use")
	c.MarkFlagsMutuallyExclusive("json", "format")
	return c
}

// printer returns the printer of the requested format.
func (o *diffOptions) printer(w io.Writer, size int64) (diff.Printer, error) {
	switch o.format {
	case "text":
		return diff.NewTextPrinter(w, size, o.verify), nil
	case "ranges":
		return diff.NewRangePrinter(w), nil
	case "json":
		return diff.NewJSONPrinter(w, size), nil
	case "bitmap":
		return diff.NewBitmapPrinter(w, size, cmp.Or(o.granule.bytes, 64<<10))
	}
	return nil, fmt.Errorf("--format %q: must be text, ranges, json or bitmap", o.format)
}

func (o *diffOptions) run(c *cobra.Command, args []string) (err error) {
	if _, err := o.printer(nil, 0); err != nil {
		return err // before anything is opened
	}
	sides, err := o.disk.openSides(args, o.liveRead)
	if err != nil {
		return err
	}
	defer sides.Close()
	var stores []*store.Store
	for i, cow := range sides.COWs {
		st, err := loadStore(sides.Names[i], cow, o.liveRead)
		if err == nil {
			err = about(sides.Names[i], st.CheckOrigin(sides.Origin.Size()))
		}
		if err != nil {
			return err
		}
		stores = append(stores, st)
	}
	d, err := diffOf(sides.Origin, stores)
	if err != nil {
		return err
	}
	ctx, stop := untilSignal()
	defer stop()
	barOn := c.ErrOrStderr()
	if _, lines := progress.Terminal(c.OutOrStdout()); lines {
		barOn = io.Discard // the ranges go by on the same screen
	}
	return o.print(ctx, c.OutOrStdout(), d, progress.New(barOn, "diff"))
}

func diffOf(origin block.Device, stores []*store.Store) (*diff.Diff, error) {
	if len(stores) == 2 {
		return diff.Between(origin, stores[0], stores[1])
	}
	return diff.New(origin, stores[0])
}

// print hands the extents to the printer and returns errNo when something differs.
func (o *diffOptions) print(ctx context.Context, out io.Writer, d *diff.Diff, bar *progress.Bar) error {
	w := bufio.NewWriterSize(out, 64<<10)
	p, err := o.printer(w, d.Size())
	if err != nil {
		return err
	}
	differs, err := d.Print(ctx, p, o.verify, bar.Show)
	bar.End()
	if err = errors.Join(err, w.Flush()); err != nil {
		return err
	}
	if differs {
		return errNo
	}
	return nil
}
