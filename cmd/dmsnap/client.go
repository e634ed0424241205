package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/server/api"
)

// serverStatus is status with --control.
func serverStatus(c *cobra.Command, control string, asJSON bool) error {
	ctx, stop := untilSignal()
	defer stop()
	ctl := api.NewClient(control)
	r, err := ctl.Status(ctx)
	if isNoRequest(err) {
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
	if isNoRequest(err) {
		return l.mergeNode(ctx, c, ctl, args, asJSON)
	}
	if err != nil {
		return err
	}
	if l.wait {
		if m, err = waitForMerge(ctx, ctl, m, c.ErrOrStderr()); err != nil {
			return err
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

// waitForMerge waits until the merge is neither running nor paused. A signal ends the wait, not the merge.
func waitForMerge(ctx context.Context, ctl *api.Client, m api.Merge, stderr io.Writer) (api.Merge, error) {
	bar := newProgress(stderr, "merge")
	defer bar.end()
	for {
		bar.show(m.MergedBytes, m.TotalBytes)
		if m.State != api.MergeRunning && m.State != api.MergePaused {
			return m, nil
		}
		next, err := ctl.Merge(ctx, time.Second)
		if err != nil {
			if i := (interrupted{}); errors.As(err, &i) {
				err = fmt.Errorf("%w; the merge continues in the server", err)
			}
			return m, err
		}
		m = next
	}
}
