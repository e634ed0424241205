package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/server/api"
)

// serverStatus is status with --control.
func serverStatus(c *cobra.Command, control string, asJSON bool) error {
	ctx, stop := untilSignal()
	defer stop()
	ctl := api.NewClient(control)
	r, err := ctl.Status(ctx)
	if api.HasCode(err, api.CodeNoSuchRequest) {
		d, err := ctl.Daemon(ctx)
		switch {
		case err != nil:
			return err
		case asJSON:
			return printJSON(c, d)
		}
		return textTo(c).Daemon(d)
	}
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(c, r)
	}
	return textTo(c).Server(r)
}

// liveMerge is merge with --control.
type liveMerge struct {
	control             string
	pause, resume, wait bool
}

func (l *liveMerge) run(c *cobra.Command, args []string, asJSON bool) error {
	ctx, stop := untilSignal()
	defer stop()
	ctl := api.NewClient(l.control)
	m, err := l.request(ctx, ctl, args)
	if api.HasCode(err, api.CodeNoSuchRequest) {
		return l.mergeNode(ctx, c, ctl, args, asJSON)
	}
	if err != nil {
		return err
	}
	if l.wait {
		bar := progress.New(c.ErrOrStderr(), "merge")
		m, err = ctl.WaitForMerge(ctx, m, func(m api.Merge) { bar.Show(m.MergedBytes, m.TotalBytes) })
		bar.End()
		if err != nil {
			return continues(err, "server")
		}
	}
	if asJSON {
		err = printJSON(c, m)
	} else {
		err = textTo(c).Merge(m)
	}
	if err == nil && m.State == api.MergeFailed {
		err = fmt.Errorf("the merge of %s failed: %s", printable(m.Name), m.Error)
	}
	return err
}

// request sends the request and returns the state of the merge. Without a NAME, the current merge is meant, or else that
// of the only snapshot.
func (l *liveMerge) request(ctx context.Context, ctl *api.Client, args []string) (m api.Merge, err error) {
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	if l.pause || l.resume {
		if m, err = ctl.Merge(ctx, 0); err != nil {
			return m, err
		}
		if name != "" && m.Name != name {
			return m, fmt.Errorf("the current merge is of %s, not of %s", printable(m.Name), printable(name))
		}
		if l.resume {
			return ctl.ResumeMerge(ctx)
		}
		return ctl.PauseMerge(ctx)
	}
	if name == "" {
		r, err := ctl.Status(ctx)
		switch {
		case err != nil:
			return m, err
		case r.Merge != nil && (r.Merge.State != api.MergeDone || l.wait && len(r.Snapshots) != 1):
			return *r.Merge, nil
		case len(r.Snapshots) != 1:
			return m, fmt.Errorf("NAME is required: %d snapshots are served and none is being merged", len(r.Snapshots))
		}
		name = r.Snapshots[0].Name
	}
	return ctl.StartMerge(ctx, name)
}

// continues says that a merge goes on after a signal has ended the wait for it.
func continues(err error, where string) error {
	if i := (interrupted{}); errors.As(err, &i) {
		err = fmt.Errorf("%w; the merge continues in the %s", err, where)
	}
	return err
}
