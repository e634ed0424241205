package snapshot_test

import (
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
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

	caches  map[*blocktest.Crash]*blocktest.PageCache // over the disks; nil: there are none
	forgets bool                                      // the caches drop what they could not write

	inject *injection       // the fault tests' fault, or nil
	sick   map[*labCOW]bool // disks and stores that something failed on permanently; nil is the origin
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

// newLab makes an origin of the given number of sectors.
func newLab(t *testing.T, sectors int) *lab { return newLabWith(t, sectors, nil) }

// newCachedLab makes an origin of the given number of sectors. Its disks are behind page caches.
func newCachedLab(t *testing.T, sectors int) *lab {
	return newLabWith(t, sectors, make(map[*blocktest.Crash]*blocktest.PageCache))
}

// newForgetfulLab makes an origin of so many sectors. Its disks are behind page caches that drop at once what they could
// not write.
func newForgetfulLab(t *testing.T, sectors int) *lab {
	l := newCachedLab(t, sectors)
	l.forgets = true
	l.caches[l.disk].ForgetLost()
	return l
}

func newLabWith(t *testing.T, sectors int, caches map[*blocktest.Crash]*blocktest.PageCache) *lab {
	l := &lab{t: t, sick: make(map[*labCOW]bool), caches: caches}
	content := make([]stamp, sectors)
	var disk []byte
	for i := range content {
		l.stamps++
		content[i] = l.stamps
		disk = append(disk, sectorOf(l.stamps)...)
	}
	l.raw = newCells(content)
	l.disk = l.power.NewCrash("ORIGIN", disk)
	l.faulty = l.open(nil, l.disk)
	l.origin = snapshot.NewOrigin(l.faulty)
	l.power.Observe(l.observe)
	return l
}

// open returns a disk, the origin's or that of a COW device, as a file that fails as the test wants. Behind a page cache
// it is the writing out that fails, during a flush.
func (l *lab) open(c *labCOW, disk *blocktest.Crash) *blocktest.Faulty {
	if l.caches == nil {
		return blocktest.NewFaulty(disk, func(op blocktest.Op) error { return l.decide(c, op) })
	}
	l.caches[disk] = blocktest.NewPageCache(disk, func(op blocktest.Op) error {
		op.Kind = blocktest.Flush
		return l.decide(c, op)
	})
	if l.forgets {
		l.caches[disk].ForgetLost()
	}
	return blocktest.NewFaulty(l.caches[disk].Open(), nil)
}

// cow adds a COW device of the given number of sectors: noise, behind a sector of zeros.
func (l *lab) cow(sectors int, o snapshot.Options) *labCOW {
	c := &labCOW{lab: l, name: fmt.Sprintf("COW%d", len(l.cows)), opts: o}
	content := blocktest.Pattern(sectors*sector, uint64(sectors))
	clear(content[:sector])
	c.disk = l.power.NewCrash(c.name, content)
	c.faulty = l.open(c, c.disk)
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

// mixture: the origin is half of what it is to be, and nobody may use it (Merging.Close).
func (l *lab) mixture() bool { return l.merged != nil && l.merge == nil }

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
