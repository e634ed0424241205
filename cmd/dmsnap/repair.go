package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/repair"
)

type repairOptions struct {
	chunkSize sizeFlag
	disk      diskFlags
	inPlace   bool
	undo      string
	undoApply string
	force     bool
	asJSON    bool
}

// undoResult is what repair --undo-apply prints as JSON.
type undoResult struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"` // put back
}

func newRepair() *cobra.Command {
	var o repairOptions
	c := &cobra.Command{
		Use:   "repair {COW NEWCOW | COW --in-place --undo FILE | COW --undo-apply FILE}",
		Short: "Make a sound store from a damaged one",
		Long: `Make a sound store from the usable parts of a damaged one, and show what was kept and what was lost, by range of
the origin. dmsnap check finds no problem in the result. Of two slots that use the same chunk, the first is kept;
a lost range shows the current content of the origin.

COW NEWCOW copies into a new file and leaves COW as it is. NEWCOW gets its name when it is complete and durable; an
existing file is replaced only with --force. COW may be the address of a snapshot volume of LVM in a disk: DISK#VG/SNAP.

--in-place changes COW itself, after --undo FILE holds everything that will be overwritten. COW --undo-apply FILE
undoes the repair, also an incomplete one.

With --chunk-size, a damaged header is ignored. A store that is marked invalid is refused: see dmsnap rescue.`,
		Example: `  dmsnap repair damaged.cow sound.cow
  dmsnap repair damaged.cow --in-place --undo damaged.undo
  dmsnap repair damaged.cow --undo-apply damaged.undo`,
		Args: func(c *cobra.Command, args []string) error { return o.args(args) },
		RunE: func(c *cobra.Command, args []string) error {
			if o.undoApply != "" {
				return o.takeBack(c, args[0])
			}
			return o.repair(c, args)
		},
	}
	f := c.Flags()
	f.BoolVar(&o.inPlace, "in-place", false, "repair COW itself")
	f.StringVar(&o.undo, "undo", "", "save what --in-place overwrites in this file")
	f.StringVar(&o.undoApply, "undo-apply", "", "undo the repair that wrote this file")
	f.Var(&o.chunkSize, "chunk-size", "use this chunk size instead of the one in the header")
	f.BoolVar(&o.force, "force", false, "replace NEWCOW, or the undo file, if it exists")
	o.disk.addOpening(f)
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	return c
}

func (o *repairOptions) args(args []string) error {
	switch {
	case o.undoApply != "" && (o.inPlace || o.undo != "" || len(args) != 1):
		return errors.New("--undo-apply FILE takes one COW and no other option")
	case o.undoApply != "":
	case o.inPlace && len(args) != 1:
		return errors.New("--in-place takes one COW and no NEWCOW")
	case o.inPlace && o.undo == "":
		return errors.New("--in-place requires --undo FILE")
	case !o.inPlace && o.undo != "":
		return errors.New("--undo requires --in-place")
	case !o.inPlace && len(args) != 2:
		return errors.New("COW and NEWCOW are required, or COW and --in-place --undo FILE")
	}
	return nil
}

// repair writes a sound copy, or repairs the store itself, which args name.
func (o *repairOptions) repair(c *cobra.Command, args []string) (err error) {
	ctx, stop := untilSignal()
	defer stop()
	o.disk.remote.Context = ctx
	bar := progress.New(c.ErrOrStderr(), "repair")
	saved := false
	r := offline.RepairOptions{Force: o.force, Progress: bar.Show, Saved: func() { saved = true }}
	if r.ChunkSectors, err = o.chunkSize.orHeader(); err != nil {
		return err
	}
	var res repair.Result
	if o.inPlace {
		res, err = offline.RepairInPlace(ctx, args[0], o.undo, r)
	} else if r.Source, err = o.disk.options(block.Options{}); err == nil {
		res, err = offline.Repair(ctx, args[0], args[1], r)
	}
	bar.End()
	switch {
	case errors.Is(err, repair.ErrNeedsChunkSize):
		return fmt.Errorf("%w with --chunk-size", err)
	case err != nil && saved:
		return fmt.Errorf("%w; to undo the changes: dmsnap repair %s --undo-apply %s", err, args[0], o.undo)
	case err != nil:
		return advise(withOutputAdvice(err))
	}
	return printReport(c, o.asJSON, res)
}

// takeBack applies an undo file.
func (o *repairOptions) takeBack(c *cobra.Command, path string) error {
	ctx, stop := untilSignal()
	defer stop()
	n, err := offline.TakeBack(ctx, path, o.undoApply)
	if err != nil {
		return err
	}
	return printResult(c, o.asJSON, undoResult{path, n}, "%s: as it was before: %s put back\n", path, bytesText(n))
}
