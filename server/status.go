package server

import (
	"strings"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// FiguresOf converts a status to the types of the API.
func FiguresOf(st snapshot.Status) api.Figures {
	f := api.Figures{Store: st.Store.String(), State: api.State(st.State), Valid: st.State != snapshot.StateInvalid,
		ChunkSectors: st.ChunkSectors, Exceptions: st.Exceptions, SectorsAllocated: st.Allocated,
		TotalSectors: st.Total, MetadataSectors: st.Metadata, Full: st.Full, Unmarked: st.Unmarked, Dmsetup: st.Text()}
	if st.Err != nil {
		f.Error = st.Err.Error()
	}
	if st.Total > 0 {
		f.Percent = 100 * float64(st.Allocated) / float64(st.Total)
	}
	return f
}

// uri is the NBD URI of an export, "" before Start. mu is held.
func (s *Server) uri(name string) string {
	if s.addr == nil {
		return ""
	}
	return exportURI(s.addr, name, s.opts.NBD.TLS != nil && s.opts.NBD.RequireTLS)
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
	r.Counters = api.OriginCounters{SyncWaits: latencyOf(c.SyncWaits), WriteBacks: c.WriteBacks}
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
	r := api.Snapshot{Name: v.name, COW: v.path, URI: s.uri(v.name), VhostUser: s.vhostSocket(v.name), File: s.pathOf(v.name), Waiting: s.waiting(v.name)}
	if !utf8.ValidString(v.path) {
		r.COW, r.COWBase64 = strings.ToValidUTF8(v.path, "\ufffd"), []byte(v.path)
	}
	c := v.snap.Counters()
	if v.merge == nil {
		r.Figures, r.Counters = FiguresOf(v.snap.Status()), countersOf(c, latency.Histogram{})
		return r
	}
	m := v.merge.merging.Counters()
	c.Store = m.Store
	r.Counters = countersOf(c, m.StepWaits)
	st := v.merge.merging.Status()
	if r.Merged = v.merge.done(); r.Merged {
		st.State = snapshot.StateOK // what is left is an empty store
	}
	r.Figures = FiguresOf(st)
	return r
}

// countersOf returns the counters of a snapshot, and those of its merge, in the types of the API.
func countersOf(c snapshot.Counters, mergeWaits latency.Histogram) api.Counters {
	return api.Counters{PreservedChunks: c.Preserved.Chunks, PreservedBytes: c.Preserved.Bytes,
		WrittenChunks: c.Written.Chunks, FilledBytes: c.Written.Bytes, NoRoom: c.NoRoom,
		Exceptions: c.Store.Exceptions, Syncs: c.Store.Syncs, Rounds: latencyOf(c.Store.Rounds),
		CopyWaits: latencyOf(c.Store.CopyWaits), OwnerWaits: latencyOf(c.OwnerWaits),
		ReadWaits: latencyOf(c.ReaderWaits), MergeWaits: latencyOf(mergeWaits)}
}

func latencyOf(h latency.Histogram) api.Latency {
	l := api.Latency{Count: h.Count, Seconds: h.Total.Seconds(), Buckets: []api.Bucket{}}
	for i, n := range h.Buckets {
		if n == 0 {
			continue
		}
		b := api.Bucket{Count: n}
		if i < latency.Buckets-1 {
			b.Below = latency.Bound(i).Seconds()
		}
		l.Buckets = append(l.Buckets, b)
	}
	return l
}
