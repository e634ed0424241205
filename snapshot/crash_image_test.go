package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// What is asked of the disks after a power cut.

// An aftermath is one image of the disks, in use again.
type aftermath struct {
	*moment
	origin *block.Memory
	cows   []*block.Memory
	o      *snapshot.Origin
	snaps  []*snapshot.Snapshot // nil where there is none
}

// check asks everything of one image. The disks are changed by it. goOn asks also that the stores can be
// written to after the cut, which takes longest.
func (m *moment) check(img *blocktest.Image, goOn bool) error {
	a := &aftermath{moment: m, origin: block.MemoryFrom(img.Disk(m.disk)), snaps: make([]*snapshot.Snapshot, len(m.cows))}
	for _, p := range m.cows {
		a.cows = append(a.cows, block.MemoryFrom(img.Disk(p.disk)))
	}
	a.o = snapshot.NewOrigin(a.origin)
	for i, p := range m.cows {
		if err := a.checkStore(i, p); err != nil {
			return fmt.Errorf("COW%d: %w", i, err)
		}
	}
	if m.merged < 0 {
		if err := judge(m.raw, a.origin.Bytes()); err != nil {
			return fmt.Errorf("ORIGIN: %w", err)
		}
	}
	if err := a.checkViews(); err != nil {
		return err
	}
	if err := a.give(img); err != nil {
		return err
	}
	if goOn && m.merged < 0 {
		if err := a.goOn(); err != nil {
			return fmt.Errorf("used again after the cut: %w", err)
		}
	}
	if m.merged >= 0 {
		if err := a.checkMerge(); err != nil {
			return fmt.Errorf("merge of COW%d: %w", m.merged, err)
		}
		if err := a.checkViews(); err != nil {
			return fmt.Errorf("after the rest of the merge: %w", err)
		}
	}
	return a.close()
}

// checkStore opens one store and attaches its snapshot when it is valid.
func (a *aftermath) checkStore(i int, p promise) error {
	st, err := store.Open(a.cows[i])
	if p.state <= creating && errors.Is(err, ondisk.ErrNoStore) {
		return nil
	}
	if err != nil {
		return err
	}
	invalid := errors.Is(st.Err(), store.ErrInvalid)
	switch {
	case p.state == absent:
		return errors.New("a store where none was made")
	case p.state == unmarked || p.state == doubtful && invalid:
		return nil
	case p.state == dead:
		if !invalid {
			return errors.New("valid, and its loss was acknowledged")
		}
		return nil
	case st.Err() != nil:
		return st.Err()
	case (p.state == creating || p.state == idle) && st.Len() > 0:
		return fmt.Errorf("%d exceptions in a store that is empty", st.Len())
	}
	if err := checkSlots(a.cows[i], st); err != nil {
		return err
	}
	if p.state != live && p.state != doubtful || i == a.merged {
		return nil
	}
	a.snaps[i], err = a.o.Attach(a.cows[i], snapshot.Options{})
	return err
}

// checkSlots wants the n-th exception in the n-th data chunk, as every store has them that is filled in
// order, and merged from its end.
func checkSlots(cow block.Device, st *store.Store) error {
	n := uint64(0)
	for e, err := range store.Scan(cow, st.Layout()) {
		if err != nil {
			return err
		}
		if e.IsEnd() {
			break
		}
		if want := st.Layout().DataChunk(n); e.New != want {
			return fmt.Errorf("exception %d is in COW chunk %d, not %d", n, e.New, want)
		}
		n++
	}
	if n != st.Len() {
		return fmt.Errorf("%d slots, %d exceptions", n, st.Len())
	}
	return nil
}

// checkViews compares what valid snapshots show.
func (a *aftermath) checkViews() error {
	for i, s := range a.snaps {
		if s == nil {
			continue
		}
		b := make([]byte, s.Size())
		if _, err := s.ReadAt(b, 0); err != nil {
			return fmt.Errorf("COW%d: read: %w", i, err)
		}
		if err := judge(a.moment.cows[i].view, b); err != nil {
			return fmt.Errorf("COW%d: %w", i, err)
		}
	}
	return nil
}

// checkMerge looks at origin plus remaining exceptions, merges them, and wants exactly that on the origin.
func (a *aftermath) checkMerge() error {
	m, err := a.o.LoadMerge(a.cows[a.merged], snapshot.Options{})
	if err != nil {
		return err
	}
	if err := m.Resume(); err != nil {
		return err
	}
	merged := make([]byte, a.o.Size())
	if _, err := a.o.ReadAt(merged, 0); err != nil {
		return err
	}
	if err := judge(a.raw, merged); err != nil {
		return fmt.Errorf("origin and remaining exceptions: %w", err)
	}
	window := uint64(a.n % 4 * 13) // 0, the kernel's run, to more than an area of the smallest chunks
	for {
		n, err := m.Step(window)
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
	}
	if !bytes.Equal(a.origin.Bytes(), merged) {
		return errors.New("the origin is not what it was to be")
	}
	if st, err := store.Open(a.cows[a.merged]); err != nil || st.Len() != 0 {
		return fmt.Errorf("the store is not empty: %v", err)
	}
	return m.Close()
}

// goOn writes to the origin and to each snapshot, closes them and loads them again: nothing that the cut
// left behind may come to life.
func (a *aftermath) goOn() error {
	before := make([][]byte, len(a.snaps))
	for i, s := range a.snaps {
		if s == nil {
			continue
		}
		before[i] = make([]byte, s.Size())
		if _, err := s.ReadAt(before[i], 0); err != nil {
			return err
		}
		// Every third sector, so that there are new chunks and old ones. A snapshot may become full.
		for at := int64(i); at < s.Size()/sector; at += 3 {
			_, err := s.WriteAt(sectorOf(stamp(1<<40+at)), at*sector)
			if err != nil && !isInvalid(err) {
				return err
			}
			copy(before[i][at*sector:], sectorOf(stamp(1<<40+at)))
		}
	}
	if _, err := a.o.WriteAt(make([]byte, a.o.Size()), 0); err != nil {
		return err
	}
	for i, s := range a.snaps {
		if s == nil {
			continue
		}
		invalid := s.Status().State == snapshot.StateInvalid
		if err := s.Close(); err != nil {
			return err
		}
		st, err := store.Open(a.cows[i])
		if err != nil {
			return err
		}
		if got := errors.Is(st.Err(), store.ErrInvalid); got != invalid {
			return fmt.Errorf("COW%d: invalid %v, on disk %v", i, invalid, got)
		}
		if a.snaps[i] = nil; invalid {
			continue
		}
		if err := checkSlots(a.cows[i], st); err != nil {
			return err
		}
		again, err := a.o.Attach(a.cows[i], snapshot.Options{})
		if err != nil {
			return err
		}
		got := make([]byte, again.Size())
		if _, err := again.ReadAt(got, 0); err != nil {
			return err
		}
		if !bytes.Equal(got, before[i]) {
			return fmt.Errorf("COW%d: sector %d differs", i, firstDifference(got, before[i])/sector)
		}
		a.snaps[i] = again
	}
	return nil
}

func (a *aftermath) close() error {
	var errs []error
	for _, s := range a.snaps {
		if s != nil {
			errs = append(errs, s.Close())
		}
	}
	return errors.Join(errs...)
}
