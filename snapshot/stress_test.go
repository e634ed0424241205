package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/model"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
)

// The tests of this file are for the race detector, and for what only shows when many do things at once.
//
// Each worker writes to sectors of its own, while neighbours share chunks. So requests commute: the model goes
// through what each did, one worker after the other, and must arrive at the same contents, exceptions and
// numbers. Only the order of the exceptions is left to chance.

// A crowd is a world whose operations come at once.
type crowd struct {
	*world
	t        *testing.T
	rnd      *rand.Rand
	discards bool // whether a chunk has an exception is up to one worker alone
}

func newCrowd(t *testing.T, seed uint64, sectors int64) *crowd {
	before := blocktest.Pattern(int(sectors*sector), seed)
	c := &crowd{t: t, rnd: rand.New(rand.NewPCG(seed, 9)), world: &world{disk: block.MemoryFrom(before), model: model.New(before), seen: make(map[string]int)}}
	var opts []snapshot.OriginOption
	if c.writesBack = seed%2 == 1; c.writesBack {
		opts = append(opts, snapshot.WriteBack(32<<10, time.Millisecond))
	}
	c.origin = snapshot.NewOrigin(c.disk, opts...)
	return c
}

// add attaches a snapshot.
func (c *crowd) add(o snapshot.Options, cowSectors int64) *pairOf {
	c.t.Helper()
	c.must(c.attach(scriptOp{opts: o, cow: cowSectors}))
	p := c.pairs[len(c.pairs)-1]
	p.unordered = true
	return p
}

func (c *crowd) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// A worker makes requests to sectors of its own of several devices.
type worker struct {
	c       *crowd
	rnd     *rand.Rand
	targets []*pairOf // nil: the origin
	own     []int64   // where its granules begin
	granule int64     // sectors
	shows   map[*pairOf][]byte
	log     []func() model.Result // what the model has to do
}

// workers returns n workers who share out the sectors of these devices, granule by granule.
func (c *crowd) workers(n int, granule int64, targets ...*pairOf) (ws []*worker) {
	for i := range n {
		w := &worker{c: c, rnd: rand.New(rand.NewPCG(c.rnd.Uint64(), 0)), targets: targets, granule: granule, shows: make(map[*pairOf][]byte)}
		for at := granule * int64(i); at < c.disk.Size()/sector; at += granule * int64(n) {
			w.own = append(w.own, at)
		}
		if len(w.own) == 0 {
			break
		}
		for _, p := range targets {
			if p == nil {
				w.shows[p] = c.model.Read(0, c.disk.Size()/sector)
			} else {
				w.shows[p], _ = p.model.Read(0, p.model.Size)
			}
		}
		ws = append(ws, w)
	}
	return ws
}

// request makes one request, and remembers it.
func (w *worker) request() error {
	p := w.targets[w.rnd.IntN(len(w.targets))]
	shows := w.shows[p]
	first := w.own[w.rnd.IntN(len(w.own))]
	end := min(first+w.granule, int64(len(shows))/sector)
	at := first + w.rnd.Int64N(end-first)
	n := 1 + w.rnd.Int64N(end-at)
	var dev block.Device = w.c.origin
	change := func(data []byte) model.Result { return w.c.model.Write(at, data) }
	if p != nil {
		dev = p.dev
		change = func(data []byte) model.Result { return p.model.Write(at, data) }
	}
	how := "write"
	switch w.rnd.IntN(9) {
	case 0:
		return dev.Flush()
	case 1, 2:
		b := make([]byte, n*sector)
		if _, err := dev.ReadAt(b, at*sector); err != nil {
			return err
		}
		if want := shows[at*sector : (at+n)*sector]; !bytes.Equal(b, want) {
			return fmt.Errorf("what it wrote differs in sector %d", at+int64(firstDifference(b, want)/sector))
		}
		return nil
	case 3:
		how = "zero"
	case 4:
		how = "fua"
	case 5:
		if p != nil && w.c.discards {
			w.log = append(w.log, func() model.Result { return p.model.Discard(first, end-first) })
			if err := p.dev.Discard(first*sector, (end-first)*sector); err != nil {
				return err
			}
			_, err := dev.ReadAt(shows[first*sector:end*sector], first*sector)
			return err
		}
	}
	data, err := put(dev, how, at, n, byte(w.rnd.Int()))
	copy(shows[at*sector:], data)
	w.log = append(w.log, func() model.Result { return change(data) })
	return err
}

// work has all workers make n requests each, at once, with others who end when they are asked to.
func (c *crowd) work(n int, ws []*worker, others ...func(ended <-chan struct{}) error) {
	c.t.Helper()
	var working, attending sync.WaitGroup
	ended := make(chan struct{})
	for i, w := range ws {
		working.Go(func() {
			for range n {
				if err := w.request(); err != nil {
					c.t.Errorf("worker %d: %v", i, err)
					return
				}
			}
		})
	}
	for _, other := range others {
		attending.Go(func() {
			if err := other(ended); err != nil {
				c.t.Error(err)
			}
		})
	}
	working.Wait()
	close(ended)
	attending.Wait()
	for i, w := range ws {
		for _, do := range w.log {
			if r := do(); r != model.OK {
				c.t.Fatalf("worker %d: the model says %v", i, r)
			}
		}
	}
}

// compare wants everything as in the model.
func (c *crowd) compare(when string) {
	c.t.Helper()
	if err := c.compareStatus(); err != nil {
		c.t.Errorf("%s: %v", when, err)
	}
	if err := c.compareAll(); err != nil {
		c.t.Errorf("%s: %v", when, err)
	}
}

// looking looks at everything all the time.
func (c *crowd) looking(ended <-chan struct{}) error {
	for !closed(ended) {
		if _, err := c.origin.Extents(0, c.origin.Size()); err != nil {
			return err
		}
		for _, p := range c.pairs {
			p.dev.Status()
			if _, err := p.dev.Changed(0, p.dev.Size()); p.dev.Status().Text() != "Invalid" && err != nil {
				return err
			}
		}
	}
	return nil
}

// pausing suspends a snapshot again and again.
func pausing(p *pairOf) func(<-chan struct{}) error {
	return func(ended <-chan struct{}) error {
		for !closed(ended) {
			if err := p.dev.Suspend(); err != nil {
				return err
			}
			if err := p.dev.Resume(); err != nil {
				return err
			}
		}
		return nil
	}
}

// coming attaches snapshots and detaches them, in turn handed over. Each shows one moment as long as it is attached.
func (c *crowd) coming(ended <-chan struct{}) error {
	for i := 0; i < 3 || !closed(ended); i++ {
		memory := block.NewMemory(8192 * sector)
		o := snapshot.Options{ChunkSectors: 1 << (i % 6), Store: snapshot.StoreType(i % 3)}
		s, err := c.origin.Attach(memory, o)
		if c.merging != nil && errors.Is(err, snapshot.ErrAlreadyMerging) {
			runtime.Gosched()
			continue
		} else if err != nil {
			return err
		}
		shown, again := make([]byte, s.Size()), make([]byte, s.Size())
		if _, err := s.ReadAt(shown, 0); err != nil {
			return err
		}
		if i%2 == 0 {
			next, err := c.origin.Load(memory, o)
			if err != nil {
				return err
			}
			if err := s.Suspend(); err != nil {
				return err
			}
			if err := next.Resume(); err != nil {
				return err
			}
			if err := s.Close(); err != nil {
				return err
			}
			s = next
		}
		if _, err := s.ReadAt(again, 0); err != nil {
			return err
		}
		if !bytes.Equal(again, shown) {
			return fmt.Errorf("snapshot that came and went: sector %d changed", firstDifference(again, shown)/sector)
		}
		if err := s.Close(); err != nil {
			return err
		}
		if o.Store != snapshot.Transient {
			checkStore(c.t, memory)
		}
	}
	return nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// driving merges to the end, pausing again and again.
func driving(m *snapshot.Merging, window int64) func(<-chan struct{}) error {
	return func(ended <-chan struct{}) error {
		d := merge.Start(m, merge.Options{Window: window})
		defer d.Stop()
		for !closed(ended) {
			d.Pause()
			d.Progress()
			d.Resume()
		}
		return d.Wait(context.Background())
	}
}

func TestStress(t *testing.T) {
	for _, seed := range seeds(t, 8) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			c := newCrowd(t, seed, 200+int64(seed*37%400))
			options := func(i int) snapshot.Options {
				return snapshot.Options{ChunkSectors: 1 << c.rnd.IntN(6), Sync: snapshot.SyncMode(i % 2), Features: snapshot.Features{DiscardZeroesCOW: true}}
			}
			main := c.add(options(0), 4096)
			other := options(1)
			other.Store = snapshot.PersistentOverflow
			other.Grow.Step = 16 * sector
			growing := c.add(other, 2*int64(other.ChunkSectors))
			other = options(2)
			other.Store = snapshot.Transient
			transient := c.add(other, 4096)
			granule := []int64{1, 3, 32, 100}[seed%4]

			// Each device has workers of its own, so that one sector changes in all of them at once.
			var ws []*worker
			for _, p := range []*pairOf{nil, main, growing, transient} {
				ws = append(ws, c.workers(2, granule, p)...)
			}
			c.work(100, ws, c.looking, pausing(main), c.coming)
			c.compare("apart")

			// Each worker has its sectors of all devices.
			small := c.add(snapshot.Options{ChunkSectors: 2}, 2*(2+20+c.rnd.Int64N(300)))
			c.discards = true
			c.work(60, c.workers(4, int64(32*(1+seed%2)), nil, main, growing, transient), c.looking, c.coming)
			c.discards = false
			c.compare("together")

			c.must(c.beginMerge(main))
			c.work(100, c.workers(4, granule, nil, growing, transient), c.looking, c.coming,
				driving(c.merging, c.rnd.Int64N(20*sector)))
			if n := c.merging.Status().Exceptions; n != 0 {
				t.Errorf("%d exceptions left of a complete merge", n)
			}
			for left := int64(1); left > 0; {
				left, _ = c.model.Step(1000)
			}
			c.must(c.endMerge())
			c.compare("merged")
			t.Logf("granule %d, chunks of %d, %d, %d; %v; the small one %s", granule, main.model.Chunk, growing.model.Chunk, transient.model.Chunk, c.seen, small.model.Status())
			for len(c.pairs) > 0 {
				c.must(c.detach(c.pairs[0]))
			}
		})
	}
}

func TestStressOneChunk(t *testing.T) {
	// Everybody in the same two chunks: gates, copies and the sync of one store.
	for _, seed := range seeds(t, 20) {
		c := newCrowd(t, seed, 16)
		p := c.add(snapshot.Options{ChunkSectors: 8, Sync: snapshot.SyncMode(seed % 2)}, 64)
		c.work(30, append(c.workers(4, 1, p), c.workers(4, 1, nil)...))
		c.compare(fmt.Sprint("seed ", seed))
		c.must(c.detach(p))
	}
}
