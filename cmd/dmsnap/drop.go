package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/server/api"
)

func newDrop() *cobra.Command {
	force := false
	c := asking(&cobra.Command{
		Use:   "drop --control PATH NAME",
		Short: "Detach a snapshot from a served origin, or remove a node or checkpoint of a fleet",
		Long: `Detach a snapshot from a running server, while clients use the others and the origin. Its export ends, acknowledged
writes to it are made durable, and its file is closed. The store stays as it is, but is no longer preserved: after
the next write to the origin it no longer shows the origin's earlier content.

Of a daemon, NAME is a node or a checkpoint (NODE@NAME), which is removed with its files. One on which others lie is
refused. A node whose merge into its disk is not complete is refused too; --force takes the merge back first: the disk gets the
content that it had before.`,
		Example: `  dmsnap drop --control ctl.sock vm1`,
		Args:    cobra.ExactArgs(1),
	}, func(ctx context.Context, ctl *api.Client, args []string) (dropped, error) {
		err := ctl.DropElement(ctx, args[0], force)
		if api.HasCode(err, api.CodeMerging) {
			err = fmt.Errorf("%w; --force takes it back", err)
		}
		return dropped{args[0]}, err
	}, printDropped)
	c.Flags().BoolVar(&force, "force", false, "take back a merge of the node NAME that is not complete")
	return c
}
