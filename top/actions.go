package top

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// An action is what a key does with an element.
type action struct {
	key, name string
	kinds     []api.Kind
	ask       string                          // what text is asked for; "": none
	loses     func(e *monitor.Element) string // the question; nil: it is done at once
	possible  func(e *monitor.Element) bool   // nil: always
	do        func(ctx context.Context, c *api.Client, e *monitor.Element, text string) error
}

func own(e *monitor.Element) string {
	if e.Figures == nil {
		return "what is in its layer"
	}
	return fmt.Sprintf("%s in %d chunks", bytesize.Text(int64(e.Figures.Exceptions)*int64(e.Figures.ChunkSectors)*512), e.Figures.Exceptions)
}

func clients(e *monitor.Element) string {
	if e.Connections == 0 {
		return ""
	}
	return fmt.Sprintf("; %d clients are disconnected", e.Connections)
}

var (
	disks       = []api.Kind{api.KindDisk}
	nodes       = []api.Kind{api.KindNode}
	checkpoints = []api.Kind{api.KindCheckpoint}
	all         = []api.Kind{api.KindDisk, api.KindCheckpoint, api.KindNode}
)

// fleetActions are those of a fleet.
var fleetActions = []action{
	{key: "f", name: "fork", kinds: all, ask: "name of the new node", do: func(ctx context.Context, c *api.Client, e *monitor.Element, text string) error {
		_, err := c.Fork(ctx, api.ForkRequest{From: e.Name, Name: text})
		return err
	}},
	{key: "c", name: "checkpoint", kinds: nodes, ask: "name of the checkpoint", do: func(ctx context.Context, c *api.Client, e *monitor.Element, text string) error {
		_, err := c.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{e.Name}, Name: text})
		return err
	}},
	{key: "r", name: "rollback", kinds: nodes, ask: "checkpoint, as NODE@NAME", loses: func(e *monitor.Element) string {
		return fmt.Sprintf("roll %s back? What was written since the checkpoint is lost, at least %s%s", e.Name, own(e), clients(e))
	}, do: func(ctx context.Context, c *api.Client, e *monitor.Element, text string) error {
		_, err := c.Rollback(ctx, api.RollbackRequest{Node: e.Name, Checkpoint: text, Force: e.Connections > 0})
		return err
	}},
	{key: "s", name: "squash", kinds: nodes, do: func(ctx context.Context, c *api.Client, e *monitor.Element, _ string) error {
		_, err := c.Squash(ctx, e.Name)
		return err
	}},
	{key: "m", name: "merge", kinds: nodes, loses: func(e *monitor.Element) string {
		return fmt.Sprintf("merge %s into %s? What the disk holds now is lost, except for what others show", e.Name, e.Disk)
	}, do: func(ctx context.Context, c *api.Client, e *monitor.Element, _ string) error {
		_, err := c.MergeNode(ctx, e.Name)
		return err
	}},
	pauseAction(func(ctx context.Context, c *api.Client, node string, resume bool) error {
		request := c.PauseNodeMerge
		if resume {
			request = c.ResumeNodeMerge
		}
		_, err := request(ctx, node)
		return err
	}),
	{key: "t", name: "take the merge back", kinds: nodes, possible: func(e *monitor.Element) bool { return e.Merge != nil && e.Merge.State == api.MergeFailed },
		loses: func(e *monitor.Element) string {
			return fmt.Sprintf("take the merge of %s back? The disk %s gets what it had before the merge", e.Name, e.Disk)
		}, do: func(ctx context.Context, c *api.Client, e *monitor.Element, _ string) error {
			_, err := c.TakeBackMerge(ctx, e.Name)
			return err
		}},
	{key: "d", name: "drop", kinds: append(nodes[:1:1], checkpoints...), loses: func(e *monitor.Element) string {
		return fmt.Sprintf("drop %s? Its file is deleted: %s%s", e.Name, own(e), clients(e))
	}, do: func(ctx context.Context, c *api.Client, e *monitor.Element, _ string) error {
		if e.Kind == api.KindCheckpoint {
			return c.DropCheckpoint(ctx, e.Name)
		}
		return c.DropNode(ctx, e.Name)
	}},
}

// pauseAction pauses a merge that is running and resumes any other that has begun.
func pauseAction(do func(ctx context.Context, c *api.Client, node string, resume bool) error) action {
	return action{key: "p", name: "pause or resume the merge", kinds: nodes,
		possible: func(e *monitor.Element) bool { return e.Merge != nil && e.Merge.State != api.MergeDone },
		do: func(ctx context.Context, c *api.Client, e *monitor.Element, _ string) error {
			return do(ctx, c, e.Name, e.Merge.State != api.MergeRunning)
		}}
}

// originActions are those of a server of one origin.
var originActions = []action{
	{key: "s", name: "snapshot", kinds: disks, ask: "path of a new COW file on the server's host", do: func(ctx context.Context, c *api.Client, _ *monitor.Element, text string) error {
		base := filepath.Base(text)
		_, err := c.Attach(ctx, api.AttachRequest{Name: strings.TrimSuffix(base, filepath.Ext(base)), COW: text, Create: true})
		return err
	}},
	{key: "m", name: "merge", kinds: nodes, possible: func(e *monitor.Element) bool { return e.Merge == nil }, loses: func(e *monitor.Element) string {
		return fmt.Sprintf("merge %s into the origin? What that holds now is lost, except for what other snapshots show", e.Name)
	}, do: func(ctx context.Context, c *api.Client, e *monitor.Element, _ string) error {
		_, err := c.StartMerge(ctx, e.Name)
		return err
	}},
	pauseAction(func(ctx context.Context, c *api.Client, _ string, resume bool) error {
		request := c.PauseMerge
		if resume {
			request = c.ResumeMerge
		}
		_, err := request(ctx)
		return err
	}),
	{key: "d", name: "drop", kinds: nodes, loses: func(e *monitor.Element) string {
		return fmt.Sprintf("stop serving %s? It is lost when the origin changes after that; its file stays%s", e.Name, clients(e))
	}, do: func(ctx context.Context, c *api.Client, e *monitor.Element, _ string) error {
		return c.Drop(ctx, e.Name)
	}},
}
