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

// ErrUnmarked reports an origin write that needed a snapshot which is lost and could not be marked invalid
// on its COW device: if the origin changed, the store there would show the change as the past. Under
// FullInvalidate such writes go on, as the kernel's do.
var ErrUnmarked = errors.New("a lost snapshot could not be marked invalid")

// invalidate is called when a copy or a metadata write failed, or the COW device is full: the snapshot
// can't be trusted any more, and is marked invalid on disk too, durably, when this returns. It returns the
// error for a request of the snapshot. Where the mark can't be made durable, refusal says what that means
// for an origin write; the next call tries the mark again.
//
// Several requests may find the failure at once. The second one waits here until the mark is on
// disk: it may be an origin write that is going to change what could not be kept (H5).
func (s *Snapshot) invalidate(reason string, cause error) error {
	s.invalidating.Lock()
	defer s.invalidating.Unlock()
	if !s.invalid.Load() {
		s.mark(reason, cause)
	}
	return s.store.Err()
}

// mark makes one attempt to mark s invalid. s.invalidating is held.
func (s *Snapshot) mark(reason string, cause error) {
	again := s.unmarked.Load() != nil
	failed := s.store.Invalidate(fmt.Errorf("%s (%w)", reason, cause))
	if failed == nil {
		s.unmarked.Store(nil)
	} else {
		s.unmarked.Store(&failed)
	}
	s.invalid.Store(failed == nil || s.opts.OnFull == FullInvalidate)
	s.origin.room.made() // nobody waits for s any more
	switch {
	case !again:
		if reason == reasonIO {
			s.failed.Store(true)
		}
		notify(s.opts, Event{Kind: EventInvalid, Text: "Invalidating snapshot: " + reason, Err: errors.Join(cause, failed)})
	case failed == nil:
		notify(s.opts, Event{Kind: EventNotice, Text: "Snapshot is marked invalid on its COW device now."})
	}
}

// markAgain tries the mark once more where it could not be made, and returns why it can't.
func (s *Snapshot) markAgain() error {
	s.invalidating.Lock()
	defer s.invalidating.Unlock()
	if s.unmarked.Load() != nil {
		s.mark(reasonIO, s.store.Err())
	}
	return s.markFailure()
}

// markFailure returns why the mark could not be made, nil where it was, or was not needed.
func (s *Snapshot) markFailure() error {
	if failed := s.unmarked.Load(); failed != nil {
		return fmt.Errorf("%w: %w", ErrUnmarked, *failed)
	}
	return nil
}

// refusal returns why an origin write that needed s, which was given up, must not be made: nil once the mark
// is durable, and under FullInvalidate.
func (s *Snapshot) refusal() error {
	if s.invalid.Load() {
		return nil
	}
	return s.markFailure()
}

// Failure returns what made the snapshot invalid since it was loaded: an error of a device, not the COW
// device's end. It is nil for a snapshot that was loaded as invalid.
func (s *Snapshot) Failure() error {
	s.origin.mu.RLock()
	defer s.origin.mu.RUnlock()
	if s.store == nil || !s.failed.Load() {
		return nil
	}
	return errors.Join(s.store.Err(), s.markFailure())
}

// settleInvalid makes the mark of a store that was loaded as invalid durable: whoever wrote it may have been
// killed before it was, or its flush may have failed, and from now on the origin changes without regard to that store.
func settleInvalid(st *store.Store) error {
	if !errors.Is(st.Err(), store.ErrInvalid) {
		return nil
	}
	if err := st.Settle(); err != nil {
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
