package api

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
	"strconv"
	"time"
	"unicode/utf8"
)

// maxReply is how long a reply may be, in bytes.
const maxReply = 64 << 20

// A Client sends requests to a server's control socket. Its methods may be called concurrently.
//
// Errors: an [*Error] for what the server refuses; the cause of the context when that ended; else what prevented the
// exchange, with the socket's path.
type Client struct {
	path string
	http http.Client
}

// NewClient returns a client of the control socket at path. Nothing is connected before the first request.
func NewClient(path string) *Client {
	var d net.Dialer
	return &Client{path: path, http: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		}}}}
}

// Status returns everything that is served.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return ask[Status](ctx, c, http.MethodGet, "/v1/status", nil)
}

// Snapshot returns one snapshot.
func (c *Client) Snapshot(ctx context.Context, name string) (Snapshot, error) {
	return ask[Snapshot](ctx, c, http.MethodGet, snapshotPath(name), nil)
}

// Attach attaches a snapshot of the origin as it is now, and exports it.
func (c *Client) Attach(ctx context.Context, q AttachRequest) (Snapshot, error) {
	if !utf8.ValidString(q.Name) { // JSON can't hold it: it would be another name
		return Snapshot{}, &Error{Code: CodeBadName, Message: fmt.Sprintf("%q can't be the name of a snapshot: it is not UTF-8", q.Name)}
	}
	if !utf8.ValidString(q.COW) {
		q.COW, q.COWBase64 = "", []byte(q.COW)
	}
	return ask[Snapshot](ctx, c, http.MethodPost, "/v1/snapshots", q)
}

// Grow makes the COW file of a snapshot size bytes long.
func (c *Client) Grow(ctx context.Context, name string, size int64) (Snapshot, error) {
	return ask[Snapshot](ctx, c, http.MethodPost, snapshotPath(name)+"/grow", GrowRequest{size})
}

// Drop detaches a snapshot. Its store stays on disk.
func (c *Client) Drop(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, snapshotPath(name), nil, &struct{}{})
}

// StartMerge starts the live merge of a snapshot into the origin. Starting the one that was started last changes
// nothing.
func (c *Client) StartMerge(ctx context.Context, name string) (Merge, error) {
	return ask[Merge](ctx, c, http.MethodPost, "/v1/merge", MergeRequest{name})
}

// Merge returns the merge under way, or the last one. With wait > 0, in whole seconds up to 60, the reply comes when
// the merge is neither running nor paused, or after that time.
func (c *Client) Merge(ctx context.Context, wait time.Duration) (Merge, error) {
	path := "/v1/merge"
	if wait > 0 {
		path += "?wait=" + strconv.FormatInt(int64(wait/time.Second), 10)
	}
	return ask[Merge](ctx, c, http.MethodGet, path, nil)
}

// WaitForMerge waits until a merge is neither running nor paused and returns its last state. each is called with every state. The
// end of ctx ends the wait, not the merge.
func (c *Client) WaitForMerge(ctx context.Context, m Merge, each func(Merge)) (Merge, error) {
	for {
		each(m)
		if m.State != MergeRunning && m.State != MergePaused {
			return m, nil
		}
		next, err := c.Merge(ctx, time.Second)
		if err != nil {
			return m, err
		}
		m = next
	}
}

// PauseMerge pauses the merge after the step under way.
func (c *Client) PauseMerge(ctx context.Context) (Merge, error) {
	return ask[Merge](ctx, c, http.MethodPost, "/v1/merge/pause", nil)
}

// ResumeMerge continues a merge that was paused or failed.
func (c *Client) ResumeMerge(ctx context.Context) (Merge, error) {
	return ask[Merge](ctx, c, http.MethodPost, "/v1/merge/resume", nil)
}

// snapshotPath is the path of a snapshot's requests.
func snapshotPath(name string) string { return "/v1/snapshots/" + url.PathEscape(name) }

// ask makes one request and returns the reply.
func ask[T any](ctx context.Context, c *Client, method, path string, body any) (reply T, err error) {
	err = c.call(ctx, method, path, body, &reply)
	return reply, err
}

// call makes one request, with body as JSON unless it is nil, and reads the reply.
func (c *Client) call(ctx context.Context, method, path string, body, reply any) error {
	got, err := c.open(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer got.Body.Close()
	if err := json.NewDecoder(io.LimitReader(got.Body, maxReply)).Decode(reply); err != nil {
		return fmt.Errorf("control socket %s: reply: %w", c.path, err)
	}
	return nil
}

// open makes one request and returns a reply that is a success. The caller closes its body.
func (c *Client) open(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var send io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		send = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://dmsnap"+path, send)
	if err != nil {
		return nil, err
	}
	got, err := c.http.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // its URL names no host
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("control socket %s: %w", c.path, err)
	}
	if got.StatusCode == http.StatusOK {
		return got, nil
	}
	defer got.Body.Close()
	var e ErrorReply
	if err := json.NewDecoder(io.LimitReader(got.Body, maxReply)).Decode(&e); err != nil || e.Error.Message == "" {
		return nil, fmt.Errorf("control socket %s: %s", c.path, got.Status)
	}
	return nil, &e.Error
}
