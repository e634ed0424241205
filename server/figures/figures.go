// Package figures converts what the engine reports to the types of the control API.
//
//	status.Activity = figures.Activity(device) // an *activity.Device
//
// Guarantees: nothing is read from a disk, but for the ranges that HeatMap is given a function of; functions may be called while the devices are in use,
// and each figure is of one moment, not all of the same.
package figures

import (
	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// Of converts a status to the types of the API.
func Of(st snapshot.Status) api.Figures {
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

// Counters returns the counters of a snapshot, and those of its merge, in the types of the API.
func Counters(c snapshot.Counters, mergeWaits latency.Histogram) api.Counters {
	return api.Counters{PreservedChunks: c.Preserved.Chunks, PreservedBytes: c.Preserved.Bytes,
		WrittenChunks: c.Written.Chunks, FilledBytes: c.Written.Bytes, NoRoom: c.NoRoom,
		Exceptions: c.Store.Exceptions, Syncs: c.Store.Syncs, Rounds: Latency(c.Store.Rounds),
		CopyWaits: Latency(c.Store.CopyWaits), OwnerWaits: Latency(c.OwnerWaits),
		ReadWaits: Latency(c.ReaderWaits), MergeWaits: Latency(mergeWaits)}
}

// Latency converts a histogram to the type of the API.
func Latency(h latency.Histogram) api.Latency {
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
