package snapshot

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/store"
)

// The kernel's two reasons for invalidating a snapshot (specification 6.1).
const (
	reasonIO    = "Error reading/writing."
	reasonSpace = "Unable to allocate exception."
)

func reasonFor(err error) string {
	if errors.Is(err, store.ErrFull) {
		return reasonSpace
	}
	return reasonIO
}

// invalidate is what a failed copy, a failed metadata write and a full COW device mean: the snapshot
// can't be trusted any more and says so, on disk too, durably, when this returns. It returns the error
// for a request of the snapshot.
//
// Several requests may find the failure at once. Whoever comes second waits here until the mark is on
// disk: it may be an origin write that is going to change what could not be kept (H5).
func (s *Snapshot) invalidate(reason string, cause error) error {
	s.invalidating.Lock()
	defer s.invalidating.Unlock()
	if s.invalid.Load() {
		return s.store.Err()
	}
	marked := s.store.Invalidate(fmt.Errorf("%s (%w)", reason, cause))
	s.invalid.Store(true)
	notify(s.opts, Event{Kind: EventInvalid, Text: "Invalidating snapshot: " + reason, Err: errors.Join(cause, marked)})
	return s.store.Err()
}

// settleInvalid makes the mark of a store that was loaded as invalid durable: whoever wrote it may have been
// killed before it was, and from now on the origin changes without regard to that store.
func settleInvalid(st *store.Store) error {
	if !errors.Is(st.Err(), store.ErrInvalid) {
		return nil
	}
	if err := st.Device().Flush(); err != nil {
		return fmt.Errorf("the store is invalid, and that can't be made durable: %w", err)
	}
	return nil
}

// noSpace decides what it means that a write to the snapshot could get no chunk.
func (s *Snapshot) noSpace(err error) error {
	if none := s.noRoom(err); none != nil {
		return none
	}
	if !errors.Is(err, store.ErrFull) || s.opts.Store != PersistentOverflow {
		return s.giveUp(err)
	}
	if s.overflowed.CompareAndSwap(false, true) {
		notify(s.opts, Event{Kind: EventOverflow, Text: "Snapshot overflowed: " + reasonSpace, Err: err})
	}
	return fmt.Errorf("%w: %w", ErrOverflow, err)
}

// giveUp invalidates s, for which a request could get no chunk or copy none. When the COW device is full, what
// is complete goes to disk first: nobody will load it, but it is what rescue finds.
func (s *Snapshot) giveUp(err error) error {
	if errors.Is(err, store.ErrFull) {
		// Before s.invalidating is taken: Sync may wait for a copy under way, which on failing wants that
		// lock. An error of Sync changes nothing any more.
		s.store.Sync()
	}
	return s.invalidate(reasonFor(err), err)
}

// sync makes the store durable for a request of the snapshot.
func (s *Snapshot) sync() error {
	err := s.store.Sync()
	if err == nil {
		return nil
	}
	if none := s.noRoom(err); none != nil {
		return none
	}
	return s.invalidate(reasonIO, err)
}
