package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
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
	var side *merge.SideFile
	err := v.dev.replace(func() (_ block.Device, err error) {
		if st := v.snap.Status(); st.State == snapshot.StateInvalid {
			return nil, refuse(api.CodeInvalid, "snapshot %q is invalid: there is nothing to merge", name)
		}
		m, err = v.snap.BeginMergeAfter(func() (err error) {
			side, err = s.beginSideFile(v)
			return err
		})
		if err != nil && side != nil {
			err = errors.Join(err, side.Cancel(s.address.Path))
		}
		return s.origin, err
	})
	if err != nil {
		err = block.WithPath(v.path, err)
		if errors.Is(err, store.ErrInvalid) {
			err = refuse(api.CodeInvalid, "%v: there is nothing to merge", err)
		}
		if wasReadOnly {
			err = errors.Join(err, s.file.DenyWrites())
		}
		return api.Merge{}, err
	}
	opts := s.opts.Merge
	if side != nil {
		s.half.Store(side)
	}
	opts.Completed = func() (err error) {
		if side != nil {
			err = s.endSideFile(side)
		}
		err = errors.Join(err, completed(s.opts.Merge))
		s.logMerge(v.name, "done", err)
		return err
	}
	v.snap.Close() // its store is the merge's; nothing is left that could fail
	v.merge = &liveMerge{name, m, merge.Start(m, opts)}
	s.merging = v.merge
	s.logMerge(name, "started", nil)
	s.originReplaced(name)
	return v.merge.status(), nil
}

// completed calls the function of the embedding program.
func completed(o merge.Options) error {
	if o.Completed == nil {
		return nil
	}
	return o.Completed()
}

// noSideFile is logged when a merge has no side file.
const noSideFile = "if this merge is interrupted, only the store shows that the origin is a mixture"

// beginSideFile makes the side file of a live merge, durably, or returns nil where none can be made. mu is held.
func (s *Server) beginSideFile(v *attached) (*merge.SideFile, error) {
	var others []*snapshot.Snapshot
	for _, o := range s.snapshots {
		if o != v && o.merge == nil {
			others = append(others, o.snap)
		}
	}
	var side *merge.SideFile
	err := fmt.Errorf("%w: it is a part of a disk", merge.ErrNoSideFile) // the file would be that of all parts
	if half := s.half.Load(); s.address.Plain() || half != nil && half.Check(v.cow) == nil {
		side, err = merge.BeginLive(s.address.Path, v.path, v.snap, others, s.opts.Force || v.force)
	} else if ended := merge.EndUndo(v.snap); ended != nil {
		return nil, ended
	}
	if errors.Is(err, merge.ErrNoSideFile) {
		s.log.Event(slog.LevelWarn, fmt.Sprintf("%s: %v: %s", v.name, err, noSideFile), noSideFile, err, slog.String("snapshot", v.name))
		return nil, nil
	}
	if err == nil {
		for _, l := range side.Lost() {
			s.log.Event(slog.LevelWarn, fmt.Sprintf("%s: %v", v.name, l), "an undo store can't undo this merge any more", l.Err,
				slog.String("snapshot", v.name), slog.String("undo", l.Path))
		}
	}
	return side, err
}

// endSideFile removes the side file when its merge is complete.
func (s *Server) endSideFile(side *merge.SideFile) error {
	if err := side.End(s.address.Path); err != nil {
		return err
	}
	now, err := merge.ReadSideFile(s.address.Path)
	s.half.Store(now) // without mu, whose owner may wait for the driver
	return err
}

// logMerge logs what became of a merge. What its steps fail with is an event of the engine.
func (s *Server) logMerge(name, what string, err error) {
	s.logOperation(name, "merge", "merge "+what, err)
}

// logOperation logs what was done with a snapshot, on request or by itself.
func (s *Server) logOperation(name, operation, message string, err error) {
	level, line := slog.LevelInfo, name+": "+message
	if err != nil {
		level, line = slog.LevelError, line+": "+err.Error()
	}
	s.log.Event(level, line, message, err, slog.String("snapshot", name), slog.String("operation", operation))
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
func (s *Server) PauseMerge() (api.Merge, error) { return s.steer((*merge.Driver).Pause, "paused") }

// ResumeMerge continues a merge that was paused or failed.
func (s *Server) ResumeMerge() (api.Merge, error) { return s.steer((*merge.Driver).Resume, "resumed") }

func (s *Server) steer(do func(*merge.Driver), what string) (api.Merge, error) {
	m, err := s.currentMerge()
	if err != nil {
		return api.Merge{}, err
	}
	before := m.status().State
	do(m.driver)
	now := m.status()
	if now.State != before {
		s.logMerge(m.name, what, nil)
	}
	return now, nil
}
