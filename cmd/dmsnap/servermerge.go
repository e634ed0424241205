package main

import (
	"context"
	"net/http"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
)

// done reports whether the merge is complete.
func (m *liveMerged) done() bool {
	state, _ := m.driver.State()
	return state == merge.Done
}

// startMerge begins the live merge of a snapshot: the origin shows its content at once, and its export
// goes on as the origin. Starting the merge that is under way, or was the last, changes nothing. One
// merge at a time.
func (s *server) startMerge(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly {
		return errReadOnlyServer
	}
	v := s.find(name)
	switch {
	case v == nil:
		return noSnapshot(name)
	case v.merge != nil:
		return nil
	case s.merging != nil && !s.merging.done():
		return refuse(http.StatusConflict, "already_merging", "snapshot %q is being merged: one merge at a time", s.merging.name)
	}
	v.snap.EndPauses() // a merge is a way out for a snapshot without room, not something to wait for
	var m *snapshot.Merging
	err := v.dev.become(func() (_ block.Device, err error) {
		if st := v.snap.Status(); st.State == snapshot.StateInvalid {
			return nil, refuse(http.StatusConflict, "invalid", "snapshot %q is invalid: there is nothing to merge", name)
		}
		m, err = v.snap.BeginMerge()
		return s.origin, err
	})
	if err != nil {
		return about(v.path, err)
	}
	v.snap.Close() // its store is the merge's; nothing is left that could fail
	v.merge = &liveMerged{name, m, s.drive(m)}
	s.merging = v.merge
	return nil
}

// currentMerge returns the merge under way or the last one.
func (s *server) currentMerge() (*liveMerged, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.merging == nil {
		return nil, refuse(http.StatusNotFound, "no_merge", "no merge was started")
	}
	return s.merging, nil
}

// mergeStatus is what the API says of a merge.
type mergeStatus struct {
	Name         string      `json:"name"`
	State        merge.State `json:"state"`
	Error        string      `json:"error,omitempty"`
	MergedChunks uint64      `json:"merged_chunks"`
	TotalChunks  uint64      `json:"total_chunks"`
	MergedBytes  int64       `json:"merged_bytes"`
	TotalBytes   int64       `json:"total_bytes"`
	Percent      float64     `json:"percent"`
}

func (m *liveMerged) status() mergeStatus {
	state, err := m.driver.State()
	p := m.driver.Progress()
	r := mergeStatus{m.name, state, "", p.MergedChunks, p.TotalChunks, p.MergedBytes(), p.TotalBytes(), p.Percent()}
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

// wait waits until the merge is neither running nor paused, or ctx ends.
func (m *liveMerged) wait(ctx context.Context) { m.driver.Wait(ctx) }

// originStatus, snapshotStatus and serverStatusReply are what the API says of a server.
type originStatus struct {
	Path      string `json:"path"`
	SizeBytes int64  `json:"size_bytes"`
	ReadOnly  bool   `json:"read_only"`
	URI       string `json:"uri,omitempty"` // where it is exported
}

type snapshotStatus struct {
	Name   string `json:"name"`
	COW    string `json:"cow"`
	URI    string `json:"uri"`
	Merged bool   `json:"merged"` // its live merge is complete; the export is the origin
	figures
}

type serverReply struct {
	Origin    originStatus     `json:"origin"`
	Snapshots []snapshotStatus `json:"snapshots"`
	Merge     *mergeStatus     `json:"merge"` // null: none was started
}

// status returns how everything fares.
func (s *server) status() serverReply {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := serverReply{Origin: originStatus{Path: s.path, SizeBytes: s.origin.Size(), ReadOnly: s.readOnly},
		Snapshots: []snapshotStatus{}}
	if s.exported {
		r.Origin.URI = s.uri(originName)
	}
	for _, v := range s.snapshots {
		r.Snapshots = append(r.Snapshots, s.statusOf(v))
	}
	if s.merging != nil {
		m := s.merging.status()
		r.Merge = &m
	}
	return r
}

// statusOf returns how one snapshot fares. mu is held.
func (s *server) statusOf(v *served) snapshotStatus {
	r := snapshotStatus{Name: v.name, COW: v.path, URI: s.uri(v.name)}
	if v.merge == nil {
		r.figures = figuresOf(v.snap.Status())
		return r
	}
	st := v.merge.merging.Status()
	if r.Merged = v.merge.done(); r.Merged {
		st.State = snapshot.StateOK // what is left is an empty store
	}
	r.figures = figuresOf(st)
	return r
}

// snapshotStatus returns how the snapshot of a name fares.
func (s *server) snapshotStatus(name string) (snapshotStatus, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.find(name)
	if v == nil {
		return snapshotStatus{}, noSnapshot(name)
	}
	return s.statusOf(v), nil
}
