package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/server/api"
)

func newSnapshot() *cobra.Command {
	var control string
	var create, force, asJSON bool
	var chunkSize sizeFlag
	var kind storeFlag
	c := &cobra.Command{
		Use:   "snapshot --control PATH NAME COW",
		Short: "Attach a snapshot to a served origin",
		Long: `Attach a snapshot to the origin of a running server, while clients write to it. When the command ends, NAME shows the
current content of the origin, and every later write to the origin is first preserved in COW.`,
		Example: `  dmsnap snapshot --control ctl.sock monday monday.cow --create`,
		Args:    cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := chunkSize.chunkSectors(); err != nil {
				return err
			}
			if create && args[1] == standardOutput {
				return newfile.ErrStandardOutput
			}
			cow, err := filepath.Abs(args[1]) // the server may have another working directory
			if err != nil {
				return err
			}
			ctx, stop := untilSignal()
			defer stop()
			s, err := api.NewClient(control).Attach(ctx, api.AttachRequest{
				Name: args[0], COW: cow, Create: create, Force: force, ChunkSize: chunkSize.bytes, Store: kind.String()})
			if api.HasCode(err, api.CodeNotEmpty, api.CodeOriginTooSmall, api.CodeUnfinished) {
				err = fmt.Errorf("%w; --force attaches it nevertheless", err)
			}
			if err != nil {
				return err
			}
			return printResult(c, asJSON, s, "%s  %s\n", printable(s.Name), s.URI)
		},
	}
	f := c.Flags()
	addControl(c, &control)
	f.BoolVar(&create, "create", false, "create the COW file, or the store on it, if missing")
	f.BoolVar(&force, "force", false, "create the store over existing content, and attach a store of a longer disk")
	f.Var(&chunkSize, "chunk-size", "chunk size of a created store (default 4KiB)")
	f.Var(&kind, "store", "P, PO (a full COW refuses writes and the snapshot stays valid) or N (in memory)")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
