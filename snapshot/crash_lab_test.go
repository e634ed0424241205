package snapshot_test

import (
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A lab is an origin with COW devices on disks that lose what was not flushed, and a ledger of what its
// user was promised. Its methods are the user's: they do something, and write down what holds from when
// on. The crash tests look at every moment of it; the fault tests fail one operation of it at a time.
type lab struct {
	t *testing.T
	ledger
	power  blocktest.Power
	disk   *blocktest.Crash
	faulty *blocktest.Faulty
	origin *snapshot.Origin
	raw    cells // what the origin shows
	cows   []*labCOW
	merge  *snapshot.Merging
	merged *labCOW // whose store the merge has, also while no merge is loaded
	stamps stamp

	watch  func(*moment) // nil: nobody looks
	frozen *moment       // of the ledger's epoch

	inject *injection       // the fault tests' fault, or nil
	sick   map[*labCOW]bool // disks and stores that something failed on for good; nil is the origin
}

// state is what may be found on a COW device.
type state uint8

const (
	absent   state = iota // no store
	creating              // no store, or an empty one
	live                  // a valid store that shows the view
	doubtful              // that, or an invalid one
	dead                  // an invalid store
	unmarked              // a store that could not be marked invalid: it loads, whatever it shows
	idle                  // a valid, empty store
)

// A labCOW is a COW device of a lab, and its snapshot.
type labCOW struct {
	*lab
	name   string
	disk   *blocktest.Crash
	faulty *blocktest.Faulty
	opts   snapshot.Options
	snap   *snapshot.Snapshot // nil while none is attached
	state  state
	view   cells
	marked error // why it could not be marked invalid
	used   use   // when the call under way began
}

// newLab makes an origin of so many sectors.
func newLab(t *testing.T, sectors int) *lab {
	l := &lab{t: t, sick: make(map[*labCOW]bool)}
	content := make([]stamp, sectors)
	var disk []byte
	for i := range content {
		l.stamps++
		content[i] = l.stamps
		disk = append(disk, sectorOf(l.stamps)...)
	}
	l.raw = newCells(content)
	l.disk = l.power.NewCrash("ORIGIN", disk)
	l.faulty = blocktest.NewFaulty(l.disk, func(op blocktest.Op) error { return l.decide(nil, op) })
	l.origin = snapshot.NewOrigin(l.faulty)
	l.power.Observe(l.observe)
	return l
}

// cow adds a COW device of so many sectors: noise, behind a sector of zeros.
func (l *lab) cow(sectors int, o snapshot.Options) *labCOW {
	c := &labCOW{lab: l, name: fmt.Sprintf("COW%d", len(l.cows)), opts: o}
	content := blocktest.Pattern(sectors*sector, uint64(sectors))
	clear(content[:sector])
	c.disk = l.power.NewCrash(c.name, content)
	c.faulty = blocktest.NewFaulty(c.disk, func(op blocktest.Op) error { return l.decide(c, op) })
	c.opts.Notify = func(e snapshot.Event) {
		if e.Kind == snapshot.EventInvalid && e.Err != nil {
			c.marked = unmarkedBy(e.Err)
		}
	}
	if l.inject != nil && l.inject.keep {
		c.opts.OnFull = snapshot.FullFail
	}
	l.cows = append(l.cows, c)
	return c
}

// set changes the state of a COW device.
func (c *labCOW) set(s state) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != s {
		c.epoch++
		c.state = s
	}
}

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
			c.unacknowledge(c.view) // its owner was told that something is lost
		}
		if c.state != dead {
			c.set(live)
		} else if st := s.Status().State; st != snapshot.StateInvalid {
			c.t.Errorf("%s was invalid and is %s", c.name, st)
		}
		return nil
	})
	if c.snap == nil && c.state > creating && c.state != idle {
		c.set(unmarked) // nobody keeps anything for it any more
	}
}

// sectors returns n sectors of a device from at on.
func (cs cells) sectors(at, n int64) cells { return cs[at : at+n] }

// stampsFor takes n new stamps and returns them as content too.
func (l *lab) stampsFor(n int64) (first stamp, content []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first = l.stamps + 1
	for range n {
		l.stamps++
		content = append(content, sectorOf(l.stamps)...)
	}
	return first, content
}

// how a lab writes.
type how uint8

const (
	cached  how = iota // durable after a flush
	durable            // with FUA
	zeroed             // as zeros
)

// put writes to a device whose sectors are cs, and reports it to the ledger.
func (l *lab) put(dev block.Device, cs cells, at, n int64, as how, sync bool) error {
	first, content := l.stampsFor(n)
	if as == zeroed {
		content = nil
	}
	touched := cs.sectors(at, n)
	op := l.begin(touched, func(i int) []stamp {
		if as == zeroed {
			return []stamp{0}
		}
		return []stamp{first + stamp(i)}
	})
	var err error
	switch as {
	case zeroed:
		err = block.Zero(dev, at*sector, n*sector, 0)
	case durable:
		err = block.WriteDurable(dev, content, at*sector)
	default:
		_, err = dev.WriteAt(content, at*sector)
	}
	if err == nil {
		l.end(op)
		if sync || as == durable {
			l.settle(touched, l.now())
		}
	}
	return err
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

// overflow writes where there is no room left.
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

// changed tells of each sector whether it has an exception; nil when the snapshot is invalid.
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
				all = append(all, e.Flags == snapshot.Lives)
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

// readAll compares a device with what was acknowledged.
func (l *lab) readAll(name string, dev block.Device, want cells) error {
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		return err
	}
	may := make([][]stamp, len(want))
	for i, c := range want {
		may[i] = c.newest().may()
	}
	if err := judge(may, b); err != nil {
		l.t.Errorf("%s reads wrong: %v", name, err)
	}
	return nil
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

// mixture: the origin is half of what it is to be, and nobody may use it (Merging.Close).
func (l *lab) mixture() bool { return l.merged != nil && l.merge == nil }

// write writes n sectors to the origin.
func (l *lab) write(at, n int64) { l.writeAs(at, n, cached) }

func (l *lab) writeAs(at, n int64, as how) {
	if l.mixture() {
		return
	}
	l.call(call{kind: callOriginWrite, fua: as == durable}, func() error { return l.put(l.origin, l.raw, at, n, as, false) })
}

// overflows writes to the origin what these snapshots have no room for.
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

// unmarkedBy returns the part of an event's error that says that the mark could not be written.
func unmarkedBy(err error) error {
	if j, ok := err.(interface{ Unwrap() []error }); ok && len(j.Unwrap()) == 2 {
		return j.Unwrap()[1] // its cause, and what became of the mark
	}
	return nil
}

// A moment is a power cut, and what may be found after it.
type moment struct {
	after  string
	n      int // counts the moments of a lab
	epoch  int
	cut    *blocktest.Cut
	disk   *blocktest.Crash
	raw    [][]stamp
	merged int // of promises, or -1
	cows   []promise
}

// A promise is what may be found on one COW device.
type promise struct {
	disk  *blocktest.Crash
	state state
	view  [][]stamp
}

// observe is called after each operation on a disk, and by look.
func (l *lab) observe(op blocktest.Op) {
	if l.watch == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.freeze()
	m.after, m.cut = op.String(), l.power.Cut()
	l.watch(m)
}

// look is called after each call, when what it promised holds.
func (l *lab) look(after string) {
	if l.watch == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.freeze()
	m.after, m.cut = after, l.power.Cut()
	l.watch(m)
}

// freeze writes down what may be found now. mu is held.
func (l *lab) freeze() *moment {
	old := l.frozen
	if old == nil || old.epoch != l.epoch {
		m := &moment{epoch: l.epoch, disk: l.disk, raw: l.raw.freeze(), merged: -1}
		for i, c := range l.cows {
			p := promise{disk: c.disk, state: c.state}
			if c.view != nil {
				p.view = c.view.freeze()
			}
			if c == l.merged {
				m.merged = i
			}
			m.cows = append(m.cows, p)
		}
		if old != nil {
			m.n = old.n
		}
		old = m
	}
	old.n++
	l.frozen = old
	m := *old
	return &m
}
