package store

import "github.com/dmsnap/dmsnap/latency"

// Counters are what a store has done since it was opened or created.
type Counters struct {
	Exceptions uint64 // committed
	Syncs      uint64 // calls of Sync, those that Reserve makes among them

	// Rounds are the rounds of writing and flushing that calls of Sync shared, with the time that each took: at most one
	// for each call.
	Rounds latency.Histogram

	// CopyWaits are the rounds that had to wait for data of older reservations.
	CopyWaits latency.Histogram
}

// Counters returns what the store has done so far. It waits for no I/O. The numbers are not of one instant.
func (s *Store) Counters() Counters {
	c := Counters{Syncs: s.syncs.Load(), Rounds: s.syncTook.Histogram(), CopyWaits: s.copyWaits.Histogram()}
	s.mu.Lock()
	defer s.mu.Unlock()
	c.Exceptions = s.commits
	return c
}
