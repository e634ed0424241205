package snapshot

import (
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// preserve makes s keep what it shows of n > 0 bytes at off, before the origin changes there, and reports whether its
// store needs a Sync before the change may be made. It fails with ErrNoRoom, to protect s where that is its policy;
// other failures invalidate s, and the change continues, unless s can't be marked invalid: then it fails with
// ErrUnmarked. origin.mu is held for reading.
//
// When it returns without an error, every chunk of the range has an exception that Lookup finds, or s is invalid, and
// no request to s still reads the range from the origin.
func (s *Snapshot) preserve(off, n int64) (needsSync bool, err error) {
	if off >= s.size || s.store == nil {
		return false, nil // beyond a shorter snapshot (docs/spec/dm-snapshot.md §5.7), or handed over
	}
	first, count := chunks(s.store.Layout(), off, min(n, s.size-off))
	if needsSync, err = s.keep(first, count); err != nil {
		return needsSync, err
	}
	// Also where nothing was copied: the request that made the exception may still be waiting for an earlier reader.
	// And where s is invalid: an earlier read succeeds, so it must not return the new content of the origin.
	s.gate.Drain(span(first, count))
	return needsSync, nil
}

// keep is preserve without the waiting for readers.
func (s *Snapshot) keep(first ondisk.OriginChunk, count uint64) (needsSync bool, err error) {
	l := s.store.Layout()
	for at, left := first, count; left > 0; {
		if s.invalid.Load() {
			return false, nil
		}
		new, k, mapped := s.store.LookupRun(at, left)
		if mapped {
			// It may be committed and not yet durable, by another origin write or by a write to the snapshot: the
			// origin must not change before it is durable.
			if !s.store.Durable(new + ondisk.COWChunk(k-1)) {
				needsSync = true
			}
		} else {
			if k, err = s.copyOut(at, min(k, uint64(max(1, batchBytes/l.ChunkBytes())))); err != nil {
				if none := s.noRoom(err); none != nil {
					return needsSync, none
				}
				s.giveUp(err)
				return false, s.refusal()
			}
			needsSync = true
		}
		at, left = at+ondisk.OriginChunk(k), left-k
	}
	return needsSync, nil
}

// copyOut copies at most count chunks from first on to the COW device and commits their exceptions. It returns how many
// have one now, 0 when another request made the first.
func (s *Snapshot) copyOut(first ondisk.OriginChunk, count uint64) (uint64, error) {
	owned := s.gate.Own(span(first, count))
	defer owned.Release()
	_, count, mapped := s.store.LookupRun(first, count)
	if mapped {
		return 0, nil
	}
	r, err := s.reserve(first, count)
	if err != nil {
		return 0, err
	}
	l := s.store.Layout()
	start, end := l.OriginRange(first, r.Count, s.origin.dev.Size()) // docs/spec/dm-snapshot.md §5.8
	if err := block.Copy(s.cow, l.COWOffset(r.New), s.origin.dev, start, end-start, block.LongHoles, nil); err != nil {
		if s.noRoom(err) != nil {
			r.Cancel()
		}
		return 0, fmt.Errorf("copy origin chunk %d to COW chunk %d: %w", r.Old, r.New, err)
	}
	s.copies.add(r.Count, end-start)
	return r.Count, s.commit(r)
}

// syncForOrigin makes the exceptions durable that an origin write waits for. It fails like preserve.
func (s *Snapshot) syncForOrigin() error {
	err := s.store.Sync()
	if err == nil {
		return nil
	}
	if none := s.noRoom(err); none != nil {
		return none
	}
	s.invalidate(reasonIO, err)
	return s.refusal()
}

var _ block.Device = (*Snapshot)(nil)
