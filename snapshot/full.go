package snapshot

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

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
	FullPause                        // the write waits until there is room, or the snapshot is closed
)

// ErrNoRoom reports a write that was refused to protect a snapshot whose COW device has no room. It is
// also syscall.ENOSPC.
var ErrNoRoom = errors.New("no room in the COW device")

// Growth is how a COW file is made longer when its end is reached. The zero value leaves it as it is.
type Growth struct {
	Step int64 // bytes at a time; at least an area and a chunk are added
	Max  int64 // bytes that the file may have in the end, 0: no bound
}

// ErrInterrupted reports a write that waited for room and was interrupted by [Snapshot.InterruptPaused]. Parts of it may
// have been written. Writing it again does no harm.
var ErrInterrupted = errors.New("interrupted while it waited for room in the COW device")

// noRoomError is ErrNoRoom of one snapshot.
type noRoomError struct {
	snapshot *Snapshot
	err      error
}

func (e *noRoomError) Error() string   { return fmt.Sprintf("%v: %v", ErrNoRoom, e.err) }
func (e *noRoomError) Unwrap() []error { return []error{ErrNoRoom, syscall.ENOSPC, e.err} }

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
// too: it refuses writes permanently, but what it made durable is sound and there when it is loaded again. A store
// that is invalid already is not protected any more.
func (s *Snapshot) noRoom(err error) error {
	if s.opts.OnFull == FullInvalidate || !errors.Is(err, store.ErrFull) && !block.IsNoSpace(err) {
		return nil
	}
	var copying *block.CopyError
	if errors.Is(err, store.ErrInvalid) || errors.As(err, &copying) && copying.Op == "read" {
		return nil
	}
	if s.full.CompareAndSwap(false, true) {
		text := "No room in the COW device: writes that need some fail."
		if s.opts.OnFull == FullPause {
			text = "No room in the COW device: writes that need some wait."
		}
		notify(s.opts, Event{Kind: EventFull, Text: text, Err: err})
	}
	return &noRoomError{s, err}
}

// retryEvery is how often a waiting write looks whether there is room.
const retryEvery = time.Second

// pauses are the writes that wait for room. They hold no lock, so that snapshots can be closed, grown and
// attached meanwhile.
type pauses struct {
	mu      sync.Mutex
	retry   chan struct{} // closed to make all of them try again
	ended   bool
	waiting int
}

// wait waits until it is time to try again. It returns false when nobody may wait any more, or done is closed.
func (p *pauses) wait(done <-chan struct{}) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return false
	}
	if p.retry == nil {
		p.retry = make(chan struct{})
	}
	retry := p.retry
	p.waiting++
	p.mu.Unlock()
	again := time.NewTimer(retryEvery)
	select {
	case <-retry:
	case <-again.C:
	case <-done:
	}
	again.Stop()
	p.mu.Lock()
	p.waiting--
	select {
	case <-done:
		return false
	default:
		return !p.ended
	}
}

// wake makes all waiting writes try again.
func (p *pauses) wake(end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = p.ended || end
	if p.retry != nil {
		close(p.retry)
		p.retry = nil
	}
}

// waitsForRoom reports whether err is a lack of room that is to be waited for.
func waitsForRoom(err error) bool {
	var none *noRoomError
	return errors.As(err, &none) && none.snapshot.opts.OnFull == FullPause
}

// untilRoom calls do until it ends with anything but a lack of room that may be waited for.
func (o *Origin) untilRoom(do func() error) error {
	for {
		err := do()
		if !waitsForRoom(err) || !o.pauses.wait(nil) {
			return err
		}
	}
}

// RetryPaused makes every write that waits for room (FullPause) look for it now. Without it they look once
// a second.
func (o *Origin) RetryPaused() { o.pauses.wake(false) }

// InterruptPaused fails the writes to s that wait for room, and those that find none from now on, with ErrInterrupted,
// until end is called. Whoever is about to put another device in the place of s does so, and writes them there.
// Writes to the origin go on waiting.
func (s *Snapshot) InterruptPaused() (end func()) {
	s.interrupts.Add(1)
	s.origin.pauses.wake(false)
	return func() { s.interrupts.Add(-1) }
}

// EndPauses fails every write that waits for room, with ErrNoRoom, and lets none wait from now on: the
// process is ending.
func (o *Origin) EndPauses() { o.pauses.wake(true) }

// Paused is the number of writes, to the origin and its snapshots, that wait for room.
func (o *Origin) Paused() int {
	o.pauses.mu.Lock()
	defer o.pauses.mu.Unlock()
	return o.pauses.waiting
}
