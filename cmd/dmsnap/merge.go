package main

import (
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
	Chunks       uint64 `json:"chunks"` // exceptions that were to be merged
	Runs         uint64 `json:"runs"`   // stretches of them
	Bytes        int64  `json:"bytes"`  // to copy to the origin
}

func newMerge() *cobra.Command {
	var dryRun, asJSON bool
	var live liveMerge
	c := &cobra.Command{
		Use:   "merge {ORIGIN COW | --control PATH [NAME]}",
		Short: "Merge a snapshot back into its origin",
		Long: `Merge a snapshot back into its origin: afterwards the origin has the snapshot's content and the store is
empty.

ORIGIN COW merges offline. It may be interrupted, or killed, at any time: start it again and it goes on
with what is left. Until it is complete, ORIGIN alone is a mixture of old and new. A merge that is refused
(an invalid store, an origin that is too small, a store in use) touches nothing.

--control PATH NAME starts the live merge of a served snapshot. Clients go on: the origin shows the
merged content at once, and the snapshot's export goes on as the origin. Without NAME the merge under way is
meant. --pause and --resume say what to do with it; --wait waits until it is complete.`,
		Example: `  dmsnap merge disk.img disk.cow
  dmsnap merge --dry-run disk.img disk.cow
  dmsnap merge --control /run/dmsnap.ctl snap --wait`,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case live.control == "" && len(args) != 2:
				return errors.New("ORIGIN and COW are needed, or --control PATH")
			case live.control == "" && (live.pause || live.resume || live.wait):
				return errors.New("--pause, --resume and --wait need --control PATH")
			case live.control != "" && len(args) > 1:
				return errors.New("with --control, one NAME at most")
			case live.control != "" && dryRun:
				return errors.New("--dry-run is for an offline merge")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if live.control != "" {
				return live.run(c, args, asJSON)
			}
			return mergeOffline(c, args[0], args[1], dryRun, asJSON)
		},
	}
	f := c.Flags()
	f.BoolVarP(&dryRun, "dry-run", "n", false, "tell what would be merged, write nothing")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	f.StringVar(&live.control, "control", "", "merge live, in the server with this control socket")
	f.BoolVar(&live.pause, "pause", false, "pause the live merge")
	f.BoolVar(&live.resume, "resume", false, "go on with a live merge that was paused or failed")
	f.BoolVar(&live.wait, "wait", false, "wait until the live merge is complete")
	c.MarkFlagsMutuallyExclusive("pause", "resume")
	c.MarkFlagsMutuallyExclusive("pause", "wait")
	return c
}

func mergeOffline(c *cobra.Command, originPath, cowPath string, dryRun, asJSON bool) error {
	origin, cow, both, err := openPair(originPath, cowPath, block.Options{ReadOnly: dryRun})
	if err != nil {
		return err
	}
	work, err := mergeDevices(c, origin, cow, dryRun)
	if err := errors.Join(err, both.Close()); err != nil {
		return about(cowPath, err)
	}
	if asJSON {
		return printJSON(c, mergeResult{dryRun, work.ChunkSectors, work.Chunks, work.Runs, work.Bytes})
	}
	did := "merged"
	if dryRun {
		did = "to merge:"
	}
	return printf(c, "%s: %s %d chunks in %d runs, %s\n", cowPath, did, work.Chunks, work.Runs, bytesText(work.Bytes))
}

func mergeDevices(c *cobra.Command, origin, cow block.Device, dryRun bool) (merge.Work, error) {
	if dryRun {
		return merge.Plan(origin, cow)
	}
	ctx, stop := untilSignal()
	defer stop()
	bar := newProgress(c.ErrOrStderr(), "merge")
	work, err := merge.Offline(ctx, origin, cow, merge.Options{Progress: func(p merge.Progress) {
		bar.show(p.MergedBytes(), p.TotalBytes())
	}})
	bar.end()
	if i := (interrupted{}); errors.As(err, &i) {
		err = fmt.Errorf("%w; nothing is lost: merge again to go on", err)
	}
	return work, err
}
