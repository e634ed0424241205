package fleet

import (
	"context"

	"github.com/dmsnap/dmsnap/server/api"
)

// PauseMerge pauses the merge of a node that is under way, after at most 4 MiB more were copied. The disk stays a mixture, and the node
// in use by the merge. A merge of which the rest is being written already is completed. A paused merge goes on when it is resumed, and at
// the next start.
func (f *Fleet) PauseMerge(_ context.Context, name string) (api.TreeMerge, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, err := f.mergeOf(name)
	if err != nil {
		return api.TreeMerge{}, err
	}
	if m.status.State == api.MergeRunning {
		m.paused, m.status.State = make(chan struct{}), api.MergePaused
	}
	return m.state(), nil
}

// ResumeMerge continues a merge that was paused, and begins one again that failed.
func (f *Fleet) ResumeMerge(ctx context.Context, name string) (api.TreeMerge, error) {
	f.mu.Lock()
	m, err := f.mergeOf(name)
	if err == nil && m.status.State != api.MergeFailed {
		m.resume()
		defer f.mu.Unlock()
		return m.state(), nil
	}
	f.mu.Unlock()
	if err != nil {
		return api.TreeMerge{}, err
	}
	return f.Merge(ctx, name)
}

// mergeOf returns the merge of a node that is not complete. mu is held.
func (f *Fleet) mergeOf(name string) (*treeMerge, error) {
	n := f.nodes[name]
	if n == nil {
		return nil, refuse(api.CodeNoSuchNode, "there is no node %q", name)
	}
	if m := n.disk.merge; m != nil && m.status.Node == name {
		switch m.status.State {
		case api.MergeRunning, api.MergePaused, api.MergeFailed:
			return m, nil
		}
	}
	return nil, refuse(api.CodeNoMerge, "no merge of node %q is under way", name)
}

// resume ends a pause. Fleet.mu is held.
func (m *treeMerge) resume() {
	if m.paused != nil {
		close(m.paused)
		m.paused, m.status.State = nil, api.MergeRunning
	}
}

// proceed waits while the merge is paused. It returns the cause of ctx when that has ended.
func (m *treeMerge) proceed(ctx context.Context) error {
	for {
		m.fleet.mu.Lock()
		paused := m.paused
		m.fleet.mu.Unlock()
		if paused == nil || ctx.Err() != nil {
			return context.Cause(ctx)
		}
		select {
		case <-paused:
		case <-ctx.Done():
		}
	}
}
