package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Requests to the daemon of a fleet. A server of one disk refuses them with CodeNoSuchRequest.

// Daemon returns what the daemon is and serves.
func (c *Client) Daemon(ctx context.Context) (Daemon, error) {
	return ask[Daemon](ctx, c, http.MethodGet, "/v1/daemon", nil)
}

// Tree returns the disks, checkpoints and nodes.
func (c *Client) Tree(ctx context.Context) (Tree, error) {
	return ask[Tree](ctx, c, http.MethodGet, "/v1/tree", nil)
}

// Disks returns the disks.
func (c *Client) Disks(ctx context.Context) (Disks, error) {
	return ask[Disks](ctx, c, http.MethodGet, "/v1/disks", nil)
}

// Disk returns one disk.
func (c *Client) Disk(ctx context.Context, name string) (Disk, error) {
	return ask[Disk](ctx, c, http.MethodGet, elementPath("disks", name, ""), nil)
}

// AddDisk makes an image or device a base of nodes.
func (c *Client) AddDisk(ctx context.Context, q AddDiskRequest) (Disk, error) {
	return ask[Disk](ctx, c, http.MethodPost, "/v1/disks", q)
}

// RemoveDisk forgets a disk without nodes and checkpoints. Its image stays.
func (c *Client) RemoveDisk(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, elementPath("disks", name, ""), nil, &struct{}{})
}

// SetPolicy changes keys of a disk's policy.
func (c *Client) SetPolicy(ctx context.Context, disk string, set map[string]string) (Disk, error) {
	return ask[Disk](ctx, c, http.MethodPut, elementPath("disks", disk, "/policy"), PolicyRequest{Set: set})
}

// Fork makes a node from a disk, a checkpoint or a node.
func (c *Client) Fork(ctx context.Context, q ForkRequest) (Element, error) {
	return ask[Element](ctx, c, http.MethodPost, "/v1/fork", q)
}

// Checkpoint seals nodes at one moment.
func (c *Client) Checkpoint(ctx context.Context, q CheckpointRequest) (Checkpoints, error) {
	return ask[Checkpoints](ctx, c, http.MethodPost, "/v1/checkpoint", q)
}

// Layers returns what a checkpoint, or a node below its top, is made of.
func (c *Client) Layers(ctx context.Context, name string) (Layers, error) {
	return ask[Layers](ctx, c, http.MethodGet, elementPath("layers", name, ""), nil)
}

// Seal makes what was written to a node an unnamed checkpoint, and returns what the node is made of then.
func (c *Client) Seal(ctx context.Context, node string) (Layers, error) {
	return ask[Layers](ctx, c, http.MethodPost, elementPath("nodes", node, "/seal"), nil)
}

// Node returns one node.
func (c *Client) Node(ctx context.Context, name string) (Element, error) {
	return ask[Element](ctx, c, http.MethodGet, elementPath("nodes", name, ""), nil)
}

// Rollback makes q.Node show a checkpoint again.
func (c *Client) Rollback(ctx context.Context, q RollbackRequest) (Element, error) {
	return ask[Element](ctx, c, http.MethodPost, elementPath("nodes", q.Node, "/rollback"), q)
}

// Squash makes the layers that are a node's own into one.
func (c *Client) Squash(ctx context.Context, node string) (Element, error) {
	return ask[Element](ctx, c, http.MethodPost, elementPath("nodes", node, "/squash"), nil)
}

// MergeNode starts to write what a node holds to its disk. The disk has the state of the merge.
func (c *Client) MergeNode(ctx context.Context, node string) (TreeMerge, error) {
	return ask[TreeMerge](ctx, c, http.MethodPost, elementPath("nodes", node, "/merge"), nil)
}

// PauseNodeMerge pauses the merge of a node.
func (c *Client) PauseNodeMerge(ctx context.Context, node string) (TreeMerge, error) {
	return ask[TreeMerge](ctx, c, http.MethodPost, elementPath("nodes", node, "/merge/pause"), nil)
}

// ResumeNodeMerge continues a merge that was paused, and begins one again that failed.
func (c *Client) ResumeNodeMerge(ctx context.Context, node string) (TreeMerge, error) {
	return ask[TreeMerge](ctx, c, http.MethodPost, elementPath("nodes", node, "/merge/resume"), nil)
}

// TakeBackMerge writes to the disk of a node what it had before a merge of the node that failed.
func (c *Client) TakeBackMerge(ctx context.Context, node string) (Disk, error) {
	return ask[Disk](ctx, c, http.MethodDelete, elementPath("nodes", node, "/merge"), nil)
}

// WaitForNodeMerge waits until the merge of a node is not running any more and returns its last state. each is called with every
// state. The end of ctx ends the wait, not the merge.
func (c *Client) WaitForNodeMerge(ctx context.Context, m TreeMerge, each func(TreeMerge)) (TreeMerge, error) {
	for {
		each(m)
		if m.State != MergeRunning && m.State != MergePaused {
			return m, nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return m, context.Cause(ctx)
		}
		d, err := c.Disk(ctx, m.Disk)
		if err != nil {
			return m, err
		}
		if d.Merge != nil {
			m = *d.Merge
		}
	}
}

// Table returns the device-mapper tables with which a kernel shows a node.
func (c *Client) Table(ctx context.Context, node string) (Table, error) {
	return ask[Table](ctx, c, http.MethodPost, elementPath("nodes", node, "/table"), nil)
}

// DropNode removes a node and its files.
func (c *Client) DropNode(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, elementPath("nodes", name, ""), nil, &struct{}{})
}

// DropCheckpoint removes a checkpoint and its file.
func (c *Client) DropCheckpoint(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, elementPath("checkpoints", name, ""), nil, &struct{}{})
}

// DropElement is Drop of a served disk, and of a daemon DropCheckpoint for NODE@NAME, else DropNode. With takeBack a node whose merge
// failed is dropped, too, once its disk has what it had before; otherwise it is refused with CodeMerging.
func (c *Client) DropElement(ctx context.Context, name string, takeBack bool) error {
	err := c.Drop(ctx, name)
	switch {
	case !HasCode(err, CodeNoSuchRequest):
		return err
	case strings.Contains(name, "@"):
		return c.DropCheckpoint(ctx, name)
	case takeBack:
		if _, err := c.TakeBackMerge(ctx, name); err != nil && !HasCode(err, CodeNoMerge) {
			return err
		}
	}
	return c.DropNode(ctx, name)
}

// Adopt makes an existing store the layer of a new node.
func (c *Client) Adopt(ctx context.Context, q AdoptRequest) (Element, error) {
	return ask[Element](ctx, c, http.MethodPost, "/v1/adopt", q)
}

// Events calls each with every event from now on, until ctx ends, each fails, or the daemon ends, which is nil.
func (c *Client) Events(ctx context.Context, each func(Event) error) error {
	got, err := c.open(ctx, http.MethodGet, "/v1/events", nil)
	if err != nil {
		return err
	}
	defer got.Body.Close()
	lines := bufio.NewScanner(got.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !ok {
			continue // the other fields, and comments that keep the connection alive
		}
		var e Event
		if err := json.Unmarshal(data, &e); err != nil {
			return fmt.Errorf("control socket %s: event: %w", c.path, err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return lines.Err()
}

func elementPath(kind, name, action string) string {
	return "/v1/" + kind + "/" + url.PathEscape(name) + action
}
