package snapshot_test

import (
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// What the user of a lab does: first with a snapshot, then with the origin, then with a merge. Each call
// writes down what was promised and is held against the rules (fault_call_test.go).

// attach makes or loads the store and activates a snapshot. What its origin holds has been flushed.
func (c *labCOW) attach() {
	if c.snap != nil || c.mixture() || c.state == unmarked {
		return
	}
	if c.state <= creating || c.state == idle {
		for i, s := range c.raw {
			if len(*s) != 1 && c.inject != nil {
				return // a flush failed
			}
			if len(*s) != 1 {
				c.t.Fatalf("origin sector %d is not flushed", i)
			}
		}
		if c.state == absent {
			c.set(creating)
		}
		c.mu.Lock()
		c.view = c.raw.clone()
		c.mu.Unlock()
	}
	c.call(call{kind: callAttach, on: c}, func() error {
		s, err := c.origin.Attach(c.faulty, c.opts)
		if err != nil {
			return err
		}
		if c.snap = s; c.sick[c] {
			c.unacknowledge(c.view) // an error reported that something is lost
		}
		switch {
		case c.forgets && c.sick[c] && c.state == creating: // its header is in the cache, and no flush succeeds
		case c.state != dead:
			c.set(live)
		default:
			if st := s.Status().State; st != snapshot.StateInvalid {
				c.t.Errorf("%s was invalid and is %s", c.name, st)
			}
		}
		return nil
	})
	if c.snap == nil && c.state > creating && c.state != idle {
		c.set(unmarked) // nothing is preserved for it any more
	}
}

// write writes n sectors to the snapshot.
func (c *labCOW) write(at, n int64) { c.writeAs(at, n, cached) }

func (c *labCOW) writeAs(at, n int64, as how) {
	if c.snap == nil {
		return
	}
	c.call(call{kind: callWrite, on: c}, func() error {
		return c.put(c.snap, c.view, at, n, as, c.opts.Sync == snapshot.SyncAlways)
	})
}

// overflow writes where there is no space left.
func (c *labCOW) overflow(at, n int64) {
	if c.snap == nil {
		return
	}
	want := store.ErrInvalid
	if c.opts.Store == snapshot.PersistentOverflow {
		want = snapshot.ErrOverflow
	} else if c.inject == nil {
		c.set(doubtful)
	}
	c.call(call{kind: callWrite, on: c, full: []*labCOW{c}, want: want}, func() error {
		return c.put(c.snap, c.view, at, n, cached, false)
	})
}

// discard discards whole chunks and parts of chunks, of which those with an exception change.
func (c *labCOW) discard(at, n int64) {
	if c.snap == nil {
		return
	}
	c.call(call{kind: callDiscard, on: c}, func() error {
		k := int64(c.snap.Status().ChunkSectors)
		changed := c.changed()
		var touched cells
		var whole []bool
		for i := at; i < at+n; i++ {
			if changed != nil && changed[i] {
				touched = append(touched, c.view[i])
				whole = append(whole, i-i%k >= at && i-i%k+k <= at+n)
			}
		}
		op := c.begin(touched, func(i int) []stamp {
			if whole[i] {
				return []stamp{0}
			}
			return append(touched[i].may(), 0)
		})
		err := block.Discard(c.snap, at*sector, n*sector)
		if err == nil {
			c.end(op)
		}
		return err
	})
}

// changed returns for each sector whether it has an exception; nil when the snapshot is invalid.
func (c *labCOW) changed() []bool {
	var all []bool
	for off := int64(0); off < c.snap.Size(); {
		es, err := c.snap.Changed(off, c.snap.Size()-off)
		if isInvalid(err) {
			return nil
		}
		if err != nil {
			c.t.Fatal(err)
		}
		for _, e := range es {
			for range e.Length / sector {
				all = append(all, e.Flags == snapshot.InCOW)
			}
			off += e.Length
		}
	}
	return all
}

// flush flushes the snapshot.
func (c *labCOW) flush() {
	if c.snap == nil {
		return
	}
	c.call(call{kind: callFlush, on: c}, func() error {
		began := c.now()
		err := c.snap.Flush()
		if err == nil {
			c.settle(c.view, began)
		}
		return err
	})
}

// read reads all of the snapshot.
func (c *labCOW) read() {
	if c.snap == nil {
		return
	}
	c.call(call{kind: callRead, on: c}, func() error { return c.readAll(c.name, c.snap, c.view) })
}

// close closes the snapshot, which makes its writes durable. It can be attached again.
func (c *labCOW) close() {
	if c.snap == nil {
		return
	}
	s := c.snap
	c.call(call{kind: callClose, on: c}, func() error {
		began := c.now()
		err := s.Close()
		if err == nil && c.state == live {
			c.settle(c.view, began)
		}
		c.snap = nil
		return err
	})
}

// grow makes the COW device longer.
func (c *labCOW) grow(sectors int64) {
	if err := c.disk.Grow(sectors * sector); err != nil {
		c.t.Fatal(err)
	}
}

// write writes n sectors to the origin.
func (l *lab) write(at, n int64) { l.writeAs(at, n, cached) }

func (l *lab) writeAs(at, n int64, as how) {
	if l.mixture() {
		return
	}
	l.call(call{kind: callOriginWrite, fua: as == durable}, func() error { return l.put(l.origin, l.raw, at, n, as, false) })
}

// overflows writes to the origin what these snapshots have no space for.
func (l *lab) overflows(at, n int64, full ...*labCOW) {
	if l.mixture() {
		return
	}
	for _, c := range full {
		if c.state == live && c.inject == nil {
			c.set(doubtful)
		}
	}
	l.call(call{kind: callOriginWrite, full: full}, func() error { return l.put(l.origin, l.raw, at, n, cached, false) })
}

// flush flushes the origin.
func (l *lab) flush() {
	if l.mixture() {
		return
	}
	l.call(call{kind: callOriginFlush}, func() error {
		began := l.now()
		err := l.origin.Flush()
		if err == nil {
			l.settle(l.raw, began)
		}
		return err
	})
}

// read reads all of the origin.
func (l *lab) read() {
	if l.mixture() {
		return
	}
	l.call(call{kind: callOriginRead}, func() error { return l.readAll("ORIGIN", l.origin, l.raw) })
}

// beginMerge hands the snapshot's store to a merge: from then on the origin shows what the snapshot
// showed of the chunks with exceptions.
func (c *labCOW) beginMerge() {
	if c.snap == nil || c.state != live {
		return
	}
	changed := c.changed()
	c.call(call{kind: callBeginMerge, on: c}, func() error {
		began := c.now()
		m, err := c.snap.BeginMerge()
		if err != nil {
			return err
		}
		c.settle(c.view, began)
		c.mu.Lock()
		c.epoch++
		for i := range c.raw {
			if changed[i] {
				c.raw[i] = c.view[i]
			}
		}
		c.lab.merge, c.merged = m, c
		c.mu.Unlock()
		return c.drop()
	})
}

// drop closes the snapshot that gave its store away.
func (c *labCOW) drop() error {
	s := c.snap
	c.snap = nil
	return s.Close()
}

// resumeMerge loads the merge again.
func (l *lab) resumeMerge() {
	if l.merge != nil || l.merged == nil {
		return
	}
	l.call(call{kind: callLoadMerge, on: l.merged}, func() error {
		m, err := l.origin.LoadMerge(l.merged.faulty, snapshot.Options{})
		if err != nil {
			return err
		}
		l.merge = m
		return m.Resume()
	})
}

// step merges at most max exceptions, and reports how many.
func (l *lab) step(max uint64) (merged uint64) {
	if l.merge == nil {
		return 0
	}
	l.call(call{kind: callStep, on: l.merged}, func() (err error) {
		merged, err = l.merge.Step(max)
		return err
	})
	return merged
}

// finish merges what is left in windows of max. A step that fails ends it.
func (l *lab) finish(max uint64) {
	for l.step(max) > 0 {
	}
}

// closeMerge ends the merge's part. When all was merged the origin is on its own again, else the merge
// can be loaded again.
func (l *lab) closeMerge() {
	if l.merge == nil {
		return
	}
	l.call(call{kind: callCloseMerge, on: l.merged}, func() error {
		began := l.now()
		complete := l.merge.Status().Finished()
		err := l.merge.Close()
		l.merge = nil
		if err != nil {
			return err
		}
		l.settle(l.raw, began)
		if complete {
			l.merged.set(idle)
			l.mu.Lock()
			l.merged = nil
			l.epoch++
			l.mu.Unlock()
		}
		return nil
	})
}
