package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/top"
)

func newTop() *cobra.Command {
	var control string
	var once, asJSON bool
	var interval time.Duration
	c := &cobra.Command{
		Use:   "top --control PATH",
		Short: "Show a server in the terminal, with rates and time to full",
		Long: `Show what a server or a daemon serves, again and again: how full each COW device is and when it will be full at its
present rate, reads and writes, merges. The arrow keys select an element; the last line has the keys of its actions,
which ask before anything is lost. q ends it.

Rates of reads and writes are those of a server with --http. --once prints one report, which takes an interval, and ends:
then no terminal is required. With --json it is the report as JSON.`,
		Example: `  dmsnap top --control fleet/control.sock --once`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := untilSignal()
			defer stop()
			client := api.NewClient(control)
			if interval <= 0 {
				return fmt.Errorf("--interval %v: must be more than 0", interval)
			}
			if !once && !asJSON {
				if _, ok := progress.Terminal(c.OutOrStdout()); !ok {
					return errors.New("standard output is not a terminal: use --once")
				}
				return top.Run(ctx, client, top.Options{Interval: interval})
			}
			r, err := top.Once(ctx, client, interval)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c, r)
			}
			width := 200
			if f, ok := progress.Terminal(c.OutOrStdout()); ok {
				if n, _, err := term.GetSize(int(f.Fd())); err == nil {
					width = n
				}
			}
			_, err = c.OutOrStdout().Write([]byte(top.Text(r, width)))
			return err
		},
	}
	addControl(c, &control)
	f := c.Flags()
	f.BoolVar(&once, "once", false, "print one report and end")
	f.BoolVar(&asJSON, "json", false, "print one report as JSON and end")
	f.DurationVar(&interval, "interval", time.Second, "time between reports")
	return c
}
