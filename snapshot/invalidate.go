package snapshot

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/store"
)

// The kernel's two reasons for invalidating a snapshot, in the words of its log, for the text of EventInvalid
// (docs/spec/dm-snapshot.md §6.1).
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

// ErrUnmarked reports an origin write that was refused because a snapshot became invalid and could not be marked so on
// its COW device: after the write, the store there would show new data of the origin as old. Under FullInvalidate such
// writes continue, as in the kernel.
var ErrUnmarked = errors.New("a lost snapshot could not be marked invalid")

// invalidate is called when a copy or a metadata write failed, or the COW device is full: the snapshot is incomplete,
// and is marked invalid on disk too, durably, when this returns. It returns the error for a request of the snapshot.
// Where the mark can't be made durable, refusal decides what an origin write does; the next call tries the mark again.
//
// Several requests may find the failure at once. The second one waits here until the mark is on disk: it may be an
// origin write that is going to change what could not be kept (docs/spec/dm-snapshot.md §8.2, H5).
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
	what := "data or metadata could not be copied"
	if reason == reasonSpace {
		what = "no space for another exception"
	}
	failed := s.store.Invalidate(fmt.Errorf("%s: %w", what, cause))
	if failed == nil {
		s.unmarked.Store(nil)
	} else {
		s.unmarked.Store(&failed)
	}
	s.invalid.Store(failed == nil || s.opts.onFull() == FullInvalidate)
	s.origin.room.made() // nothing waits for s any more
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

// refusal returns why an origin write that needed s, which is invalid, must not be made: nil once the mark is durable,
// and under FullInvalidate.
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

// settleInvalid makes the mark of a store that was loaded as invalid durable: the program that wrote it may have been
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

// noSpace decides the result of a write to the snapshot for which no chunk could be reserved.
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

// giveUp invalidates s after a request could not reserve or copy a chunk. When the COW device is full, completed
// exceptions are made durable first: the store will not be loaded again, but rescue recovers them.
func (s *Snapshot) giveUp(err error) error {
	if errors.Is(err, store.ErrFull) {
		// Before s.invalidating is taken: Sync may wait for a copy in flight, which takes that lock when it fails. An
		// error of Sync makes no difference any more.
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
