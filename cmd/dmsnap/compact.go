package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/store"
)

type compactOptions struct {
	dropUnchanged, punch, force, asJSON, raw bool
	origin                                   string
	chunkSize                                sizeFlag
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
	// EndUnknown is set where smaller chunks were made of the last one and no origin told where it ends.
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
		Short: "Make a store dense, or free what it does not use",
		Long: `Copy the store in COW to NEWCOW, dense and in the order of the origin: without holes between chunks, and without
space for chunks of zeros. The snapshot shows the same through either. NEWCOW is as long as COW, or longer where
chunks of the new size need it; it appears under its name when it is whole and on disk. An existing file
is replaced with --force only.

--drop-unchanged leaves out chunks whose bytes are those of ORIGIN, such as were written again with the same
content. --chunk-size makes chunks of another size: smaller ones, of which --drop-unchanged may drop more, or larger
ones, for which what was not stored is read from ORIGIN.

Give --origin whenever you have it. Without it larger chunks are refused unless each is stored whole, and smaller
ones may end up behind the end of a disk that ends within its last chunk.

COW --punch copies nothing: it makes holes in the file COW where chunks lie that no exception uses, and tells how
much space that freed. The store and all that it holds stay as they are.

A store in use is refused, a damaged one too (dmsnap repair), and one that is marked invalid (dmsnap rescue).`,
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
	f.BoolVar(&o.dropUnchanged, "drop-unchanged", false, "leave out chunks that hold what the origin holds")
	addRaw(f, &o.raw)
	f.StringVar(&o.origin, "origin", "", "the disk that the store belongs to; it is only read")
	f.Var(&o.chunkSize, "chunk-size", "size of the new chunks, a power of two from 512 to 1GiB (default: as they are)")
	f.BoolVar(&o.punch, "punch", false, "free unused chunks of COW itself")
	f.BoolVar(&o.force, "force", false, "replace NEWCOW when it exists")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	return c
}

func (o *compactOptions) args(args []string) error {
	switch {
	case o.punch && len(args) != 1:
		return errors.New("--punch goes with one COW and no NEWCOW")
	case o.punch && (o.dropUnchanged || o.origin != "" || o.chunkSize.set || o.force):
		return errors.New("--punch copies nothing: no other option but --json goes with it")
	case !o.punch && len(args) != 2:
		return errors.New("COW and NEWCOW are needed, or COW and --punch")
	case o.dropUnchanged && o.origin == "":
		return errors.New("--drop-unchanged needs --origin ORIGIN")
	}
	return nil
}

func (o *compactOptions) compactInto(c *cobra.Command, path, out string) error {
	sectors, err := o.chunkSize.believed()
	if err != nil {
		return err
	}
	opts := compact.Options{DropUnchanged: o.dropUnchanged, ChunkSectors: sectors}
	inputs := []string{path}
	if o.origin != "" {
		if err := checkDifferent(o.origin, path); err != nil {
			return err
		}
		origin, err := openOrigin(o.origin, block.Options{ReadOnly: true}, o.raw)
		if err != nil {
			return err
		}
		defer origin.Close()
		opts.Origin = origin
		inputs = append(inputs, o.origin)
	}
	cow, err := openCompactable(path, true)
	if err != nil {
		return err
	}
	defer cow.Close()
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
		return fmt.Errorf("%s: no room for the new store: %w", out, err)
	}
	if err != nil {
		return about(out, err)
	}
	return o.tell(c, out, p, made)
}

// openCompactable opens a device that holds something like a store.
func openCompactable(path string, readOnly bool) (*block.File, error) {
	cow, err := openDevice(path, block.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	if err := checkStore(path, cow); err != nil {
		cow.Close()
		return nil, err
	}
	return cow, nil
}

// helpCompact says which verb helps with what compact refuses.
func helpCompact(path string, err error) error {
	switch {
	case errors.Is(err, store.ErrInvalid):
		err = fmt.Errorf("%w; dmsnap rescue gets out of it what can be had", err)
	case errors.Is(err, compact.ErrDamaged):
		err = fmt.Errorf("%w; dmsnap check tells all, dmsnap repair makes a sound store of it", err)
	case errors.Is(err, compact.ErrNeedsOrigin):
		err = fmt.Errorf("%w; give --origin ORIGIN", err)
	}
	return about(path, err)
}

// tell prints what became of the store.
func (o *compactOptions) tell(c *cobra.Command, out string, p *compact.Plan, made compact.Result) error {
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
		text += fmt.Sprintf("if the disk ends between byte %d and byte %d, make it again with --origin: nothing else tells where\n", off, off+n)
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
	cow, err := openCompactable(path, false)
	if err != nil {
		return err
	}
	defer cow.Close()
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
	if o.asJSON {
		return printJSON(c, res)
	}
	return printf(c, "%s: %s freed, of %s that no exception uses; takes %s now\n", path, bytesText(res.FreedBytes), bytesText(unused), bytesText(after))
}
