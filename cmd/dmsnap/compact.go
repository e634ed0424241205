package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/store"
)

type compactOptions struct {
	dropUnchanged, punch, force, asJSON bool
	origin                              string
	disk                                diskFlags
	chunkSize                           sizeFlag
}

func newCompact() *cobra.Command {
	var o compactOptions
	c := &cobra.Command{
		Use:   "compact {COW NEWCOW | COW --punch}",
		Short: "Make a dense copy of a store, or free its unused space",
		Long: `Copy the store in COW to NEWCOW, dense and in the order of the origin: without gaps between chunks, and without
space for chunks of zeros. The snapshot has the same content through both. NEWCOW is as long as COW, or longer if
chunks of the new size require it. It gets its name when it is complete and durable. An existing file is replaced
only with --force.

--drop-unchanged omits chunks whose content equals that of ORIGIN, for example chunks that were written again with
the same bytes. --chunk-size sets another chunk size: with smaller chunks --drop-unchanged may drop more; for larger
chunks, missing parts are read from ORIGIN.

Give --origin whenever the origin is available. Without it, larger chunks are refused unless each is stored whole,
and smaller chunks may lie after the end of a disk that ends within its last chunk.

COW may be the address of a snapshot volume of LVM in a disk, DISK#VG/SNAP; then the origin is known.

COW --punch copies nothing: it punches holes into the file COW where chunks are that no exception uses, and prints
how much space was freed. The store and its content stay as they are.

A store in use is refused, and so are a damaged one (see dmsnap repair) and an invalid one (see dmsnap rescue).`,
		Example: `  dmsnap compact disk.cow dense.cow --drop-unchanged --origin disk.img
  dmsnap compact disk.cow large.cow --chunk-size 64KiB --origin disk.img
  dmsnap compact disk.cow --punch`,
		Args: func(c *cobra.Command, args []string) error { return o.args(args) },
		RunE: func(c *cobra.Command, args []string) error {
			if o.punch {
				return o.punchFile(c, args[0])
			}
			return o.compactInto(c, args[0], args[1])
		},
	}
	f := c.Flags()
	f.BoolVar(&o.dropUnchanged, "drop-unchanged", false, "omit chunks whose content equals the origin's; requires --origin")
	o.disk.add(f)
	f.StringVar(&o.origin, "origin", "", "the origin of the store; it is only read")
	f.Var(&o.chunkSize, "chunk-size", "size of the new chunks, a power of two from 512 to 1GiB (default: unchanged)")
	f.BoolVar(&o.punch, "punch", false, "free the unused chunks of COW in place")
	f.BoolVar(&o.force, "force", false, "replace NEWCOW when it exists")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	return c
}

func (o *compactOptions) args(args []string) error {
	switch {
	case o.punch && len(args) != 1:
		return errors.New("--punch takes one COW and no NEWCOW")
	case o.punch && (o.dropUnchanged || o.origin != "" || o.chunkSize.set || o.force):
		return errors.New("--punch can be combined only with --json")
	case !o.punch && len(args) != 2:
		return errors.New("COW and NEWCOW are required, or COW and --punch")
	case o.dropUnchanged && o.origin == "" && source.IsFile(args[0]):
		return errors.New("--drop-unchanged requires --origin ORIGIN")
	}
	return nil
}

func (o *compactOptions) compactInto(c *cobra.Command, path, out string) error {
	sectors, err := o.chunkSize.orHeader()
	if err != nil {
		return err
	}
	ctx, stop := untilSignal()
	defer stop()
	o.disk.remote.Context = ctx
	from, err := o.disk.options(block.Options{})
	if err != nil {
		return err
	}
	bar := progress.New(c.ErrOrStderr(), "compact")
	res, err := offline.Compact(ctx, path, out, offline.CompactOptions{Origin: o.origin, Source: from, DropUnchanged: o.dropUnchanged,
		ChunkSectors: sectors, Force: o.force, Progress: bar.Show})
	bar.End()
	if err != nil {
		return helpCompact(err)
	}
	if err := printReport(c, o.asJSON, res); err != nil || o.asJSON || !res.EndUnknown {
		return err
	}
	return printf(c, "if the disk ends between byte %d and byte %d, run this again with --origin, which gives the size of the disk\n",
		res.LastStored.Off, res.LastStored.Off+res.LastStored.Length)
}

// helpCompact names the verb that is the remedy for what compact refuses.
func helpCompact(err error) error {
	switch {
	case errors.Is(err, store.ErrInvalid):
		return fmt.Errorf("%w; dmsnap rescue recovers its data", err)
	case errors.Is(err, compact.ErrDamaged):
		return fmt.Errorf("%w; dmsnap check shows all problems, dmsnap repair makes a sound store from it", err)
	case errors.Is(err, compact.ErrNeedsOrigin):
		return fmt.Errorf("%w; give --origin ORIGIN", err)
	case errors.Is(err, offline.ErrBlockDevice):
		return fmt.Errorf("%w; --punch makes holes in files", err)
	}
	return advise(withOutputAdvice(err))
}

func (o *compactOptions) punchFile(c *cobra.Command, path string) error {
	ctx, stop := untilSignal()
	defer stop()
	bar := progress.New(c.ErrOrStderr(), "punch")
	res, err := offline.Punch(ctx, path, bar.Show)
	bar.End()
	if err != nil {
		return helpCompact(err)
	}
	return printReport(c, o.asJSON, res)
}
