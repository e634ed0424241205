package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/lvm"
)

type rescueOptions struct {
	force, dryRun, asJSON, liveRead bool
	disk                            diskFlags
	revalidate, inPlace             bool
	mapFile, undo                   string
	chunkSize                       sizeFlag
}

func newRescue() *cobra.Command {
	var o rescueOptions
	c := &cobra.Command{
		Use:   "rescue {ORIGIN COW OUT | SNAPSHOT OUT | --revalidate COW NEWCOW | --revalidate COW --in-place --undo FILE}",
		Short: "Recover data from an invalid or damaged snapshot",
		Long: `Recover the data of an invalid or damaged snapshot. OUT, a sparse raw image ("-" is standard output), gets
everything that can be read, and each range has a class:

  certain    the content of the snapshot: the chunk has an exception, written before the store became invalid
  doubtful   the current content of the origin: it may have been overwritten since
  lost       unreadable; the image has zeros there

--map FILE writes the classes as a table ("OFFSET LENGTH CLASS" in bytes), as JSON if FILE ends in .json, or as a
picture of the disk if it ends in .svg or .png; "-" is standard output.
SNAPSHOT is the address of a snapshot volume of LVM in a disk, DISK#VG/SNAP, and stands for its origin and its COW volume.

--dry-run reads only the store. With --chunk-size, a damaged header is ignored.

--revalidate makes a store that is marked invalid loadable again, by a kernel, LVM or dmsnap serve: a copy of it,
NEWCOW, or with --in-place the store itself, after --undo FILE holds what is overwritten; dmsnap repair COW
--undo-apply FILE undoes that. It recovers nothing that was lost: doubtful ranges then look like all others, and
can't be distinguished any more. Write a map first, and consider it before you merge such a store.

Nothing is written to ORIGIN nor, without --in-place, to COW. An ORIGIN or COW in use is refused; --live-read reads
it nevertheless, and then only chunks with an exception are certain.`,
		Example: `  dmsnap rescue disk.img invalid.cow old.img --map old.map
  dmsnap rescue --dry-run disk.img invalid.cow
  dmsnap rescue 'vm.img#vg0/later' later.img
  dmsnap rescue --revalidate invalid.cow again.cow
  dmsnap rescue --revalidate invalid.cow --in-place --undo invalid.undo`,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case !o.revalidate && o.inPlace:
				return errors.New("--in-place requires --revalidate")
			case o.inPlace != (o.undo != ""):
				return errors.New("--in-place and --undo FILE require each other")
			case o.inPlace && len(args) != 1:
				return errors.New("--in-place takes one COW and no NEWCOW")
			case o.revalidate && !o.inPlace && len(args) != 2:
				return errors.New("--revalidate requires COW and NEWCOW, or COW and --in-place --undo FILE")
			case !o.revalidate && (len(args) > 3 || len(args) < 2 && !(o.dryRun && len(args) == 1)):
				return errors.New("ORIGIN, COW and OUT are required, or the address of a snapshot volume and OUT")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if o.revalidate {
				return o.markValid(c, args)
			}
			return o.run(c, args)
		},
	}
	f := c.Flags()
	f.BoolVar(&o.force, "force", false, "replace OUT, NEWCOW, the map and the undo file if they exist")
	f.BoolVarP(&o.dryRun, "dry-run", "n", false, "show what would be certain, read no data, write nothing")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	f.BoolVar(&o.revalidate, "revalidate", false, "make an invalid store loadable again, in a copy")
	f.BoolVar(&o.inPlace, "in-place", false, "revalidate COW itself")
	f.StringVar(&o.undo, "undo", "", "save what --in-place overwrites in this file")
	f.BoolVar(&o.liveRead, "live-read", false, "read an origin and a store that are in use")
	f.StringVar(&o.mapFile, "map", "", "write the class of each range to this file")
	f.Var(&o.chunkSize, "chunk-size", "use this chunk size instead of the one in the header")
	o.disk.add(f)
	c.MarkFlagsMutuallyExclusive("revalidate", "map")
	c.MarkFlagsMutuallyExclusive("revalidate", "dry-run")
	c.MarkFlagsMutuallyExclusive("in-place", "live-read")
	return c
}

// rescued is what is rescued from, and where to.
type rescued struct {
	*source.Sides
	inputs []string // names of what is read: ORIGIN COW, or a snapshot volume
	out    string   // empty: there is none
}

// open opens what args name.
func (o *rescueOptions) open(args []string) (r rescued, err error) {
	r.inputs = args[:max(1, len(args)-1)]
	o.disk.incomplete = true
	if r.Sides, err = o.disk.openSides(r.inputs, o.liveRead); errors.Is(err, lvm.ErrNoSnapshot) && o.dryRun && len(args) == 2 {
		r.inputs = args // and no OUT
		r.Sides, err = o.disk.openSides(args, o.liveRead)
	}
	if errors.Is(err, lvm.ErrNoSnapshot) && !o.dryRun {
		err = fmt.Errorf("%w, in front of OUT", err)
	}
	if len(r.inputs) < len(args) {
		r.out = args[len(args)-1]
	}
	return r, err
}

func (o *rescueOptions) run(c *cobra.Command, args []string) (err error) {
	if !o.dryRun && args[len(args)-1] == standardOutput {
		if err := checkNoTerminal(c, "redirect it"); err != nil {
			return err
		}
	}
	from, err := o.open(args)
	if err != nil {
		return err
	}
	defer from.Close()
	cowName := from.Names[0]
	look := rescue.Options{Live: o.liveRead && (block.HasWriter(fileOf(from.inputs[0])) || block.HasWriter(fileOf(cowName)))}
	if o.chunkSize.set {
		if look.ChunkSectors, err = o.chunkSize.chunkSectors(); err != nil {
			return err
		}
	}
	if o.mapFile != "" {
		if err := o.checkMap(from); err != nil {
			return err
		}
	}
	ctx, stop := untilSignal()
	defer stop()
	r, err := rescue.Open(ctx, from.Origin, from.COWs[0], look)
	if err != nil {
		return about(cowName, err)
	}
	var ranges []rescue.Range
	if o.dryRun {
		ranges = r.Plan()
	} else {
		bar := progress.New(c.ErrOrStderr(), "rescue")
		ranges, err = o.writeImage(ctx, c, r, from, func(out block.Device) ([]rescue.Range, error) {
			return r.Write(ctx, out, func(done int64) { bar.Show(done, r.Size()) })
		})
		bar.End()
		if err != nil {
			return err
		}
	}
	return o.printResult(c, r, ranges, from)
}

// all are the names of what is read and written.
func (r rescued) all() []string {
	if r.out == "" {
		return r.inputs
	}
	return append(slices.Clone(r.inputs), r.out)
}

// checkMap refuses a map that can't be written, before there is any work.
func (o *rescueOptions) checkMap(from rescued) error {
	if from.out != "" && filepath.Clean(from.out) == filepath.Clean(o.mapFile) {
		return fmt.Errorf("%s: the image and its map can't be the same file", o.mapFile)
	}
	switch {
	case o.mapFile != standardOutput:
		return checkOutput(o.mapFile, o.force, from.all())
	case o.asJSON:
		return errors.New("--map - and --json can't both go to standard output")
	}
	return nil
}

// writeImage has fill write the image to OUT.
func (o *rescueOptions) writeImage(ctx context.Context, c *cobra.Command, r *rescue.Rescue, from rescued,
	fill func(block.Device) ([]rescue.Range, error)) (ranges []rescue.Range, err error) {
	if from.out == standardOutput {
		err = writeImageToStandardOutput(ctx, c, from.inputs, r.Size(), func(out block.Device) error {
			ranges, err = fill(out)
			return err
		})
		return ranges, err
	}
	err = writeOutputDevice(from.out, o.force, from.inputs, r.Size(), func(f *block.File) error {
		ranges, err = fill(f)
		return err
	})
	return ranges, imageAdvice(err, "dmsnap rescue ORIGIN COW -")
}

// printResult prints the totals, and writes the map.
func (o *rescueOptions) printResult(c *cobra.Command, r *rescue.Rescue, ranges []rescue.Range, from rescued) error {
	if o.mapFile != "" {
		write := func(w io.Writer) error { return rescue.WriteMap(w, ranges, filepath.Ext(o.mapFile)) }
		if err := writePicture(c, o.mapFile, o.force, from.all(), write); err != nil {
			return err
		}
	}
	result := r.Result(ranges)
	if o.asJSON {
		return printJSON(c, result)
	}
	return result.WriteText(c.OutOrStdout(), cmp.Or(from.out, from.Names[0]), from.inputs[0])
}

// markValid makes a valid copy of a store, or marks the store itself valid.
func (o *rescueOptions) markValid(c *cobra.Command, args []string) (err error) {
	ctx, stop := untilSignal()
	defer stop()
	o.disk.remote.Context = ctx
	r := offline.RepairOptions{Force: o.force}
	var res offline.RevalidateResult
	if o.inPlace {
		if !o.asJSON { // what is not certain can't be distinguished afterwards
			r.Explain = func(about string) error { return printf(c, "%s\n", about) }
		}
		res, err = offline.RevalidateInPlace(ctx, args[0], o.undo, r)
	} else if r.Source, err = o.disk.options(block.Options{Lock: readingLock(o.liveRead)}); err == nil {
		res, err = offline.Revalidate(ctx, args[0], args[1], r)
	}
	if err != nil {
		return adviseLive(advise(withOutputAdvice(err)), o.liveRead || o.inPlace)
	}
	err = printReport(c, o.asJSON, res)
	if err == nil && res.Changed && o.inPlace && !o.asJSON {
		err = printf(c, "to undo this: dmsnap repair %s --undo-apply %s\n", args[0], o.undo)
	}
	return err
}
