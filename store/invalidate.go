package store

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
)

// Invalidate gives the store up for good: from now on it refuses everything but lookups, and its
// header on disk says valid = 0, durably, when Invalidate returns nil (specification 6.1, H5). A second
// call does nothing. why is kept in Err.
//
// The header has a buffer of its own and a place that no Sync writes to, so it needs no order with
// rounds under way (the lesson of 8.1 #6). An error says that the mark could not be written: memory
// refuses all the same, the disk may not.
func (s *Store) Invalidate(why error) error {
	s.mu.Lock()
	if errors.Is(s.err, ErrInvalid) {
		s.mu.Unlock()
		return nil
	}
	s.err = fmt.Errorf("%w: %w", ErrInvalid, why)
	s.moved.Broadcast()
	s.mu.Unlock()
	if s.transient {
		return nil
	}
	h := s.header
	h.Valid = 0
	// The kernel writes the whole chunk, zeros behind the header. The mark comes last: it is what
	// must be durable.
	b := metaBlock(s.layout)
	zeroed := block.Zero(s.dev, b, s.layout.ChunkBytes()-b, 0)
	if err := errors.Join(zeroed, writeHeader(s.dev, s.layout, h)); err != nil {
		return fmt.Errorf("mark store invalid: %w", err)
	}
	return nil
}
