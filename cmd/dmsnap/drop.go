package main

import (
	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/server/api"
)

func newDrop() *cobra.Command {
	var control string
	var asJSON bool
	c := &cobra.Command{
		Use:   "drop --control PATH NAME",
		Short: "Detach a snapshot from a served origin",
		Long: `Detach a snapshot from a running server, while clients use the others and the origin. Its export ends, acknowledged
writes to it are made durable, and its file is closed. The store stays as it is, but is no longer preserved: after
the next write to the origin it no longer shows the origin's earlier content.`,
		Example: `  dmsnap drop --control ctl.sock vm1`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			if err := api.NewClient(control).Drop(ctx, args[0]); err != nil {
				return err
			}
			if asJSON {
				return printJSON(c, map[string]string{"dropped": args[0]})
			}
			return printf(c, "%s dropped\n", printable(args[0]))
		},
	}
	c.Flags().StringVar(&control, "control", "", "control socket of the server")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.MarkFlagRequired("control")
	return c
}
