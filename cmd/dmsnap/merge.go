package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
)

// mergeResult is what an offline merge prints as JSON.
type mergeResult struct {
	DryRun       bool   `json:"dry_run"`
	ChunkSectors uint32 `json:"chunk_sectors"`
	Chunks       uint64 `json:"chunks"`         // exceptions to merge
	Runs         uint64 `json:"runs"`           // consecutive on both sides
	Bytes        int64  `json:"bytes"`          // to copy to the origin
	Ranges       uint64 `json:"ranges"`         // ranges of the origin that are overwritten
	UndoBytes    int64  `json:"undo_bytes"`     // size of an undo store
	Undo         string `json:"undo,omitempty"` // its path

	Siblings []mergeSibling `json:"siblings,omitempty"`        // other snapshots that preserve what is overwritten
	Others   []string       `json:"other_snapshots,omitempty"` // stores in the same folder that do not
}

// mergeSibling is a sibling of an offline merge as JSON.
type mergeSibling struct {
	COW     string `json:"cow"`
	Invalid bool   `json:"invalid,omitempty"` // there is nothing to preserve
	Chunks  uint64 `json:"chunks"`            // to preserve
	Free    uint64 `json:"free_chunks"`       // that there is room for
}

// offlineMerge holds the options of an offline merge.
type offlineMerge struct {
	dryRun, force, asJSON bool
	disk                  diskFlags
	undo                  string
	siblings              []string
}

func newMerge() *cobra.Command {
	var o offlineMerge
	var live liveMerge
	c := &cobra.Command{
		Use:   "merge {ORIGIN COW | DISK#VG/SNAPSHOT | --control PATH [NAME]}",
		Short: "Merge a snapshot back into its origin",
		Long: `Merge a snapshot back into its origin: afterwards the origin has the content of the snapshot, and the store is
empty.

ORIGIN COW merges offline. The merge may be interrupted or killed at any time: run the same command again, and it
continues. Until it is complete, ORIGIN alone is a mixture of old and new content. A merge that is refused (an
invalid store, an origin that is too small, a store in use) changes nothing.

Other snapshots of ORIGIN change with it: where they have no exceptions of their own they show the new content of ORIGIN,
mixed with what they have. --sibling COW, once for each, preserves them: before a block of ORIGIN is overwritten, each
keeps the old one in its COW, as with a write to a served ORIGIN. The merge is refused when one of them has no room for
that. Stores in the folders of ORIGIN and COW that may be other snapshots of ORIGIN are named in a warning.

DISK#VG/SNAPSHOT merges a snapshot volume into its origin inside DISK, without root or activation; all other snapshots of
that origin are preserved. The volume group is not changed: SNAPSHOT stays, as an empty snapshot. ORIGIN may be
DISK#VG/LV or DISK#pN, with COW a file. A group that is active on this host is refused.

--undo FILE saves what is overwritten, as a store: dmsnap merge ORIGIN FILE undoes the merge, and until then dmsnap
export ORIGIN FILE or a read-only serve shows the origin as it was. FILE gets its name when it is complete and
durable, and only then does the merge begin; without enough space for FILE nothing is merged. To continue after an
interruption, run the same command again: a FILE that belongs to this merge is used as it is; any other existing
FILE is refused, or replaced with --force. Undoing an incomplete merge loses the chunks of COW that were already
merged, unless it is done with an --undo of its own.

Until the merge is complete, the file ORIGIN.merging beside ORIGIN says so: inspect shows it, and serving ORIGIN with
another COW, or merging another COW into it, is refused without --force. A live merge makes it too; snapshots that
were served beside it are not refused. A block device has no such file.

--dry-run shows how much there is to merge, in how many ranges, and the size of an undo store.

--control PATH NAME starts the live merge of a served snapshot. Clients continue: the origin shows the merged
content at once, and the export of the snapshot continues as the origin. Without NAME, the current merge is meant.
--pause and --resume control it; --wait waits until it is complete. To be able to undo a live merge, create a
snapshot before it (dmsnap snapshot --create): merging that one restores the origin.`,
		Example: `  dmsnap merge --dry-run disk.img disk.cow
  dmsnap merge disk.img disk.cow
  dmsnap merge disk.img more.cow --undo before.cow
  dmsnap merge disk.img vm1.cow --sibling monday.cow --sibling tuesday.cow
  dmsnap merge vm.img#vg0/before
  dmsnap merge --control ctl.sock vm1 --wait`,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case live.control == "" && (len(args) == 0 || len(args) > 2):
				return errors.New("ORIGIN and COW are required, or DISK#VG/SNAPSHOT, or --control PATH")
			case live.control == "" && (live.pause || live.resume || live.wait):
				return errors.New("--pause, --resume and --wait require --control PATH")
			case live.control != "" && len(args) > 1:
				return errors.New("with --control, at most one NAME is accepted")
			case live.control != "" && (o.dryRun || o.undo != "" || o.disk.raw):
				return errors.New("--dry-run, --undo and --raw are for an offline merge")
			case live.control != "" && (o.force || len(o.siblings) > 0):
				return errors.New("--force and --sibling are for an offline merge")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if live.control != "" {
				return live.run(c, args, o.asJSON)
			}
			return o.run(c, args)
		},
	}
	f := c.Flags()
	f.BoolVarP(&o.dryRun, "dry-run", "n", false, "show what would be merged, write nothing")
	f.StringArrayVar(&o.siblings, "sibling", nil, "preserve what another snapshot of ORIGIN, with this COW, shows (repeatable)")
	f.StringVar(&o.undo, "undo", "", "save what is overwritten in this store")
	f.BoolVar(&o.force, "force", false, "replace an undo FILE that does not belong to this merge, and merge files that are mounted or used by other devices, and into an origin with an incomplete merge of another COW")
	o.disk.addRaw(f)
	o.disk.addPVs(f)
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	f.StringVar(&live.control, "control", "", "merge a served snapshot, in the server with this control socket")
	f.BoolVar(&live.pause, "pause", false, "pause the live merge")
	f.BoolVar(&live.resume, "resume", false, "continue a live merge that was paused or failed")
	f.BoolVar(&live.wait, "wait", false, "wait until the live merge is complete")
	c.MarkFlagsMutuallyExclusive("pause", "resume")
	c.MarkFlagsMutuallyExclusive("pause", "wait")
	return c
}

func (o *offlineMerge) run(c *cobra.Command, args []string) error {
	ctx, stop := untilSignal()
	defer stop()
	in, err := o.open(args)
	if err != nil {
		return advise(err)
	}
	res := mergeResult{DryRun: o.dryRun, Undo: o.undo}
	work, err := o.merge(ctx, c, in, &res)
	if err := errors.Join(err, about(in.cowName, in.Close())); err != nil {
		return err
	}
	res.ChunkSectors, res.Chunks, res.Runs, res.Ranges = work.ChunkSectors, work.Chunks, work.Runs, work.Ranges
	res.Bytes, res.UndoBytes = work.Bytes, work.UndoBytes
	if o.asJSON {
		return printJSON(c, res)
	}
	return res.print(c, in.originName, in.cowName)
}

func (res mergeResult) print(c *cobra.Command, originPath, cowPath string) error {
	what := fmt.Sprintf("%d chunks in %d runs, %s", res.Chunks, res.Runs, bytesText(res.Bytes))
	if res.DryRun {
		if err := printf(c, "%s: to merge: %s; %d ranges of %s are overwritten; an undo store takes %s\n", cowPath, what,
			res.Ranges, originPath, bytesText(res.UndoBytes)); err != nil {
			return err
		}
		return res.printSiblings(c, "is to preserve %d chunks, with room for %d")
	}
	if err := printf(c, "%s: merged %s\n", cowPath, what); err != nil {
		return err
	}
	if err := res.printSiblings(c, "preserved %d chunks, with room for %d before"); err != nil || res.Undo == "" {
		return err
	}
	return printf(c, "%s: has what was overwritten; to undo the merge: dmsnap merge %s %s\n", res.Undo, originPath, res.Undo)
}

func (res mergeResult) printSiblings(c *cobra.Command, format string) error {
	for _, s := range res.Siblings {
		text := "is invalid: there is nothing to preserve"
		if !s.Invalid {
			text = fmt.Sprintf(format, s.Chunks, s.Free)
		}
		if err := printf(c, "%s: %s\n", s.COW, text); err != nil {
			return err
		}
	}
	return nil
}

// merge does what was asked for.
func (o *offlineMerge) merge(ctx context.Context, c *cobra.Command, in *mergeInputs, res *mergeResult) (merge.Work, error) {
	origin, cow, inputs := in.origin, in.cow, in.files
	work, err := merge.Plan(origin, cow)
	if err != nil {
		return work, about(in.cowName, err)
	}
	if err := in.planSiblings(o.undo, res, work); err != nil {
		return work, err
	}
	half, err := o.sideFile(inputs[0], cow)
	if err != nil {
		return work, about(in.cowName, advise(err))
	}
	if o.dryRun {
		if err := o.checkUndo(in); err != nil {
			return work, err
		}
		in.warnOfOthers(c, res, o.asJSON)
		return work, nil
	}
	var begun *merge.SideFile
	if half != nil {
		// An undo store is known by a label that making an undo store of its own replaces: it is noted before.
		if err := o.checkUndo(in); err != nil {
			return work, err
		}
		if begun, err = o.begin(c, in); err != nil {
			return work, err
		}
	}
	if o.undo != "" {
		kept, err := o.keep(ctx, c, in, work.UndoBytes)
		if err != nil {
			if begun != nil {
				err = errors.Join(err, begun.Cancel(inputs[0]))
			}
			return work, err
		}
		defer kept.Close() // nothing is written to it
	}
	if half == nil && work.Chunks > 0 {
		if begun, err = o.begin(c, in); err != nil {
			return work, err
		}
	}
	var completed func() error
	if begun != nil {
		if err := begun.Undo(inputs[0], cow); err != nil {
			return work, about(inputs[0], err)
		}
		completed = func() error { return about(inputs[0], begun.End(inputs[0], cow)) }
	}
	in.warnOfOthers(c, res, o.asJSON)
	work, err = mergeDevices(ctx, c, origin, cow, in.siblings, completed)
	return work, about(in.cowName, err)
}

// sideFile returns the side file that an earlier part of this merge has left beside the origin, or nil. One of another
// merge refuses this one, unless forced.
func (o *offlineMerge) sideFile(originPath string, cow block.Device) (*merge.SideFile, error) {
	half, err := merge.ReadSideFile(originPath)
	if err == nil && half != nil {
		err = half.Check(cow)
	}
	if o.force && errors.Is(err, merge.ErrUnfinished) {
		return nil, nil
	}
	return half, err
}

// begin writes the side file. If none can be made, it prints a warning and returns nil.
func (o *offlineMerge) begin(c *cobra.Command, in *mergeInputs) (*merge.SideFile, error) {
	begun, err := merge.Begin(in.files[0], in.cowName, in.cow, o.force)
	if errors.Is(err, merge.ErrNoSideFile) {
		fmt.Fprintf(c.ErrOrStderr(), "dmsnap: warning: %v: if this merge is interrupted, nothing but the store shows that %s is a mixture\n", err, in.originName)
		return nil, nil
	}
	return begun, about(in.cowName, err)
}

func mergeDevices(ctx context.Context, c *cobra.Command, origin, cow block.Device, siblings []merge.Sibling, completed func() error) (merge.Work, error) {
	bar := newProgress(c.ErrOrStderr(), "merge")
	work, err := merge.Offline(ctx, origin, cow, merge.Options{Siblings: siblings, Completed: completed, Progress: func(p merge.Progress) {
		bar.show(p.MergedBytes(), p.TotalBytes())
	}})
	bar.end()
	if i := (interrupted{}); errors.As(err, &i) {
		err = fmt.Errorf("%w; nothing is lost: run the merge again to continue", err)
	}
	return work, err
}
