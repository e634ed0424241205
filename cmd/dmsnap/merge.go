package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/offline"
)

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
keeps the old one in its COW, as with a write to a served ORIGIN. The merge is refused when one of them has no space for
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
	keep, bar := progress.New(c.ErrOrStderr(), "keep"), progress.New(c.ErrOrStderr(), "merge")
	opts := offline.MergeOptions{DryRun: o.dryRun, Force: o.force, Undo: o.undo, Siblings: o.siblings, Raw: o.disk.raw, PVs: o.disk.pvs,
		UndoProgress: keep.Show,
		Progress: func(done, total int64) {
			keep.End()
			bar.Show(done, total)
		},
		NoSideFile: func(origin string, err error) {
			keep.End()
			fmt.Fprintf(c.ErrOrStderr(), "dmsnap: warning: %v: if this merge is interrupted, nothing but the store shows that %s is a mixture\n", err, origin)
		},
		UndoLost: func(l merge.LostUndo) {
			keep.End()
			fmt.Fprintf(c.ErrOrStderr(), "dmsnap: warning: %v\n", l)
		},
	}
	if !o.asJSON { // JSON has them in a field
		opts.Others = func(origin string, paths []string) {
			keep.End()
			fmt.Fprintf(c.ErrOrStderr(), "dmsnap: warning: if they are snapshots of %s, these are changed by the merge: %s; --sibling COW preserves one\n",
				origin, strings.Join(paths, ", "))
		}
	}
	res, err := offline.Merge(ctx, args, opts)
	keep.End()
	bar.End()
	if err != nil {
		return advise(err)
	}
	if o.asJSON {
		return printJSON(c, res)
	}
	if err := res.WriteText(c.OutOrStdout()); err != nil || o.dryRun || res.Undo == "" {
		return err
	}
	return printf(c, "%s: has what was overwritten; to undo the merge: dmsnap merge %s %s\n", res.Undo, res.Origin, res.Undo)
}
