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

// FullPolicy says what becomes of a write that needs room in the COW device when there is none: its end
// is reached, or the file system beneath is full. Writes that need no room, reads and flushes go on
// whatever it says.
type FullPolicy uint8

const (
	FullInvalidate FullPolicy = iota // the kernel's way: the snapshot is lost, or with PO overflows (6.1, 6.2)
	FullFail                         // the write fails with ErrNoRoom; nothing else changes
	FullPause                        // as FullFail, and the error is a block.RetryLater: the caller waits and tries again
)

// ErrNoRoom reports a write that was refused to protect a snapshot whose COW device has no room. It is
// also syscall.ENOSPC.
var ErrNoRoom = errors.New("no room in the COW device")

// Growth is how a COW file is made longer when its end is reached. The zero value leaves it as it is.
type Growth struct {
	Step int64 // bytes at a time; at least an area and a chunk are added
	Max  int64 // bytes that the file may have in the end, 0: no bound
}

// noRoomError is ErrNoRoom of one snapshot.
type noRoomError struct {
	wait bool // there may be room later, and the policy is to wait for it
	err  error
}

func (e *noRoomError) Error() string   { return fmt.Sprintf("%v: %v", ErrNoRoom, e.err) }
func (e *noRoomError) Unwrap() []error { return []error{ErrNoRoom, syscall.ENOSPC, e.err} }

// retryLater is a noRoomError that is to be waited for, on its way out of the engine.
type retryLater struct {
	error
	changed <-chan struct{}
}

func (e *retryLater) Unwrap() error          { return e.error }
func (e *retryLater) Retry() <-chan struct{} { return e.changed }

// room tells those who wait for room that there may be some.
type room struct{ changed atomic.Pointer[chan struct{}] }

// made makes everybody who waits try again.
func (r *room) made() {
	next := make(chan struct{})
	if old := r.changed.Swap(&next); old != nil {
		close(*old)
	}
}

// changing calls do, a change of the origin or of a snapshot, or a step of a merge. Its error is a block.RetryLater where room is to be waited
// for. No lock is held then. The channel is the one from before do: room that is made while do fails is not missed.
func (o *Origin) changing(do func() error) error {
	changed := *o.room.changed.Load()
	err := do()
	if waitsForRoom(err) {
		return &retryLater{err, changed}
	}
	return err
}

// reserve sets chunks aside; see store.Reserve. It makes the COW device longer first where that is the
// policy. What it returns when there is no room is for noRoom to judge.
func (s *Snapshot) reserve(first ondisk.OriginChunk, count uint64) (store.Reservation, error) {
	r, err := s.store.Reserve(first, count)
	if errors.Is(err, store.ErrFull) && s.opts.Grow.Step > 0 && !block.IsNoSpace(err) {
		r, err = s.growAndReserve(first, count)
	}
	return r, err
}

// commit is r.Commit; there was room for it.
func (s *Snapshot) commit(r store.Reservation) error {
	if s.full.Load() {
		s.full.Store(false)
	}
	return r.Commit()
}

// growAndReserve makes the COW device longer, unless somebody else did so meanwhile. Those who find room at
// once don't wait for the lock, and may take all that was added before its owner does: hence the loop. It
// ends, as each round adds to the device, up to its maximum.
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

// growStep makes the COW device longer once; false where it may not become longer. s.growing is held.
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

// noRoom returns the error of a write that found no room in the COW device of s, under a policy that protects the
// snapshot; nil where err is something else, or the policy is the kernel's. The first one raises an event.
//
// err comes from the store of s, from its COW device, or from a copy between that and the origin's device: a lack of
// space that another device reported says nothing about s.
//
// A store that failed because its slots found no space, on a file system that can't reserve it, counts
// too: what it made durable is sound and there when it is loaded again. Until then it refuses writes, whatever room
// there is, so nobody waits for it. A store that is invalid already is not protected any more.
func (s *Snapshot) noRoom(err error) error {
	if s.opts.OnFull == FullInvalidate || !errors.Is(err, store.ErrFull) && !block.IsNoSpace(err) {
		return nil
	}
	var copying *block.CopyError
	if errors.Is(err, store.ErrInvalid) || errors.As(err, &copying) && copying.Op == "read" {
		return nil
	}
	failed := errors.Is(s.store.Err(), store.ErrFailed)
	if s.full.CompareAndSwap(false, true) {
		text := "No room in the COW device: writes that need some fail."
		switch {
		case failed:
			text = "No room for the exception store: it failed, and writes that need it fail until it is loaded again."
		case s.opts.OnFull == FullPause:
			text = "No room in the COW device: writes that need some wait."
		}
		notify(s.opts, Event{Kind: EventFull, Text: text, Err: err})
	}
	return &noRoomError{s.opts.OnFull == FullPause && !failed, err}
}

// waitsForRoom reports whether err is a lack of room that is to be waited for.
func waitsForRoom(err error) bool {
	if err == nil {
		return false // without an allocation
	}
	var none *noRoomError
	return errors.As(err, &none) && none.wait
}

// RetryPaused tells everybody who waits for room (FullPause) to look for it now. Without it they look once in a
// block.RetryInterval.
func (o *Origin) RetryPaused() { o.room.made() }
