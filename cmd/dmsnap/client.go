package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/merge"
)

// A controller talks to a server by its control socket.
type controller struct {
	path string
	http http.Client
}

func newController(path string) *controller {
	var d net.Dialer
	return &controller{path: path, http: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		}}}}
}

// call makes one request, with body as JSON unless it is nil, and reads the answer into answer.
func (c *controller) call(ctx context.Context, method, path string, body, answer any) error {
	var send io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		send = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://dmsnap"+path, send)
	if err != nil {
		return err
	}
	got, err := c.http.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // its address is none
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("control socket %s: %w", c.path, err)
	}
	defer got.Body.Close()
	d := json.NewDecoder(io.LimitReader(got.Body, 64<<20))
	if got.StatusCode != http.StatusOK {
		var e errorReply
		if err := d.Decode(&e); err != nil || e.Error.Message == "" {
			return fmt.Errorf("control socket %s: %s", c.path, got.Status)
		}
		return errors.New(e.Error.Message)
	}
	if err := d.Decode(answer); err != nil {
		return fmt.Errorf("control socket %s: answer: %w", c.path, err)
	}
	return nil
}

// snapshotPath is the address of a snapshot.
func snapshotPath(name string) string { return "/v1/snapshots/" + url.PathEscape(name) }

// serverStatus is status with --control.
func serverStatus(c *cobra.Command, control string, asJSON bool) error {
	ctx, stop := untilSignal()
	defer stop()
	var r serverReply
	if err := newController(control).call(ctx, "GET", "/v1/status", nil, &r); err != nil {
		return err
	}
	if asJSON {
		return printJSON(c, r)
	}
	w := c.OutOrStdout()
	fmt.Fprintf(w, "origin %s: %s\n", r.Origin.Path, bytesText(r.Origin.SizeBytes))
	if r.Origin.URI != "" {
		fmt.Fprintf(w, "  uri  %s\n", r.Origin.URI)
	}
	for _, s := range r.Snapshots {
		if err := s.print(w); err != nil {
			return err
		}
	}
	if m := r.Merge; m != nil {
		return m.print(w)
	}
	return nil
}

func (s snapshotStatus) print(w io.Writer) error {
	merged := ""
	if s.Merged {
		merged = ", merged into the origin"
	}
	fmt.Fprintf(w, "snapshot %s: %s%s\n", printable(s.Name), s.State, merged)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "  cow\t%s\n  uri\t%s\n", s.COW, s.URI)
	s.figures.print(t)
	return t.Flush()
}

func (m mergeStatus) print(w io.Writer) error {
	_, err := fmt.Fprintf(w, "merge of %s: %s, %s of %s (%.1f %%)\n", printable(m.Name), m.State,
		bytesText(m.MergedBytes), bytesText(m.TotalBytes), m.Percent)
	if m.Error != "" {
		_, err = fmt.Fprintf(w, "  %s\n", m.Error)
	}
	return err
}

// liveMerge is merge with --control.
type liveMerge struct {
	control             string
	pause, resume, wait bool
}

func (l *liveMerge) run(c *cobra.Command, args []string, asJSON bool) error {
	ctx, stop := untilSignal()
	defer stop()
	ctl := newController(l.control)
	m, err := l.tell(ctx, ctl, args)
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
		err = m.print(c.OutOrStdout())
	}
	if err == nil && m.State == merge.Failed {
		err = fmt.Errorf("the merge of %s failed: %s", printable(m.Name), m.Error)
	}
	return err
}

// tell says to the server what is to be done, and returns how the merge fares. When none is named, the merge
// under way is meant, or else that of the only snapshot there is.
func (l *liveMerge) tell(ctx context.Context, ctl *controller, args []string) (m mergeStatus, err error) {
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	if l.pause || l.resume {
		if err := ctl.call(ctx, "GET", "/v1/merge", nil, &m); err != nil {
			return m, err
		}
		if name != "" && m.Name != name {
			return m, fmt.Errorf("the merge is of %s, not of %s", printable(m.Name), printable(name))
		}
		what := "/v1/merge/pause"
		if l.resume {
			what = "/v1/merge/resume"
		}
		err = ctl.call(ctx, "POST", what, nil, &m)
		return m, err
	}
	if name == "" {
		var r serverReply
		if err := ctl.call(ctx, "GET", "/v1/status", nil, &r); err != nil {
			return m, err
		}
		switch {
		case r.Merge != nil && (r.Merge.State != merge.Done || l.wait && len(r.Snapshots) != 1):
			return *r.Merge, nil
		case len(r.Snapshots) != 1:
			return m, fmt.Errorf("NAME is needed: %d snapshots are served and none is being merged", len(r.Snapshots))
		}
		name = r.Snapshots[0].Name
	}
	err = ctl.call(ctx, "POST", "/v1/merge", map[string]string{"name": name}, &m)
	return m, err
}

// waitForMerge waits until the merge is neither running nor paused. A signal ends the waiting and not the
// merge.
func waitForMerge(ctx context.Context, ctl *controller, m mergeStatus, stderr io.Writer) (mergeStatus, error) {
	bar := newProgress(stderr, "merge")
	defer bar.end()
	for {
		bar.show(m.MergedBytes, m.TotalBytes)
		if m.State != merge.Running && m.State != merge.Paused {
			return m, nil
		}
		if err := ctl.call(ctx, "GET", "/v1/merge?wait=1", nil, &m); err != nil {
			if i := (interrupted{}); errors.As(err, &i) {
				err = fmt.Errorf("%w; the merge goes on in the server", err)
			}
			return m, err
		}
	}
}
