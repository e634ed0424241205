// Command dmsnap makes, serves, watches, exports and merges copy-on-write snapshots in the format of
// the Linux device-mapper's persistent exception store, without the kernel's help.
//
// A verb is a file of this folder. What an exit status means is decided in exit.go, how devices are
// opened in open.go.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is the whole program: it obeys args and returns the exit status.
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

// checkedHelp makes help one write. failed returns its error: cobra has no place for it.
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
		Long: `dmsnap takes a disk image or block device and puts a copy-on-write snapshot beside it, in the on-disk
format of the Linux device-mapper (dm-snapshot, "P" and "PO"). It serves origin and snapshots over
NBD, tells how they fare, exports their content, and merges a snapshot back, offline or live.

Where both are needed the order is always ORIGIN COW. Sizes take suffixes: 4096, 16s (sectors), 4KiB,
64M, 10GiB.

Exit status: 0 done or yes, 1 no, 2 trouble (usage, I/O, refused), 129, 130 or 143 cut short by a signal.`,
		Example: `  dmsnap create disk.img disk.cow
  dmsnap serve disk.img disk.cow --socket /tmp/dmsnap.sock --export-origin
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
	root.AddCommand(newCreate(), newServe(), newStatus(), newSnapshot(), newGrow(), newDrop(), newExport(), newDiff(), newList(), newMap(), newInspect(), newRescue(), newMerge(), newCheck(), newDump(), newRestore(), newRepair(), newCompact(), newVersion(), newMan())
	return root
}

// printJSON writes v to the verb's standard output.
func printJSON(c *cobra.Command, v any) error {
	e := json.NewEncoder(c.OutOrStdout())
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printf writes to the verb's standard output. The error is worth returning where nothing else is
// left to do.
func printf(c *cobra.Command, format string, args ...any) error {
	_, err := fmt.Fprintf(c.OutOrStdout(), format, args...)
	return err
}
