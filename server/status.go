package server

import (
	"strings"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
	"github.com/dmsnap/dmsnap/snapshot"
)

// uri is the NBD URI of an export, "" before Start. mu is held.
func (s *Server) uri(name string) string {
	if s.addr == nil {
		return ""
	}
	return s.opts.NBD.URI(s.addr, name)
}

// Status returns everything that is served. URIs are those of the listener that Start got; "" before.
func (s *Server) Status() api.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := api.Status{Origin: s.originStatus(), Snapshots: []api.Snapshot{}}
	if s.exported {
		r.Origin.URI, r.Origin.VhostUser = s.uri(s.name), s.vhostSocket(s.name)
		r.Origin.File = s.pathOf(s.name)
		r.Origin.Waiting = s.waiting(s.name)
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

func (s *Server) originStatus() api.Origin {
	r := api.Origin{Path: s.path, Name: s.name, Format: s.file.Format(), SizeBytes: s.origin.Size(), ReadOnly: s.originReadOnly(), State: api.OriginOK}
	c := s.origin.Counters()
	r.Counters = api.OriginCounters{SyncWaits: figures.Latency(c.SyncWaits), WriteBacks: c.WriteBacks}
	st := s.origin.WriteBackStatus()
	r.DirtyBytes = st.Dirty
	switch {
	case st.Failed != nil:
		r.State, r.Error = api.OriginFailed, st.Failed.Error()
	case st.Failing != nil:
		r.State, r.Error = api.OriginFailing, st.Failing.Error()
	}
	return r
}

// Snapshot returns one snapshot.
func (s *Server) Snapshot(name string) (api.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.find(name)
	if v == nil {
		return api.Snapshot{}, noSnapshot(name)
	}
	return s.statusOf(v), nil
}

// waiting is the number of writes to an export that wait for space.
func (s *Server) waiting(name string) int64 {
	c, _ := s.nbd.Counters(name)
	return c.Waiting
}

// statusOf returns one snapshot. mu is held.
func (s *Server) statusOf(v *attached) api.Snapshot {
	r := api.Snapshot{Name: v.name, COW: v.path, URI: s.uri(v.name), VhostUser: s.vhostSocket(v.name), File: s.pathOf(v.name), Waiting: s.waiting(v.name), Changes: v.dev.changes.Load()}
	if !utf8.ValidString(v.path) {
		r.COW, r.COWBase64 = strings.ToValidUTF8(v.path, "\ufffd"), []byte(v.path)
	}
	c := v.snap.Counters()
	if v.merge == nil {
		r.Figures, r.Counters = figures.Of(v.snap.Status()), figures.Counters(c, latency.Histogram{})
		return r
	}
	m := v.merge.merging.Counters()
	c.Store = m.Store
	r.Counters = figures.Counters(c, m.StepWaits)
	st := v.merge.merging.Status()
	if r.Merged = v.merge.done(); r.Merged {
		st.State = snapshot.StateOK // what is left is an empty store
	}
	r.Figures = figures.Of(st)
	return r
}
