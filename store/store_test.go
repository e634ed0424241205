package store_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

const sector = 512

var errDisk = errors.New("the disk fails")

// newStore makes a store of a chunk size on a device of the given number of sectors, whose operations are logged and
// can be failed. The test ends with a look at what is on disk.
func newStore(t *testing.T, c uint32, sectors int64) (s *store.Store, mem *block.Memory, faults *blocktest.Faulty, log *blocktest.Log) {
	t.Helper()
	mem = block.NewMemory(sectors * sector)
	faults, log = blocktest.NewFaulty(mem, nil), new(blocktest.Log)
	s, err := store.Create(log.Record("COW", faults), ondisk.Layout{ChunkSectors: c}, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reopen(t, mem) })
	log.Clear()
	return s, mem, faults, log
}

// reopen opens what is on disk: it must be a store, with as many exceptions as slots before the end.
func reopen(t *testing.T, mem *block.Memory) *store.Store {
	t.Helper()
	s, err := store.Open(mem)
	if err != nil {
		t.Fatalf("store is not sound: %v", err)
	}
	if s.Err() == nil {
		if n := len(scan(t, mem, s.Layout())); uint64(n) != s.Len() {
			t.Fatalf("%d slots, %d exceptions", n, s.Len())
		}
	}
	return s
}

// scan returns the exceptions on disk in slot order.
func scan(t *testing.T, mem *block.Memory, l ondisk.Layout) (all []ondisk.Exception) {
	t.Helper()
	for e, err := range store.Scan(mem, l) {
		if err != nil {
			t.Fatal(err)
		}
		if !e.IsEnd() {
			all = append(all, e.Exception)
		}
	}
	return all
}

// add makes an exception for n origin chunks from old on.
func add(t *testing.T, s *store.Store, old ondisk.OriginChunk, n uint64) {
	t.Helper()
	for n > 0 {
		r, err := s.Reserve(old, n)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
		old, n = old+ondisk.OriginChunk(r.Count), n-r.Count
	}
}

func mustSync(t *testing.T, s *store.Store) {
	t.Helper()
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
}

// TestKernelVectors are the specification's appendix B.1 to B.3, read off a running kernel.
func TestKernelVectors(t *testing.T) {
	s, mem, _, _ := newStore(t, 8, 1024)
	if got := hex.EncodeToString(mem.Bytes()[:16]); got != "536e4170010000000100000008000000" {
		t.Errorf("B.1: %s", got)
	}
	for _, old := range []ondisk.OriginChunk{2, 4, 0x123} {
		add(t, s, old, 1)
	}
	mustSync(t, s)
	want := "02000000000000000200000000000000" + "04000000000000000300000000000000" + "23010000000000000400000000000000" +
		strings.Repeat("00", 4096-48)
	if got := hex.EncodeToString(mem.Bytes()[4096:8192]); got != want {
		t.Errorf("B.2: %s", got[:128])
	}

	s, mem, _, _ = newStore(t, 1, 400)
	before := bytes.Clone(mem.Bytes()[100*sector : 101*sector])
	for i := range ondisk.OriginChunk(70) {
		add(t, s, 1000+2*i, 1)
	}
	mustSync(t, s)
	var b3 []string
	for i, e := range scan(t, mem, s.Layout()) {
		if i%32 == 0 || i%32 == 31 || i == 69 {
			b3 = append(b3, fmt.Sprintf("%d→%d", e.Old, e.New))
		}
	}
	if got := strings.Join(b3, " "); got != "1000→2 1062→33 1064→35 1126→66 1128→68 1138→73" {
		t.Errorf("B.3: %s", got)
	}
	if !bytes.Equal(mem.Bytes()[100*sector:101*sector], before) {
		t.Error("B.3: chunk 100 was touched")
	}
	if got := s.Usage().String(); got != "74/400 4" {
		t.Errorf("B.3: status %s", got)
	}
}

func TestReserveStopsAtAreasAndAtTheEnd(t *testing.T) {
	s, mem, _, _ := newStore(t, 1, 40)
	var got []string
	for old := ondisk.OriginChunk(0); ; {
		r, err := s.Reserve(old, 20)
		if err != nil {
			if !errors.Is(err, store.ErrFull) {
				t.Fatal(err)
			}
			break
		}
		got = append(got, fmt.Sprintf("%d+%d→%d", r.Old, r.Count, r.New))
		old += ondisk.OriginChunk(r.Count)
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := strings.Join(got, " "), "0+20→2 20+12→22 32+5→35"; got != want {
		t.Errorf("reserved %s, want %s", got, want)
	}
	mustSync(t, s)
	// A longer device is noticed, and nothing was lost meanwhile.
	if err := mem.Grow(42 * sector); err != nil {
		t.Fatal(err)
	}
	add(t, s, 100, 2)
	mustSync(t, s)
	if n := reopen(t, mem).Len(); n != 39 {
		t.Errorf("%d exceptions", n)
	}
}

func TestSlotsFollowReservationsWhateverTheOrderOfCommits(t *testing.T) {
	s, mem, _, _ := newStore(t, 8, 1024)
	var rs []store.Reservation
	for i := range ondisk.OriginChunk(5) {
		r, err := s.Reserve(10*i, 1)
		if err != nil {
			t.Fatal(err)
		}
		rs = append(rs, r)
	}
	for _, i := range []int{3, 1} {
		if err := rs[i].Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := s.Lookup(30); !ok {
		t.Error("a committed exception is not found")
	}
	if _, ok := s.Lookup(0); ok {
		t.Error("an exception that was not committed is found")
	}
	synced := make(chan error)
	go func() { synced <- s.Sync() }() // waits for 0 and 2, not for 4
	for _, i := range []int{2, 0} {
		select {
		case <-synced:
			t.Error("Sync did not wait for an older reservation")
		default:
		}
		if err := rs[i].Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-synced; err != nil {
		t.Fatal(err)
	}
	for i, e := range scan(t, mem, s.Layout()) {
		if want := (ondisk.Exception{Old: ondisk.OriginChunk(10 * i), New: ondisk.COWChunk(2 + i)}); e != want {
			t.Errorf("slot %d is %v, want %v", i, e, want)
		}
	}
	if n := len(scan(t, mem, s.Layout())); n != 4 {
		t.Errorf("%d slots, want 4", n)
	}
	if !s.Durable(5) || s.Durable(6) || !s.Dirty() {
		t.Errorf("durable %v, %v; dirty %v", s.Durable(5), s.Durable(6), s.Dirty())
	}
	if err := rs[4].Commit(); err != nil {
		t.Fatal(err)
	}
}

func TestSyncsThatMeetShareARound(t *testing.T) {
	s, _, faults, log := newStore(t, 8, 4096)
	hold := faults.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Flush })
	add(t, s, 0, 1)
	var all sync.WaitGroup
	all.Go(func() { mustSync(t, s) })
	<-hold.Reached() // its round is under way and does not cover what comes now
	log.Clear()
	before := s.Counters().Syncs
	for i := range ondisk.OriginChunk(100) {
		all.Go(func() {
			add(t, s, 10+2*i, 1)
			mustSync(t, s)
		})
	}
	for s.Counters().Syncs < before+100 { // all of them wait for the round, but one that was interrupted just now
		time.Sleep(time.Millisecond)
	}
	hold.Release()
	all.Wait()
	flushes := strings.Count(log.String(), "COW F")
	// The rest of the first round has one. Those who waited share one round of two, or two rounds when
	// some came late.
	if flushes > 20 {
		t.Errorf("%d flushes for 100 exceptions", flushes)
	}
	if s.Dirty() {
		t.Error("something is not durable")
	}
}

func TestAFailedSyncIsFinal(t *testing.T) {
	for name, fail := range map[string]blocktest.Decide{
		"zero": blocktest.FailKind(blocktest.Zero, errDisk), "flush": blocktest.FailKind(blocktest.Flush, errDisk),
		"slots": blocktest.FailKind(blocktest.Write, errDisk), "second flush": nil,
	} {
		t.Run(name, func(t *testing.T) {
			s, mem, faults, log := newStore(t, 1, 400)
			add(t, s, 1, 30)
			mustSync(t, s)
			add(t, s, 100, 30) // over an area's edge
			if fail == nil {
				// Zero, flush, slots of two areas, flush: the last one.
				n := faults.Count() + 5
				fail = blocktest.FailNth(n, errDisk)
			}
			faults.Set(fail)
			if err := s.Sync(); !errors.Is(err, store.ErrFailed) || !errors.Is(err, errDisk) {
				t.Fatalf("sync: %v", err)
			}
			faults.Set(nil)
			log.Clear()
			if err := s.Sync(); !errors.Is(err, store.ErrFailed) {
				t.Errorf("second sync: %v", err)
			}
			if _, err := s.Reserve(1000, 1); !errors.Is(err, store.ErrFailed) {
				t.Errorf("reserve: %v", err)
			}
			if _, err := s.LastRun(); !errors.Is(err, store.ErrFailed) {
				t.Errorf("last run: %v", err)
			}
			if _, ok := s.Lookup(100); !ok || s.Len() != 60 {
				t.Error("lookups must go on")
			}
			if s.Durable(36) {
				t.Error("what failed counts as durable")
			}
			if ops := log.String(); ops != "" {
				t.Errorf("a failed store went on:\n%s", ops)
			}
			if n := reopen(t, mem).Len(); n < 30 {
				t.Errorf("%d exceptions on disk", n)
			}
		})
	}
}

// TestDataOfAFailedStore: after a failure, what can be read is what was flushed once; see CheckData. Half of the
// area's exceptions are durable, and the Sync of the other half fails.
func TestDataOfAFailedStore(t *testing.T) {
	const before, n = 16, 16
	at := func(k blocktest.Kind, nth int) blocktest.Decide { // the nth operation of a kind from now on
		return func(op blocktest.Op) error {
			if op.Kind != k {
				return nil
			}
			if nth--; nth == 0 {
				return errDisk
			}
			return nil
		}
	}
	both := func(a, b blocktest.Decide) blocktest.Decide {
		return func(op blocktest.Op) error { return errors.Join(a(op), b(op)) }
	}
	cases := []struct {
		name      string
		fail      blocktest.Decide
		transient bool
		kept      uint64 // of the exceptions
	}{
		{"zeros of the next area", at(blocktest.Zero, 1), false, before + n},
		{"and the flush after it", both(at(blocktest.Zero, 1), at(blocktest.Flush, 1)), false, before},
		{"flush of the data", at(blocktest.Flush, 1), false, before},
		{"slots", at(blocktest.Write, 1), false, before + n},
		{"slots and the flush after it", both(at(blocktest.Write, 1), at(blocktest.Flush, 2)), false, before + n},
		{"flush of the slots", at(blocktest.Flush, 2), false, before + n},
		{"transient", at(blocktest.Flush, 1), true, before},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l := ondisk.Layout{ChunkSectors: 1}
			mem := block.NewMemory(1024 * sector)
			faults := blocktest.NewFaulty(mem, nil)
			s := store.NewTransient(faults, l)
			if !c.transient {
				var err error
				if s, err = store.Create(faults, l, false); err != nil {
					t.Fatal(err)
				}
				defer reopen(t, mem)
			}
			add(t, s, 0, before)
			mustSync(t, s)
			add(t, s, before, n)
			if err := check(s, before+n-1); err != nil {
				t.Errorf("before anything failed: %v", err)
			}
			late, err := s.Reserve(100, 1) // not written when the Sync begins
			if err != nil {
				t.Fatal(err)
			}
			faults.Set(c.fail)
			if err := s.Sync(); !errors.Is(err, store.ErrFailed) {
				t.Fatalf("sync: %v", err)
			}
			if err := late.Commit(); !errors.Is(err, store.ErrFailed) {
				t.Errorf("a commit to a failed store: %v", err)
			}
			for old := range uint64(before + n) {
				err := check(s, old)
				if lost := old >= c.kept; errors.Is(err, store.ErrDataLost) != lost || errors.Is(err, errDisk) {
					t.Errorf("exception %d: %v, want it lost: %v", old, err, lost)
				}
			}
		})
	}
}

// check is CheckData of an origin chunk that has an exception.
func check(s *store.Store, old uint64) error {
	new, ok := s.Lookup(ondisk.OriginChunk(old))
	if !ok {
		return errDisk
	}
	return s.CheckData(s.Layout().COWOffset(new), s.Layout().ChunkBytes())
}

// An areaLog notes what is done to areas of one sector.
type areaLog struct {
	block.Forward
	layout         ondisk.Layout
	dropped, begun map[uint64]bool
	t              *testing.T
}

func (a *areaLog) area(off int64) uint64 {
	return uint64(off/sector-1) / (a.layout.SlotsPerArea() + 1)
}

func (a *areaLog) DropCache(off, n int64) error {
	if off > 0 {
		a.dropped[a.area(off)] = true
	}
	return nil
}

func (a *areaLog) BeginRead(off, n int64) {
	if area := a.area(off); !a.dropped[area] || n != sector {
		a.t.Errorf("area %d is begun to be read, %d bytes, dropped: %v", area, n, a.dropped[area])
	} else {
		a.begun[area] = true
	}
}

func (*areaLog) ReadCached([]block.Read) int { return 0 } // all by ReadAt

func (a *areaLog) ReadAt(p []byte, off int64) (int, error) {
	if area := a.area(off); off > 0 && (!a.dropped[area] || area > 0 && !a.begun[area]) {
		a.t.Errorf("area %d is read; dropped: %v, begun before: %v", area, a.dropped[area], a.begun[area])
	}
	return a.Forward.ReadAt(p, off)
}

// TestAreasAreReadAhead: the areas are dropped from the cache, begun to be read, and read, in this order, and not many more than
// there are.
func TestAreasAreReadAhead(t *testing.T) {
	for _, areas := range []uint64{1, 2, 3, 10, 200} {
		l := ondisk.Layout{ChunkSectors: 1}
		n := areas*l.SlotsPerArea() - 1
		mem := block.NewMemory(int64(n+2*areas+2) * sector)
		s, err := store.Create(mem, l, false)
		if err != nil {
			t.Fatal(err)
		}
		for old := uint64(0); old < n; {
			r, err := s.Reserve(ondisk.OriginChunk(old), n-old)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Commit(); err != nil {
				t.Fatal(err)
			}
			old += r.Count
		}
		mustSync(t, s)
		log := &areaLog{block.NewForward(mem), l, map[uint64]bool{}, map[uint64]bool{}, t}
		if s, err = store.Open(log); err != nil || s.Len() != n {
			t.Fatalf("%d areas: %d exceptions, %v", areas, s.Len(), err)
		}
		if got := uint64(len(log.dropped)); got < areas || got > areas+min(areas, 64) {
			t.Errorf("of %d areas %d were prepared", areas, got)
		}
	}
}

// TestDataFlushedBesideACopy: a chunk whose copy was under way when a flush succeeded is not flushed by it.
func TestDataFlushedBesideACopy(t *testing.T) {
	s, _, faults, _ := newStore(t, 8, 1024)
	add(t, s, 0, 1)
	late, err := s.Reserve(10, 1)
	if err != nil {
		t.Fatal(err)
	}
	mustSync(t, s)
	if err := late.Commit(); err != nil {
		t.Fatal(err)
	}
	faults.Set(blocktest.FailKind(blocktest.Flush, errDisk))
	if err := s.Sync(); !errors.Is(err, store.ErrFailed) {
		t.Fatal(err)
	}
	if err := check(s, 0); err != nil {
		t.Errorf("the flushed chunk: %v", err)
	}
	if err := check(s, 10); !errors.Is(err, store.ErrDataLost) {
		t.Errorf("the chunk that was copied beside the flush: %v", err)
	}
}

func TestInvalidate(t *testing.T) {
	s, mem, _, _ := newStore(t, 8, 1024)
	add(t, s, 7, 3)
	mustSync(t, s)
	cause := errors.New("cause")
	if err := s.Invalidate(cause); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"err": s.Err(), "sync": s.Sync(), "reserve": func() error { _, err := s.Reserve(9, 1); return err }()} {
		if !errors.Is(err, store.ErrInvalid) || !errors.Is(err, cause) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got := hex.EncodeToString(mem.Bytes()[:16]); got != "536e4170000000000100000008000000" {
		t.Errorf("header %s", got)
	}
	if n := len(scan(t, mem, s.Layout())); n != 3 {
		t.Errorf("%d slots are left of 3", n)
	}
	if again := reopen(t, mem); !errors.Is(again.Err(), store.ErrInvalid) || again.Len() != 0 {
		t.Errorf("opened as %v with %d exceptions", again.Err(), again.Len())
	}

	// A store whose mark can't be written refuses all the same.
	s, _, faults, _ := newStore(t, 8, 1024)
	faults.Set(func(op blocktest.Op) error {
		if op.Kind.Changes() {
			return errDisk
		}
		return nil
	})
	if err := s.Invalidate(cause); !errors.Is(err, errDisk) {
		t.Errorf("invalidate: %v", err)
	}
	if !errors.Is(s.Err(), store.ErrInvalid) {
		t.Errorf("err %v", s.Err())
	}
	// It can be tried again, and needs no more once it is made.
	faults.Set(nil)
	if err := s.Invalidate(cause); err != nil {
		t.Errorf("the mark, tried again: %v", err)
	}
	if h, err := store.ReadHeader(mem); err != nil || h.Valid != 0 {
		t.Errorf("header %+v, %v", h, err)
	}
	faults.Set(blocktest.FailKind(blocktest.WriteDurable, errDisk))
	if err := s.Invalidate(cause); err != nil {
		t.Errorf("the mark, made before: %v", err)
	}
}

// TestTheMarkPassesAFailedFlush: a failed flush of the COW device does not keep the mark from being made, also
// where the device fails everything durable from then on.
func TestTheMarkPassesAFailedFlush(t *testing.T) {
	s, mem, faults, _ := newStore(t, 8, 1024)
	add(t, s, 7, 3)
	var failed bool
	faults.Set(func(op blocktest.Op) error {
		if op.Kind == blocktest.Flush && !failed || op.Kind == blocktest.WriteDurable {
			failed = true
			return errDisk
		}
		return nil
	})
	cause := s.Sync()
	if !errors.Is(cause, errDisk) {
		t.Fatalf("sync: %v", cause)
	}
	if err := s.Invalidate(cause); err != nil {
		t.Errorf("the mark: %v", err)
	}
	if again := reopen(t, mem); !errors.Is(again.Err(), store.ErrInvalid) {
		t.Errorf("opened as %v", again.Err())
	}
}

// TestAMergeTrustsMemory: what a device says of the slots once, and wrongly, neither merges nor drops.
func TestAMergeTrustsMemory(t *testing.T) {
	mem := block.NewMemory(1024 * sector)
	lying := &liar{Forward: block.NewForward(mem)}
	s, err := store.Create(lying, ondisk.Layout{ChunkSectors: 8}, false)
	if err != nil {
		t.Fatal(err)
	}
	add(t, s, 10, 5)
	mustSync(t, s)
	last := func(n uint64) []ondisk.Exception {
		t.Helper()
		lying.lie = nil
		es, err := s.Last(n)
		if err != nil {
			t.Fatal(err)
		}
		return es
	}
	for name, lie := range map[string]func([]byte){
		"another origin chunk": func(b []byte) { b[len(b)-16]++ },
		"another COW chunk":    func(b []byte) { b[len(b)-8]++ },
		"zeros":                func(b []byte) { clear(b) },
	} {
		two := last(2)
		lying.lie = lie
		var corrupt *ondisk.CorruptError
		if r, err := s.LastRun(); !errors.As(err, &corrupt) || !strings.HasPrefix(corrupt.Place, "area 0 slot ") {
			t.Errorf("%s: last run %v, %v", name, r, err)
		}
		if es, err := s.Last(3); !errors.As(err, &corrupt) {
			t.Errorf("%s: last %v, %v", name, es, err)
		}
		if err := s.DropLast(two); !errors.As(err, &corrupt) {
			t.Errorf("%s: drop %v", name, err)
		}
		if s.Err() != nil || s.Len() != 5 {
			t.Errorf("%s: %v, %d exceptions", name, s.Err(), s.Len())
		}
		lying.lie = nil
		if n := reopen(t, mem).Len(); n != 5 {
			t.Errorf("%s: %d exceptions on disk", name, n)
		}
	}
	if err := s.DropLast(last(5)); err != nil {
		t.Fatal(err)
	}
	if n := reopen(t, mem).Len(); n != 0 {
		t.Errorf("%d exceptions on disk", n)
	}
}

// liar changes what is read.
type liar struct {
	block.Forward
	lie func([]byte)
}

func (*liar) ReadCached([]block.Read) int { return 0 } // all by ReadAt

func (l *liar) ReadAt(p []byte, off int64) (int, error) {
	n, err := l.Forward.ReadAt(p, off)
	if l.lie != nil {
		l.lie(p)
	}
	return n, err
}

// TestDropLastInWindows drops any number over area edges, reopening after each.
func TestDropLastInWindows(t *testing.T) {
	for _, window := range []uint64{1, 7, 31, 32, 33, 64, 100} {
		s, mem, _, _ := newStore(t, 1, 400)
		for i := range ondisk.OriginChunk(100) {
			add(t, s, 1000-3*i, 1)
		}
		mustSync(t, s)
		for left := uint64(100); left > 0; {
			n := min(window, left)
			es, err := s.Last(n)
			if err != nil || uint64(len(es)) != n {
				t.Fatalf("last %d: %d, %v", n, len(es), err)
			}
			for i, e := range es {
				if want := ondisk.OriginChunk(1000 - 3*(left-n+uint64(i))); e.Old != want {
					t.Fatalf("exception %d of the last %d is %v, want origin chunk %d", i, n, e, want)
				}
			}
			if err := s.DropLast(es); err != nil {
				t.Fatal(err)
			}
			left -= n
			again := reopen(t, mem)
			if s.Len() != left || again.Len() != left {
				t.Fatalf("%d left in memory, %d on disk, want %d", s.Len(), again.Len(), left)
			}
			for _, e := range es {
				if _, ok := s.Lookup(e.Old); ok {
					t.Fatalf("origin chunk %d is still there", e.Old)
				}
			}
		}
		if len(bytes.Trim(mem.Bytes()[sector:2*sector], "\x00")) > 0 {
			t.Error("area 0 is not zero")
		}
	}
}

func TestManyExceptionsOverManyRounds(t *testing.T) {
	// More than wait for a Sync at once, in a store of several areas.
	const n = 264000
	s, mem, _, _ := newStore(t, 1, n+n/32+4)
	for i := range ondisk.OriginChunk(n) {
		add(t, s, 5*i, 1)
	}
	if !s.Durable(1000) {
		t.Error("262,144 exceptions wait for a Sync that nobody may make")
	}
	mustSync(t, s)
	again := reopen(t, mem)
	if again.Len() != n || again.Usage() != s.Usage() {
		t.Errorf("%d exceptions, %v; want %v", again.Len(), again.Usage(), s.Usage())
	}
	for _, i := range []ondisk.OriginChunk{0, 1, 255, 256, n - 1} {
		a, _ := s.Lookup(5 * i)
		if b, ok := again.Lookup(5 * i); !ok || a != b {
			t.Errorf("origin chunk %d: %d, was %d", 5*i, b, a)
		}
	}
}

// A transient store has no areas: its device may end where the first one would be.
func TestTransientOfOneChunk(t *testing.T) {
	s := store.NewTransient(block.NewMemory(9*512), ondisk.Layout{ChunkSectors: 8})
	r, err := s.Reserve(3, 2)
	if err != nil || r.New != 0 || r.Count != 1 {
		t.Fatalf("reserved %+v, %v", r, err)
	}
	if err := r.Commit(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reserve(4, 1); !errors.Is(err, store.ErrFull) {
		t.Errorf("a second one: %v", err)
	}
}

func TestTransient(t *testing.T) {
	mem := block.NewMemory(42 * sector)
	s := store.NewTransient(mem, ondisk.Layout{ChunkSectors: 8})
	add(t, s, 100, 2)
	add(t, s, 7, 3)
	if got := s.Usage().String(); got != "40/42 0" {
		t.Errorf("status %s", got)
	}
	if new, n, ok := s.LookupRun(100, 9); new != 0 || n != 2 || !ok {
		t.Errorf("run %d+%d %v", new, n, ok)
	}
	if _, err := s.Reserve(1, 1); !errors.Is(err, store.ErrFull) {
		t.Errorf("reserve: %v", err)
	}
	mustSync(t, s)
	if _, err := s.LastRun(); !errors.Is(err, store.ErrNoMerge) {
		t.Errorf("last run: %v", err)
	}
	if err := s.Invalidate(errDisk); err != nil {
		t.Error(err)
	}
	if len(bytes.Trim(mem.Bytes(), "\x00")) > 0 {
		t.Error("a transient store wrote metadata")
	}
}

// FuzzOpen: whatever stands on a device, Open says what it is or names the place, and what it opens is
// within the device.
func FuzzOpen(f *testing.F) {
	mem := block.NewMemory(64 * sector)
	s, err := store.Create(mem, ondisk.Layout{ChunkSectors: 1}, false)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(mem.Bytes()[:16]), uint16(64))
	for i := range ondisk.OriginChunk(40) {
		r, err := s.Reserve(3*i, 1)
		if err != nil {
			f.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			f.Fatal(err)
		}
	}
	if err := s.Sync(); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.TrimRight(mem.Bytes(), "\x00"), uint16(64))
	f.Add(bytes.TrimRight(mem.Bytes(), "\x00"), uint16(20))
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, content []byte, sectors uint16) {
		image := make([]byte, int(sectors%512)*sector)
		copy(image, content)
		mem := block.MemoryFrom(bytes.Clone(image))
		s, err := store.Open(mem)
		if !bytes.Equal(mem.Bytes(), image) {
			t.Fatal("Open wrote")
		}
		var corrupt *ondisk.CorruptError
		if err != nil {
			if !errors.Is(err, ondisk.ErrNoStore) && (!errors.As(err, &corrupt) || corrupt.Place == "") {
				t.Fatalf("error without a place: %v", err)
			}
			return
		}
		if s.Err() != nil {
			return
		}
		taken := make(map[ondisk.COWChunk]bool)
		for r := range s.Exceptions() {
			for i := range r.Count {
				new := r.New + ondisk.COWChunk(i)
				if taken[new] || !s.Layout().IsData(new) || s.Layout().COWOffset(new+1) > mem.Size() {
					t.Fatalf("origin chunk %d in COW chunk %d", r.Old, new)
				}
				taken[new] = true
			}
		}
		// It takes another exception, or is full, and opens again with it.
		n := s.Len()
		free := ondisk.OriginChunk(0)
		for {
			if _, ok := s.Lookup(free); !ok {
				break
			}
			free++
		}
		r, err := s.Reserve(free, 1)
		if err != nil {
			if !errors.Is(err, store.ErrFull) {
				t.Fatal(err)
			}
			return
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
		if again := reopen(t, mem); again.Len() != n+1 {
			t.Fatalf("%d exceptions after adding one to %d", again.Len(), n)
		}
	})
}

// TestFullFileSystem: when there is no space, Reserve says so before anything is at stake, and goes on
// when there is space again.
func TestFullFileSystem(t *testing.T) {
	mem := block.NewMemory(4096 * sector)
	quota := blocktest.NewQuota(mem, 256<<10, true)
	s, err := store.Create(quota, ondisk.Layout{ChunkSectors: 1}, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reopen(t, mem) })
	fill := func(from ondisk.OriginChunk) (n uint64) {
		for {
			r, err := s.Reserve(from+ondisk.OriginChunk(n), 1)
			if errors.Is(err, store.ErrFull) && block.IsNoSpace(err) {
				return n
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := quota.WriteAt(make([]byte, sector), s.Layout().COWOffset(r.New)); err != nil {
				t.Fatalf("no space for what was reserved: %v", err)
			}
			if err := r.Commit(); err != nil {
				t.Fatal(err)
			}
			n++
		}
	}
	first := fill(0)
	if first < 400 || first > 512 {
		t.Errorf("%d chunks of 512 bytes in 256 KiB", first)
	}
	mustSync(t, s)
	if n := reopen(t, mem).Len(); n != first {
		t.Errorf("%d exceptions on disk of %d", n, first)
	}
	quota.SetLimit(320 << 10)
	second := fill(10000)
	if second < 100 {
		t.Errorf("%d more chunks in 64 KiB", second)
	}
	mustSync(t, s)
	// A store that is opened knows nothing of the space beneath, and asks.
	if s, err = store.Open(quota); err != nil {
		t.Fatal(err)
	}
	if n := fill(20000); n != 0 {
		t.Errorf("%d chunks more", n)
	}
}

// TestCancel: a reservation given back leaves no trace when it is the newest, and an unused chunk else.
func TestCancel(t *testing.T) {
	s, mem, _, _ := newStore(t, 1, 400)
	add(t, s, 0, 31)
	var rs []store.Reservation
	for i := range ondisk.OriginChunk(4) {
		r, err := s.Reserve(100+i, 1) // over the area's edge
		if err != nil {
			t.Fatal(err)
		}
		rs = append(rs, r)
	}
	usage := s.Usage()
	rs[3].Cancel()
	if got := s.Usage(); got.Allocated != usage.Allocated-1 {
		t.Errorf("usage %v after %v", got, usage)
	}
	rs[0].Cancel()
	if err := rs[2].Commit(); err != nil {
		t.Fatal(err)
	}
	if err := rs[1].Commit(); err != nil {
		t.Fatal(err)
	}
	add(t, s, 200, 30)
	mustSync(t, s)
	again := reopen(t, mem)
	if again.Len() != 63 || s.Len() != 63 {
		t.Errorf("%d exceptions, %d on disk", s.Len(), again.Len())
	}
	for old, want := range map[ondisk.OriginChunk]ondisk.COWChunk{101: 35, 102: 36, 200: 37} {
		if new, ok := again.Lookup(old); !ok || new != want {
			t.Errorf("origin chunk %d in COW chunk %d, want %d", old, new, want)
		}
	}
	if _, ok := again.Lookup(100); ok {
		t.Error("a reservation that was given back is there")
	}
	// All that is left of the device can be used, and not a chunk more than its slots.
	var n int
	for r, err := s.Reserve(1000, 1); ; r, err = s.Reserve(1000+ondisk.OriginChunk(n), 1) {
		if errors.Is(err, store.ErrFull) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
		n++
	}
	mustSync(t, s)
	if got := reopen(t, mem).Len(); got != 63+uint64(n) {
		t.Errorf("%d exceptions on disk, want %d", got, 63+n)
	}
}
