package snapshot

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// FullPolicy is what to do with a write that needs space in the COW device when there is none: its end is reached, or
// its file system is full. Writes that need no space, reads and flushes are not affected.
type FullPolicy uint8

const (
	FullInvalidate FullPolicy = iota // as the kernel: the snapshot becomes invalid, or with PO overflows (docs/spec/dm-snapshot.md §6.1, §6.2)
	FullFail                         // the write fails with ErrNoRoom; nothing else changes
	FullPause                        // as FullFail, but the error is a block.RetryLater: the caller waits and tries again
)

// onFull is the policy of now.
func (o *Options) onFull() FullPolicy {
	if o.FullPolicy != nil {
		return o.FullPolicy()
	}
	return o.OnFull
}

// ErrNoRoom reports a write that was refused to protect a snapshot whose COW device has no space. It is
// also syscall.ENOSPC.
var ErrNoRoom = errors.New("no space in the COW device")

// Growth is how a COW file is extended when its end is reached. The zero value never extends it.
type Growth struct {
	Step int64 // bytes at a time; at least an area and a chunk are added
	Max  int64 // largest size of the file in bytes, 0: no limit
}

// noRoomError is ErrNoRoom of one snapshot.
type noRoomError struct {
	wait bool // the policy is to wait for space
	err  error
}

func (e *noRoomError) Error() string   { return fmt.Sprintf("%v: %v", ErrNoRoom, e.err) }
func (e *noRoomError) Unwrap() []error { return []error{ErrNoRoom, syscall.ENOSPC, e.err} }

// retryLater is a noRoomError that the caller is to wait for, as the engine returns it.
type retryLater struct {
	error
	changed <-chan struct{}
}

func (e *retryLater) Unwrap() error          { return e.error }
func (e *retryLater) Retry() <-chan struct{} { return e.changed }

// room notifies writers that wait for space that there may be some.
type room struct{ changed atomic.Pointer[chan struct{}] }

// made makes all waiting writers try again.
func (r *room) made() {
	next := make(chan struct{})
	if old := r.changed.Swap(&next); old != nil {
		close(*old)
	}
}

// changing calls do, a change of the origin or of a snapshot, or a step of a merge. Its error is a block.RetryLater
// where the caller is to wait for space. No lock is held then. The channel is taken before do, so that space made while
// do fails is not missed.
func (o *Origin) changing(do func() error) error {
	changed := *o.room.changed.Load()
	err := do()
	if waitsForRoom(err) {
		return &retryLater{err, changed}
	}
	return err
}

// reserve allocates chunks; see store.Reserve. It extends the COW device first where that is the policy. noRoom
// classifies its error when there is no space.
func (s *Snapshot) reserve(first ondisk.OriginChunk, count uint64) (store.Reservation, error) {
	r, err := s.store.Reserve(first, count)
	if errors.Is(err, store.ErrFull) && s.opts.Grow.Step > 0 && !block.IsNoSpace(err) {
		r, err = s.growAndReserve(first, count)
	}
	return r, err
}

// commit is r.Commit, and records that there was space.
func (s *Snapshot) commit(r store.Reservation) error {
	if s.full.Load() {
		s.full.Store(false)
		s.fullAt.Store(0)
	}
	return r.Commit()
}

// growAndReserve extends the COW device, unless another goroutine did so meanwhile. Others find the new space without
// waiting for the lock and may use all of it first: hence the loop. It ends, since each round extends the device, up to
// its maximum.
func (s *Snapshot) growAndReserve(first ondisk.OriginChunk, count uint64) (store.Reservation, error) {
	s.growing.Lock()
	defer s.growing.Unlock()
	for {
		r, err := s.store.Reserve(first, count)
		if !errors.Is(err, store.ErrFull) || block.IsNoSpace(err) {
			return r, err
		}
		if grown, growErr := s.growStep(); growErr != nil {
			return r, fmt.Errorf("%w, and it could not be made longer: %w", err, growErr)
		} else if !grown {
			return r, err
		}
	}
}

// growStep extends the COW device once; false where it must not be extended. s.growing is held.
func (s *Snapshot) growStep() (bool, error) {
	g, size := s.opts.Grow, s.cow.Size()
	longer := size + max(g.Step, 2*s.store.Layout().ChunkBytes())
	if g.Max > 0 {
		longer = min(longer, g.Max)
	}
	if longer <= size {
		return false, nil
	}
	if err := block.Grow(s.cow, longer); err != nil {
		return false, err
	}
	notify(s.opts, Event{Kind: EventGrown, Text: fmt.Sprintf("COW device was made longer, from %d to %d bytes", size, longer)})
	return true, nil
}

// noRoom returns the error of a write that found no space in the COW device of s, under a policy that protects the
// snapshot; nil where err is something else, or the policy is the kernel's. The first one raises an event.
//
// err comes from the store of s, from its COW device, or from a copy between that and the origin's device: a lack of
// space on another device does not concern s.
//
// A store that failed because its slots found no space, on a file system that can't reserve it, counts too: what it
// made durable is intact and available when it is loaded again. Until then it refuses writes even if there is space, so
// nothing waits for it. A store that is invalid already is not protected any more.
func (s *Snapshot) noRoom(err error) error {
	policy := s.opts.onFull()
	if policy == FullInvalidate || !errors.Is(err, store.ErrFull) && !block.IsNoSpace(err) {
		return nil
	}
	var copying *block.CopyError
	if errors.Is(err, store.ErrInvalid) || errors.As(err, &copying) && copying.Op == "read" {
		return nil
	}
	failed := errors.Is(s.store.Err(), store.ErrFailed)
	if s.full.CompareAndSwap(false, true) {
		text := "No space in the COW device: writes that need some fail."
		switch {
		case failed:
			text = "No space for the exception store: it failed, and writes that need it fail until it is loaded again."
		case policy == FullPause:
			text = "No space in the COW device: writes that need some wait."
		}
		notify(s.opts, Event{Kind: EventFull, Text: text, Err: err})
	}
	s.noRooms.Add(1)
	return &noRoomError{policy == FullPause && !failed, err}
}

// waitsForRoom reports whether err is a lack of space that the caller is to wait for.
func waitsForRoom(err error) bool {
	if err == nil {
		return false // without an allocation
	}
	var none *noRoomError
	return errors.As(err, &none) && none.wait
}

// RetryPaused makes all writes that wait for space (FullPause) try again now. Without it they try once in a
// block.RetryInterval.
func (o *Origin) RetryPaused() { o.room.made() }
