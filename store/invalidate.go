package store

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Invalidate gives the store up permanently: from now on it refuses everything but lookups, and its
// header on disk says valid = 0, durably, when Invalidate returns nil (specification 6.1, H5). why is
// kept in Err; that of the first call counts.
//
// The mark is tried whatever failed on the device before: see block.WriteLast. An error says that it could
// not be made durable: memory refuses all the same, and the disk may still hold a valid store. A later call
// tries the mark again, until one succeeded.
//
// The header has a buffer of its own and a place that no Sync writes to, so it needs no order with
// rounds under way (the lesson of 8.1 #6).
func (s *Store) Invalidate(why error) error {
	s.mu.Lock()
	first := !errors.Is(s.err, ErrInvalid)
	if first {
		s.err = fmt.Errorf("%w: %w", ErrInvalid, why)
		s.moved.Broadcast()
	}
	s.mu.Unlock()
	s.marking.Lock()
	defer s.marking.Unlock()
	if s.transient || s.marked || s.header.Valid == 0 {
		return nil
	}
	h := s.header
	h.Valid = 0
	if first {
		// The kernel writes the whole chunk, zeros behind the header. They say nothing, and the mark does
		// not depend on them.
		b := metaBlock(s.layout)
		block.Zero(s.dev, b, s.layout.ChunkBytes()-b, 0)
	}
	if err := writeMark(s.dev, s.layout, h); err != nil {
		return fmt.Errorf("mark store invalid: %w", err)
	}
	s.marked = true
	return nil
}

// writeMark is writeHeader on a device that may have failed before.
func writeMark(dev block.Device, l ondisk.Layout, h ondisk.Header) error {
	err := writeHeader(dev, l, h)
	if err == nil {
		return nil
	}
	buf := make([]byte, metaBlock(l))
	h.Encode(buf)
	if last := block.WriteLast(dev, buf, 0); last != nil {
		return fmt.Errorf("%w; and once more: %w", err, last)
	}
	return nil
}

// Settle makes durable what the store was found to be, by writing it again: the end of the exceptions, or the mark that
// says invalid. A flush alone is not enough for what Open read: after a failed flush the operating system may show it
// for clean while it is not on the disk. A store that wrote its end itself, durably, since it was opened is settled.
//
// Whoever says that a merge is complete, or lets an origin change without regard to an invalid store, calls it before.
// Nothing may be reserved or committed and not yet durable. On a device that was opened for reading it does nothing and
// succeeds. Another error is the store's Err from now on (ErrFailed), unless that is ErrInvalid.
func (s *Store) Settle() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	if s.transient || s.settled {
		return nil
	}
	var err error
	if errors.Is(s.Err(), ErrInvalid) {
		if s.header.Valid != 0 {
			return s.Invalidate(nil) // since Open: it may not be marked yet
		}
		err = s.settleHeader()
	} else if err = s.mergeable(); err == nil {
		err = s.settleEnd()
	}
	switch {
	case errors.Is(err, block.ErrReadOnly):
		return nil
	case errors.Is(err, ErrFailed), err == nil:
	case errors.Is(s.Err(), ErrInvalid):
		err = fmt.Errorf("mark store invalid: %w", err)
	default:
		err = s.fail(fmt.Errorf("%w: write the end of the exceptions again: %w", ErrFailed, err))
	}
	s.settled = err == nil
	return err
}

// settleHeader writes the header's block as it is.
func (s *Store) settleHeader() error {
	buf := make([]byte, metaBlock(s.layout))
	if _, err := s.dev.ReadAt(buf, 0); err != nil {
		return err
	}
	return block.WriteDurable(s.dev, buf, 0)
}

// settleEnd writes the block with the end mark as memory has it, and zeros behind it.
func (s *Store) settleEnd() error {
	if err := s.scrubTail(); err != nil {
		return err
	}
	off, _ := s.tailOffset()
	if err := s.dev.Flush(); err != nil {
		return err
	}
	return block.WriteDurable(s.dev, s.tail, off)
}
