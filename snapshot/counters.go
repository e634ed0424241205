package snapshot

import (
	"sync/atomic"

	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/store"
)

// Copies counts chunks that were given a place in a COW device, and the bytes that were copied from the origin for them.
type Copies struct {
	Chunks uint64
	Bytes  uint64
}

// copyCounter is Copies that grow.
type copyCounter struct{ chunks, bytes atomic.Uint64 }

func (c *copyCounter) add(chunks uint64, bytes int64) {
	c.chunks.Add(chunks)
	c.bytes.Add(uint64(bytes))
}

func (c *copyCounter) copies() Copies { return Copies{c.chunks.Load(), c.bytes.Load()} }

// Counters are what a snapshot has done since it was loaded. Reads are not counted, nor writes to chunks that have an
// exception.
type Counters struct {
	Preserved Copies // chunks copied because the origin was about to change
	Written   Copies // chunks made by writes to the snapshot; Bytes: what the writes did not replace

	OwnerWaits  latency.Histogram // waits of requests for another one that makes an exception for the same chunk
	ReaderWaits latency.Histogram // waits of origin writes for reads of the snapshot that had begun before
	NoRoom      uint64            // writes that found no space, each time, where Options.OnFull has them fail or wait

	Store store.Counters // zero while the snapshot has no store, before and after a handover
}

// Counters returns what the snapshot has done so far. It waits for no request. The numbers are not of one instant.
func (s *Snapshot) Counters() Counters {
	s.origin.mu.RLock()
	defer s.origin.mu.RUnlock()
	c := Counters{Preserved: s.copies.copies(), Written: s.fills.copies(), NoRoom: s.noRooms.Load(),
		OwnerWaits: s.gate.OwnWaits(), ReaderWaits: s.gate.DrainWaits()}
	if s.store != nil {
		c.Store = s.store.Counters()
	}
	return c
}

// OriginCounters are what an origin has done since NewOrigin.
type OriginCounters struct {
	// SyncWaits are waits until exceptions were durable, in one or more stores, before the origin changed: of writes, or
	// of all writes that were in memory together.
	SyncWaits latency.Histogram

	// WriteBacks are writes that were acknowledged while they were in memory only (WriteBack).
	WriteBacks uint64
}

// Counters returns what the origin has done so far. What was copied for its snapshots is in their counters.
func (o *Origin) Counters() OriginCounters {
	return OriginCounters{SyncWaits: o.syncWaits.Histogram(), WriteBacks: o.writeBacks.Load()}
}

// MergingCounters are what a merge has done since it was loaded.
type MergingCounters struct {
	StepWaits latency.Histogram // waits of steps and of writes for each other
	Store     store.Counters    // of the store that is merged, from when it was loaded: before the merge began, if it was a snapshot's
}

// Counters returns what the merge has done so far. It waits for no request.
func (m *Merging) Counters() MergingCounters {
	c := MergingCounters{StepWaits: m.gate.OwnWaits()}
	if st := m.store.Load(); st != nil {
		c.Store = st.Counters()
	}
	return c
}
