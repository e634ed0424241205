package server

import (
	"context"
	"errors"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A liveMerge is a live merge, from its start on.
type liveMerge struct {
	name    string
	merging *snapshot.Merging
	driver  *merge.Driver
}

// done reports whether the merge is complete.
func (m *liveMerge) done() bool {
	state, _ := m.driver.State()
	return state == merge.Done
}

func (m *liveMerge) status() api.Merge {
	state, err := m.driver.State()
	p := m.driver.Progress()
	r := api.Merge{Name: m.name, State: api.MergeState(state), MergedChunks: p.MergedChunks, TotalChunks: p.TotalChunks,
		MergedBytes: p.MergedBytes(), TotalBytes: p.TotalBytes(), Percent: p.Percent()}
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

// StartMerge starts the live merge of a snapshot: the origin shows its content at once, and its export continues as
// the origin. Starting the merge that is under way, or was the last, changes nothing. One merge at a time.
func (s *Server) StartMerge(name string) (api.Merge, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.originReadOnly() {
		return api.Merge{}, errReadOnly
	}
	v := s.find(name)
	switch {
	case v == nil:
		return api.Merge{}, noSnapshot(name)
	case v.merge != nil:
		return s.merging.status(), nil
	case s.merging != nil && !s.merging.done():
		return api.Merge{}, refuse(api.CodeAlreadyMerging, "snapshot %q is being merged: one merge at a time", s.merging.name)
	}
	wasReadOnly := s.file.ReadOnly()
	if err := s.allowOriginWrites(); err != nil {
		return api.Merge{}, err
	}
	var m *snapshot.Merging
	err := v.dev.replace(func() (_ block.Device, err error) {
		if st := v.snap.Status(); st.State == snapshot.StateInvalid {
			return nil, refuse(api.CodeInvalid, "snapshot %q is invalid: there is nothing to merge", name)
		}
		m, err = v.snap.BeginMerge()
		return s.origin, err
	})
	if err != nil {
		err = block.WithPath(v.path, err)
		if wasReadOnly {
			err = errors.Join(err, s.file.DenyWrites())
		}
		return api.Merge{}, err
	}
	opts := s.opts.Merge
	if half := s.half.Load(); half != nil && half.Check(v.cow) == nil {
		opts.Completed = func() error { return s.endOffline(half, v.cow) }
	}
	v.snap.Close() // its store is the merge's; nothing is left that could fail
	v.merge = &liveMerge{name, m, merge.Start(m, opts)}
	s.merging = v.merge
	return v.merge.status(), nil
}

// endOffline removes the side file of an offline merge that a live one has completed.
func (s *Server) endOffline(half *merge.SideFile, cow block.Device) error {
	if err := half.End(s.address.Path, cow); err != nil {
		return err
	}
	now, err := merge.ReadSideFile(s.address.Path)
	s.half.Store(now) // without mu, whose owner may wait for the driver
	return err
}

// currentMerge returns the merge under way or the last one.
func (s *Server) currentMerge() (*liveMerge, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.merging == nil {
		return nil, refuse(api.CodeNoMerge, "no merge was started")
	}
	return s.merging, nil
}

// Merge returns the merge under way, or the last one: at once, or, with wait > 0, when it is neither running nor
// paused, wait is over or ctx ends.
func (s *Server) Merge(ctx context.Context, wait time.Duration) (api.Merge, error) {
	m, err := s.currentMerge()
	if err != nil {
		return api.Merge{}, err
	}
	if wait > 0 {
		ctx, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		m.driver.Wait(ctx)
	}
	return m.status(), nil
}

// PauseMerge pauses the merge after the step under way.
func (s *Server) PauseMerge() (api.Merge, error) { return s.steer((*merge.Driver).Pause) }

// ResumeMerge continues a merge that was paused or failed.
func (s *Server) ResumeMerge() (api.Merge, error) { return s.steer((*merge.Driver).Resume) }

func (s *Server) steer(do func(*merge.Driver)) (api.Merge, error) {
	m, err := s.currentMerge()
	if err != nil {
		return api.Merge{}, err
	}
	do(m.driver)
	return m.status(), nil
}
