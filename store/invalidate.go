package store

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Invalidate makes the store invalid, permanently: from now on it refuses everything but lookups, and its header on
// disk has valid = 0, durably, when Invalidate returns nil (docs/spec/dm-snapshot.md §6.1 and hazard H5). Err returns
// why; the first call's counts.
//
// The mark is tried whatever failed on the device before: see block.WriteLast. An error means that it could not be made
// durable: the store in memory is invalid anyway, and the disk may still hold a valid one. A later call tries the mark
// again, until one succeeded.
//
// The header is written from its own buffer to a place that no Sync writes to, so it needs no ordering with rounds in
// flight (docs/spec/dm-snapshot.md §8.1, number 6).
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
		// The kernel writes the whole chunk, with zeros after the header. They have no meaning, and the mark does not
		// depend on them.
		b := metaBlock(s.layout)
		block.Zero(s.dev, b, s.layout.ChunkBytes()-b, 0)
	}
	if err := writeMark(s.dev, s.firstBlock(h)); err != nil {
		return fmt.Errorf("mark store invalid: %w", err)
	}
	s.marked = true
	return nil
}

// ChangeLabel changes the first sector of the COW device, durably; change gets all of it and leaves the header as it is.
// It may be called while the store is in use. Errors, with nothing changed: ErrInvalid and ErrFailed of a store that is
// either, ErrNoMerge of a transient one; and those of the device.
func (s *Store) ChangeLabel(change func(sector []byte)) error {
	s.marking.Lock() // the mark of a later Invalidate comes after it
	defer s.marking.Unlock()
	if s.transient {
		return ErrNoMerge
	}
	if err := s.Err(); err != nil {
		return err
	}
	return s.changeFirst(change, block.WriteDurable)
}

// changeFirst changes the first sector of the device by write. marking is held.
func (s *Store) changeFirst(change func(sector []byte), write func(dev block.Device, p []byte, off int64) error) error {
	b := make([]byte, metaBlock(s.layout))
	if _, err := s.dev.ReadAt(b, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	change(b[:ondisk.SectorSize])
	if err := write(s.dev, b, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return nil
}

// Seal labels the store as a sealed layer (ondisk.SealedLabel): from now on Reserve and DropLast return
// ondisk.ErrSealed, also after the store was opened again, and so does package cowfile for every use that writes. The label
// is durable after the next Sync; it changes nothing of what the store holds, for dmsnap or for the kernel. Nothing may be
// reserved. A store that is sealed needs nothing. Errors are those of ChangeLabel.
func (s *Store) Seal() error {
	s.marking.Lock()
	defer s.marking.Unlock()
	if s.transient {
		return ErrNoMerge
	}
	if err := s.Err(); err != nil || s.Sealed() {
		return err
	}
	err := s.changeFirst(ondisk.SealedLabel{}.Encode, func(dev block.Device, p []byte, off int64) error {
		_, err := dev.WriteAt(p, off)
		return err
	})
	if err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.sealed = true
	}
	return err
}

// Sealed reports whether the store is labelled as a sealed layer.
func (s *Store) Sealed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sealed
}

// writeMark writes the first block of chunk 0, durably, on a device that may have failed before.
func writeMark(dev block.Device, first []byte) error {
	err := block.WriteDurable(dev, first, 0)
	if err == nil {
		return nil
	}
	if last := block.WriteLast(dev, first, 0); last != nil {
		return fmt.Errorf("%w; and once more: %w", err, last)
	}
	return nil
}

// Settle makes durable what Open read, by writing it again: the end of the exceptions, or the mark of an invalid store.
// A flush alone is not enough: after a failed flush the operating system may show data as clean that is not on the
// disk. A store that wrote its end itself, durably, since it was opened needs nothing.
//
// Call it before reporting that a merge is complete, and before an origin changes without regard to an invalid store.
// Nothing may be reserved or committed and not yet durable. On a device that was opened for reading it does nothing and
// succeeds. Any other error becomes the store's Err (ErrFailed), unless that is ErrInvalid.
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

// settleEnd writes the block with the end mark from memory, and zeros after it.
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
