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

// Two deaths in a row: the process is killed, which loses nothing that was written, flushed or not; another
// one takes over, and reads what the disks have in their caches; then the power is cut.

// afterKill has a new process take over at a moment, write to all of the origin, and lose its power. What a
// valid snapshot showed is still to be shown, whatever of both runs reached the disks.
func (m *moment) afterKill(choices blocktest.Choices) error {
	var none, all *blocktest.Image
	for img := range m.cut.Images(blocktest.Choices{All: 1, Limit: 1}) { // nothing survived, everything did, …
		if none == nil {
			none = img
		} else if all = img; true {
			break
		}
	}
	if all == nil {
		return nil // nothing is pending: the power cut shows as much
	}
	var power blocktest.Power
	next := *m
	next.disk = revive(&power, m.disk, none, all)
	next.cows = nil
	o := snapshot.NewOrigin(next.disk)
	for i, p := range m.cows {
		p.disk = revive(&power, p.disk, none, all)
		_, err := store.Open(p.disk)
		if i != m.merged && p.state != absent && p.state != idle && !errors.Is(err, ondisk.ErrNoStore) {
			if p.state == live || p.state == creating {
				p.state = doubtful // it may be full by now
			}
			if _, err := o.Attach(p.disk, snapshot.Options{}); err != nil {
				return fmt.Errorf("COW%d: %w", i, err)
			}
		}
		next.cows = append(next.cows, p)
	}
	if m.merged >= 0 {
		return next.mergeAfterKill(&power, o, choices)
	}
	if _, err := o.WriteAt(make([]byte, o.Size()), 0); err != nil {
		return err
	}
	next.raw = make([][]stamp, len(m.raw)) // other moments have m's too
	for i, may := range m.raw {
		next.raw[i] = append([]stamp{0}, may...)
	}
	return next.cutAgain(&power, choices)
}

// mergeAfterKill goes on with a merge that was killed: the origin is written to and flushed.
func (m *moment) mergeAfterKill(power *blocktest.Power, o *snapshot.Origin, choices blocktest.Choices) error {
	merge, err := o.LoadMerge(m.cows[m.merged].disk, snapshot.Options{})
	if err != nil {
		return err
	}
	if err := merge.Resume(); err != nil {
		return err
	}
	if _, err := merge.Step(3); err != nil {
		return err
	}
	if _, err := o.WriteAt(make([]byte, o.Size()), 0); err != nil {
		return err
	}
	if err := o.Flush(); err != nil {
		return err
	}
	m.raw = make([][]stamp, len(m.raw))
	for i := range m.raw {
		m.raw[i] = []stamp{0}
	}
	return m.cutAgain(power, choices)
}

// cutAgain checks images of the second power cut.
func (m *moment) cutAgain(power *blocktest.Power, choices blocktest.Choices) error {
	m.cut = power.Cut()
	for img := range m.cut.Images(choices) {
		if err := m.check(img, false); err != nil {
			return fmt.Errorf("%v: %w", img, err)
		}
	}
	return nil
}

// revive makes a disk that is as another one was at a cut, with the same sectors not flushed.
func revive(power *blocktest.Power, c *blocktest.Crash, none, all *blocktest.Image) *blocktest.Crash {
	before, now := none.Disk(c), all.Disk(c)
	again := power.NewCrash("", before)
	for off := 0; off < len(now); off += block.SectorSize {
		if b := now[off : off+block.SectorSize]; !bytes.Equal(b, before[off:off+block.SectorSize]) {
			if _, err := again.WriteAt(b, int64(off)); err != nil {
				panic(err) // the range is the disk's own
			}
		}
	}
	return again
}
