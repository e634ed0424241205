// Command dmsnap creates, serves, checks, exports and merges copy-on-write snapshots in the on-disk format of the Linux
// device-mapper, in userspace.
//
// Each verb has a file in this folder; those that ask the daemon of a fleet are in fleet.go. Exit statuses are decided in exit.go, opening devices in open.go.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"

	"github.com/spf13/cobra"
)

func main() {
	if len(os.Args) > 1 && slices.Contains([]string{"status", "list", "diff", "check", "merge", "compact", "dump", "inspect"}, os.Args[1]) {
		collectBySize()
	}
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// collectBySize has the collector run seldom while the heap is small, where a run takes longer than what loads a store, and
// often when it is large: then a store is almost all of it, in memory without pointers, and that saves a fifth.
func collectBySize() {
	const small = 32 << 20 // bytes
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	percent := 0
	var tune func(*[1]*int)
	tune = func(*[1]*int) {
		metrics.Read(live)
		now := 25
		if live[0].Value.Uint64() < small {
			now = 300
		}
		if now != percent {
			percent = now
			debug.SetGCPercent(percent)
		}
		runtime.SetFinalizer(new([1]*int), tune) // after the next collection
	}
	tune(nil)
}

// run executes the program with args and returns the exit status.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(append([]string{}, args...)) // nil would mean os.Args
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	helpFailed := checkedHelp(root)
	err := root.Execute()
	return exitStatus(errors.Join(err, helpFailed()), stderr)
}

// checkedHelp writes help in one write. failed returns its error, which cobra drops.
func checkedHelp(root *cobra.Command) (failed func() error) {
	var err error
	help := root.HelpFunc()
	root.SetHelpFunc(func(c *cobra.Command, args []string) {
		var text bytes.Buffer
		out := c.OutOrStdout()
		c.SetOut(&text)
		help(c, args)
		c.SetOut(out)
		_, err = out.Write(text.Bytes())
	})
	return func() error { return err }
}

// newRoot returns the command with all its verbs.
func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "dmsnap",
		Short: "Device-mapper snapshots in userspace",
		Long: `dmsnap keeps copy-on-write snapshots of disk images and block devices, in the on-disk format of the Linux
device-mapper (dm-snapshot, "P" and "PO"). It serves an origin and its snapshots over NBD, shows their status, exports
their content, and merges a snapshot back into its origin, offline or live.

The order of arguments is always ORIGIN COW. Sizes have suffixes: 4096, 16s (sectors), 4KiB, 64M, 10GiB.

Exit status: 0 done or yes, 1 no, 2 trouble (usage, I/O, refused), 129, 130 or 143 interrupted by a signal.`,
		Example: `  dmsnap create disk.img new.cow
  dmsnap serve disk.img disk.cow --socket nbd.sock --export-origin
  dmsnap status disk.cow
  dmsnap merge disk.img disk.cow`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			c.SetOut(c.ErrOrStderr())
			c.Help()
			return errors.New("no verb given")
		},
	}
	for _, g := range []struct {
		id, title string
		verbs     []*cobra.Command
	}{
		{"serve", "Serve and control:", []*cobra.Command{newCreate(), newServe(), newStatus(), newTop(), newSnapshot(), newDrop(), newGrow(), newMerge(), newMount(), newUmount(), newAttach(), newDetach()}},
		{"fleet", "Fleets of forked disks:", []*cobra.Command{newDaemon(), newDisk(), newTree(), newFork(), newCheckpoint(), newRollback(), newSquash(), newAdopt(), newPolicy(), newTable()}},
		{"inspect", "Inspect and check:", []*cobra.Command{newInspect(), newCheck(), newDiff(), newList(), newMap(), newDump()}},
		{"recover", "Recover:", []*cobra.Command{newRescue(), newRepair(), newRestore()}},
		{"move", "Move:", []*cobra.Command{newExport(), newImport(), newSend(), newReceive(), newPush(), newPull(), newCache(), newCompact()}},
	} {
		root.AddGroup(&cobra.Group{ID: g.id, Title: g.title})
		for _, v := range g.verbs {
			v.GroupID = g.id
			root.AddCommand(v)
		}
	}
	root.AddCommand(newVersion(), newMan())
	return root
}

// printJSON writes v to the verb's standard output.
func printJSON(c *cobra.Command, v any) error {
	e := json.NewEncoder(c.OutOrStdout())
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printResult writes v as JSON, or the text of a format.
func printResult(c *cobra.Command, asJSON bool, v any, format string, args ...any) error {
	if asJSON {
		return printJSON(c, v)
	}
	return printf(c, format, args...)
}

// A report is a result that is printed as JSON or as text.
type report interface{ WriteText(w io.Writer) error }

// printReport writes r as JSON or as text.
func printReport(c *cobra.Command, asJSON bool, r report) error {
	if asJSON {
		return printJSON(c, r)
	}
	return r.WriteText(c.OutOrStdout())
}

// printf writes to the verb's standard output.
func printf(c *cobra.Command, format string, args ...any) error {
	_, err := fmt.Fprintf(c.OutOrStdout(), format, args...)
	return err
}
