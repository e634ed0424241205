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
