package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/store"
)

type compactOptions struct {
	dropUnchanged, punch, force, asJSON bool
	origin                              string
	disk                                diskFlags
	chunkSize                           sizeFlag
}

// compactResult is what compact prints as JSON.
type compactResult struct {
	Path           string `json:"path"` // of the new store
	ChunkSectors   uint32 `json:"chunk_sectors"`
	Exceptions     uint64 `json:"exceptions"`
	Bytes          int64  `json:"bytes"`           // size of the file
	AllocatedBytes int64  `json:"allocated_bytes"` // space that it takes
	DataBytes      int64  `json:"data_bytes"`
	DroppedBytes   int64  `json:"dropped_bytes"` // in chunks that were stored and are the origin's
	FilledBytes    int64  `json:"filled_bytes"`  // read from the origin to fill larger chunks
	// EndUnknown is set if the last chunk was split into smaller ones without an origin that gives its end.
	EndUnknown bool `json:"end_unknown"`
}

// punchResult is what compact --punch prints as JSON.
type punchResult struct {
	Path           string `json:"path"`
	UnusedBytes    int64  `json:"unused_bytes"`    // that no exception uses: they are holes now
	FreedBytes     int64  `json:"freed_bytes"`     // of them, those that took space before
	AllocatedBytes int64  `json:"allocated_bytes"` // space that the file takes now
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
	opts := compact.Options{DropUnchanged: o.dropUnchanged, ChunkSectors: sectors}
	inputs := []string{path}
	var cow openDisk
	if o.origin != "" {
		origin, err := o.disk.openOrigin(o.origin, path, block.Options{ReadOnly: true})
		if err != nil {
			return err
		}
		defer origin.Close()
		opts.Origin = origin
		inputs = append(inputs, o.origin)
	} else if sides, err := o.disk.openSides([]string{path}, false); err == nil {
		defer sides.Close()
		opts.Origin, cow = sides.Origin, sides.COWs[0]
	} else if !errors.Is(err, lvm.ErrNoSnapshot) {
		return err
	}
	if cow == nil {
		if cow, err = o.disk.openStore(path, block.Options{ReadOnly: true}); err != nil {
			return err
		}
		defer cow.Close()
	}
	if err := checkStore(path, cow); err != nil {
		return err
	}
	ctx, stop := untilSignal()
	defer stop()
	bar := newProgress(c.ErrOrStderr(), "compact")
	opts.Progress = bar.show
	p, err := compact.NewPlan(ctx, cow, opts)
	if err != nil {
		return helpCompact(path, err)
	}
	var made compact.Result
	err = writeOutputDevice(out, o.force, inputs, p.Size(), func(dst *block.File) (err error) {
		made, err = p.Write(ctx, dst)
		return err
	})
	bar.end()
	if block.IsNoSpace(err) {
		return fmt.Errorf("%s: no space for the new store: %w", out, err)
	}
	if err != nil {
		return about(out, err)
	}
	return o.printResult(c, out, p, made)
}

// helpCompact says which verb helps with what compact refuses.
func helpCompact(path string, err error) error {
	switch {
	case errors.Is(err, store.ErrInvalid):
		err = fmt.Errorf("%w; dmsnap rescue recovers its data", err)
	case errors.Is(err, compact.ErrDamaged):
		err = fmt.Errorf("%w; dmsnap check shows all problems, dmsnap repair makes a sound store from it", err)
	case errors.Is(err, compact.ErrNeedsOrigin):
		err = fmt.Errorf("%w; give --origin ORIGIN", err)
	}
	return about(path, err)
}

// printResult prints what became of the store.
func (o *compactOptions) printResult(c *cobra.Command, out string, p *compact.Plan, made compact.Result) error {
	allocated, size, err := spaceOf(out)
	if err != nil {
		return err
	}
	l := p.Layout()
	res := compactResult{out, l.ChunkSectors, made.Exceptions, size, allocated,
		int64(made.Exceptions) << l.Shift(), int64(made.Dropped) << l.Shift(), made.Filled, p.EndUnknown()}
	if o.asJSON {
		return printJSON(c, res)
	}
	text := fmt.Sprintf("%s: %s, %s a chunk; takes %s of %s", out, plural(res.Exceptions, "exception"), bytesText(l.ChunkBytes()), bytesText(allocated), bytesText(size))
	if o.dropUnchanged {
		text += fmt.Sprintf("; %s unchanged and dropped", bytesText(res.DroppedBytes))
	}
	if res.FilledBytes > 0 {
		text += fmt.Sprintf("; %s filled from the origin", bytesText(res.FilledBytes))
	}
	text += "\n"
	if res.EndUnknown {
		off, n := p.LastStored()
		text += fmt.Sprintf("if the disk ends between byte %d and byte %d, run this again with --origin, which gives the size of the disk\n", off, off+n)
	}
	return printf(c, "%s", text)
}

// spaceOf returns how much space a file takes, and its size, in bytes.
func spaceOf(path string) (allocated, size int64, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, 0, err
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512, info.Size(), nil
}

func (o *compactOptions) punchFile(c *cobra.Command, path string) error {
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0 {
		return fmt.Errorf("%s: is a block device; --punch makes holes in files", path)
	}
	cow, err := openDevice(path, block.Options{})
	if err != nil {
		return err
	}
	defer cow.Close()
	if err := checkStore(path, cow); err != nil {
		return err
	}
	ctx, stop := untilSignal()
	defer stop()
	before, _, err := spaceOf(path)
	if err != nil {
		return err
	}
	bar := newProgress(c.ErrOrStderr(), "punch")
	unused, err := compact.Punch(ctx, cow, bar.show)
	bar.end()
	if err != nil {
		return helpCompact(path, err)
	}
	after, _, err := spaceOf(path)
	if err != nil {
		return err
	}
	res := punchResult{path, unused, max(0, before-after), after}
	return printResult(c, o.asJSON, res, "%s: %s freed, of %s that no exception uses; takes %s now\n", path, bytesText(res.FreedBytes), bytesText(unused), bytesText(after))
}
