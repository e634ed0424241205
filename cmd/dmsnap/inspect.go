package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/text"
)

func newInspect() *cobra.Command {
	var asJSON, check bool
	var disk diskFlags
	c := &cobra.Command{
		Use:   "inspect PATH...",
		Short: "Show what a file or device is and holds, and which verbs apply to it",
		Long: `Show what PATH is: an exception store, with its header, state and figures; a disk, and whether a store with a name
made from its own is beside it (disk.img.cow or disk.cow for disk.img); a disk image that is not raw; an LVM physical
volume, an encrypted disk, a file system, compressed data, text. Then show which commands apply.

Of a disk, list the partitions, and the volume groups of LVM with their volumes, each with its address, type and size;
of a snapshot its origin, the state and fill level of its store; and the reason if a volume can't be read. Volumes in
brackets are parts of others. A group that is on several disks needs all of them: inspect A B C.

PATH may be an address: DISK#p2 shows what is in partition 2.

Of a qcow2 image, list the names of further files, internal snapshots, bitmaps and what is in its disk; with --check,
check the reference counts and tables of the image, as qemu-img check does.

Nothing is written. Files in use are read, too.

Exit status: 0 the format is known, 1 it is unknown or --check found a problem, 2 trouble.`,
		Example: `  dmsnap inspect disk.cow
  dmsnap inspect --json disk.img
  dmsnap inspect vm.img
  dmsnap inspect --check disk.qcow2`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			disk.remote.Context = ctx
			opts, err := disk.options(block.Options{})
			if err != nil {
				return err
			}
			r, err := inspect.Disks(ctx, args, inspect.Options{Source: opts, Check: check, Command: commandOf})
			if err != nil {
				return advise(err)
			}
			if asJSON {
				err = printJSON(c, r)
			} else {
				err = textTo(c).Report(r)
			}
			if err == nil && (!r.Known() || !r.Sound()) {
				err = errNo
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&check, "check", false, "check reference counts and tables of qcow2 images")
	disk.addOpening(c.Flags())
	return c
}

// commands are the words of the command for each action, before and after its arguments.
var commands = map[inspect.Action][2]string{
	inspect.ActionCreate:              {"create", ""},
	inspect.ActionServe:               {"serve", "--socket nbd.sock"},
	inspect.ActionServeWithOrigin:     {"serve", "--export-origin --socket nbd.sock"},
	inspect.ActionServeNew:            {"serve", "--create --socket nbd.sock"},
	inspect.ActionStatus:              {"status", ""},
	inspect.ActionServerStatus:        {"status --control PATH", ""},
	inspect.ActionDiff:                {"diff", ""},
	inspect.ActionMerge:               {"merge", ""},
	inspect.ActionExport:              {"export", ""},
	inspect.ActionRescue:              {"rescue", ""},
	inspect.ActionCheck:               {"check", ""},
	inspect.ActionCheckWithOrigin:     {"check", ""},
	inspect.ActionRepair:              {"repair", ""},
	inspect.ActionRepairWithoutHeader: {"repair", "--chunk-size 4KiB"},
	inspect.ActionUndoRepair:          {"repair COW --undo-apply", ""},
	inspect.ActionDrawMap:             {"map", ""},
	inspect.ActionInspect:             {"inspect", ""},
	inspect.ActionRestore:             {"restore", ""},
}

// commandOf is the command for a step.
func commandOf(s inspect.Step) string {
	args := s.Args
	switch s.Action {
	case inspect.ActionConvert:
		return text.ShellWords(append([]string{"qemu-img", "convert", "-O", "raw"}, args...)...)
	case inspect.ActionCheckWithOrigin:
		args = []string{args[0], "--origin", args[1]}
	}
	words := append([]string{"dmsnap"}, strings.Fields(commands[s.Action][0])...)
	words = append(append(words, args...), strings.Fields(commands[s.Action][1])...)
	for _, pv := range s.PVs {
		words = append(words, "--pv", pv)
	}
	if s.Backing {
		words = append(words, "--follow-backing")
	}
	if s.Data {
		words = append(words, "--data-file", "FILE")
	}
	return text.ShellWords(words...)
}
