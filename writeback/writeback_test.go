package writeback_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/writeback"
)

const sector = block.SectorSize

func fill(sectors int64, x byte) []byte { return bytes.Repeat([]byte{x}, int(sectors*sector)) }

// A bench is a write-back device over one that can be made to fail, and records.
type bench struct {
	t        *testing.T
	memory   *block.Memory
	faults   *blocktest.Faulty
	log      blocktest.Log
	dev      *writeback.Device
	barriers int
	notified []error
	barred   error // what the barrier fails with
}

func newBench(t *testing.T, o writeback.Options) *bench {
	b := &bench{t: t, memory: block.MemoryFrom(blocktest.Pattern(1<<20, 1))}
	b.faults = blocktest.NewFaulty(b.memory, nil)
	o.Barrier = func() error {
		b.barriers++
		return b.barred
	}
	o.Notify = func(err error) { b.notified = append(b.notified, err) }
	b.dev = writeback.New(b.log.Record("", b.faults), o)
	return b
}

// put makes n sectors of x dirty.
func (b *bench) put(at, n int64, x byte) {
	b.t.Helper()
	if err := b.dev.WriteBack(fill(n, x), at*sector); err != nil {
		b.t.Fatal(err)
	}
}

// wantOps compares what was done below, and forgets it.
func (b *bench) wantOps(want string) {
	b.t.Helper()
	got := ""
	for _, op := range b.log.Take() {
		if got != "" {
			got += "; "
		}
		got += op.String()
	}
	if got != want {
		b.t.Errorf("operations\n got %s\nwant %s", got, want)
	}
}

func (b *bench) wantRead(at int64, want []byte) {
	b.t.Helper()
	got := make([]byte, len(want))
	if _, err := b.dev.ReadAt(got, at*sector); err != nil || !bytes.Equal(got, want) {
		b.t.Errorf("read at sector %d: %v, first byte %d, want %d", at, err, got[0], want[0])
	}
}

func (b *bench) flush() {
	b.t.Helper()
	if err := b.dev.Flush(); err != nil {
		b.t.Fatal(err)
	}
}

// A through is a write-back device whose plain writes stay in memory where they may.
type through struct{ *writeback.Device }

func (d through) WriteAt(p []byte, off int64) (int, error) {
	if !d.CanWriteBack(off, int64(len(p))) {
		return d.Device.WriteAt(p, off)
	}
	if err := d.WriteBack(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// TestDevice: it is a block device, whether writes stay in memory or not.
func TestDevice(t *testing.T) {
	for _, o := range []writeback.Options{{}, {Limit: 1 << 20, Delay: time.Hour}, {Limit: 8 << 10, Delay: time.Millisecond}} {
		t.Run(fmt.Sprint(o.Limit), func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				dev := writeback.New(block.NewMemory(300<<10), o)
				if o.Limit == 0 {
					return dev
				}
				return through{dev}
			})
		})
	}
}

// TestPassesOn: what it does not change it passes on.
func TestPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device {
		return writeback.New(dev, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
	}, "WriteLastAt")
}

// TestBarrierThenWrites: dirty bytes go to the device after the barrier, in the order of their offsets, neighbours
// together, and are read before that.
func TestBarrierThenWrites(t *testing.T) {
	b := newBench(t, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
	b.put(24, 8, 3)
	b.put(8, 4, 1)
	b.put(12, 12, 2)
	b.put(100, 1, 4)
	b.wantOps("")
	if b.barriers != 0 || b.dev.Status().Dirty != 4*4096 {
		t.Errorf("%d barriers, status %+v", b.barriers, b.dev.Status())
	}
	b.wantRead(8, slices.Concat(fill(4, 1), fill(12, 2), fill(8, 3)))
	b.log.Clear()
	b.flush()
	b.wantOps("W 8+24; W 100+1; F")
	if b.barriers != 1 || b.dev.Status() != (writeback.Status{}) {
		t.Errorf("%d barriers, status %+v", b.barriers, b.dev.Status())
	}
	b.flush()
	b.wantOps("F")
	if b.barriers != 1 {
		t.Error("a barrier for nothing")
	}
}

// TestOthersComeAfter: a change by another method that overlaps dirty bytes comes after them, and one that does not
// leaves them where they are.
func TestOthersComeAfter(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(dev block.Device, off int64) error
		want string
	}{
		{"write", func(dev block.Device, off int64) error { _, err := dev.WriteAt(fill(1, 9), off); return err }, "W 81+1"},
		{"FUA", func(dev block.Device, off int64) error { return block.WriteDurable(dev, fill(1, 9), off) }, "WD 81+1"},
		{"zero", func(dev block.Device, off int64) error { return block.Zero(dev, off, sector, 0) }, "Z 81+1"},
		{"discard", func(dev block.Device, off int64) error { return block.Discard(dev, off, sector) }, "D 81+1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
			b.put(80, 4, 1)
			if err := c.do(b.dev, 500*sector); err != nil {
				t.Fatal(err)
			}
			b.log.Clear()
			if err := c.do(b.dev, 81*sector); err != nil {
				t.Fatal(err)
			}
			b.wantOps("W 80+4; " + c.want)
			b.barred = syscall.ENOSPC
			b.put(80, 4, 2)
			if err := c.do(b.dev, 81*sector); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("with a barrier that fails: %v", err)
			}
			if b.log.Clear(); b.memory.Bytes()[80*sector] != 1 {
				t.Error("it went past the barrier")
			}
		})
	}
}

// TestExtentsOfDirtyBytes: what is in memory only is data, and asking writes nothing.
func TestExtentsOfDirtyBytes(t *testing.T) {
	b := newBench(t, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
	if err := b.dev.ZeroAt(0, 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	b.put(80, 1, 1)
	b.put(88, 8, 1)
	b.log.Clear()
	var got []block.Extent
	for off := int64(0); off < 1<<20; {
		es, err := b.dev.Extents(off, 1<<20-off)
		if err != nil || len(es) == 0 {
			t.Fatal(es, err)
		}
		for _, e := range es {
			off += e.Length
		}
		got = append(got, es...)
	}
	hole := block.Hole | block.ReadsZero
	want := []block.Extent{{Length: 80 * sector, Flags: hole}, {Length: 16 * sector}, {Length: 1<<20 - 96*sector, Flags: hole}}
	if !slices.Equal(got, want) {
		t.Errorf("extents %v, want %v", got, want)
	}
	b.wantOps("")
}

// TestBadBlocksCostNoOthers: a block that can't be written stays dirty and is read; its neighbours are written. Flush
// fails until it is written, and nothing more is taken.
func TestBadBlocksCostNoOthers(t *testing.T) {
	for _, cause := range []error{syscall.EIO, syscall.ENOSPC} {
		b := newBench(t, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
		b.put(80, 24, 1)
		b.put(200, 8, 2)
		b.faults.Set(func(op blocktest.Op) error {
			if op.Kind == blocktest.Write && op.Overlaps(88*sector, sector) {
				return cause
			}
			return nil
		})
		for range 2 {
			if err := b.dev.Flush(); !errors.Is(err, cause) || !errors.As(err, new(*writeback.WriteError)) {
				t.Fatalf("flush: %v", err)
			}
		}
		if st := b.dev.Status(); st.Dirty != 4096 || !errors.Is(st.Failing, cause) || st.Failed != nil {
			t.Errorf("status %+v", st)
		}
		b.wantRead(80, fill(24, 1))
		if m := b.memory.Bytes(); !bytes.Equal(m[80*sector:88*sector], fill(8, 1)) || !bytes.Equal(m[96*sector:104*sector], fill(8, 1)) ||
			!bytes.Equal(m[200*sector:208*sector], fill(8, 2)) {
			t.Error("blocks beside the bad one were not written")
		}
		if err := b.dev.WriteBack(fill(8, 3), 0); !errors.Is(err, cause) {
			t.Errorf("more was taken: %v", err)
		}
		b.faults.Set(nil)
		b.put(300, 8, 4)
		b.flush()
		if len(b.notified) != 2 || !errors.Is(b.notified[0], cause) || b.notified[1] != nil {
			t.Errorf("notified %v", b.notified)
		}
		if !bytes.Equal(b.memory.Bytes()[80*sector:104*sector], fill(24, 1)) || b.dev.Status() != (writeback.Status{}) {
			t.Errorf("status %+v", b.dev.Status())
		}
	}
}

// TestRetriedByItself: what could not be written is tried again without being asked for.
func TestRetriedByItself(t *testing.T) {
	b := newBench(t, writeback.Options{Limit: 1 << 20, Delay: time.Millisecond})
	b.faults.Set(blocktest.FailKind(blocktest.Write, syscall.ENOSPC))
	b.put(80, 8, 1)
	waitFor(t, func() bool { return b.dev.Status().Failing != nil })
	b.faults.Set(nil)
	waitFor(t, func() bool { return b.dev.Status() == writeback.Status{} })
	if !bytes.Equal(b.memory.Bytes()[80*sector:88*sector], fill(8, 1)) {
		t.Error("not written")
	}
}

func waitFor(t *testing.T, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			t.Fatal("it never came to that")
		}
	}
}

// TestWrittenInTime: after the delay, and at half the limit.
func TestWrittenInTime(t *testing.T) {
	for _, o := range []writeback.Options{{Limit: 1 << 20, Delay: time.Millisecond}, {Limit: 64 << 10, Delay: time.Hour}} {
		b := newBench(t, o)
		b.put(0, 64, 7)
		waitFor(t, func() bool { return b.dev.Status().Dirty == 0 })
		if !bytes.Equal(b.memory.Bytes()[:64*sector], fill(64, 7)) {
			t.Error("not written")
		}
	}
}

// TestAFailedFlushIsPermanent, also where the underlying device forgets it.
func TestAFailedFlushIsPermanent(t *testing.T) {
	forgetful := &forgetful{Forward: block.NewForward(block.NewMemory(1 << 20)), fail: true}
	dev := writeback.New(forgetful, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
	for range 2 {
		if err := dev.Flush(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("flush: %v", err)
		}
		forgetful.fail = false
	}
	if st := dev.Status(); !errors.Is(st.Failed, syscall.EIO) {
		t.Errorf("status %+v", st)
	}
}

type forgetful struct {
	block.Forward
	fail bool
}

func (f *forgetful) Flush() error {
	if f.fail {
		return syscall.EIO
	}
	return f.Forward.Flush()
}

// TestCloseNamesWhatIsLost: at the end each block is tried, and those that can't be written are named, with neighbours
// as one range. Flush fails from then on.
func TestFinishNamesWhatIsLost(t *testing.T) {
	b := newBench(t, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
	b.put(0, 1600, 1)
	b.put(1700, 2, 2)
	b.faults.Set(func(op blocktest.Op) error { // more bad blocks than an ordinary attempt takes
		if op.Kind == blocktest.Write && (op.Overlaps(0, 800*sector) || op.Overlaps(1701*sector, sector)) {
			return syscall.EIO
		}
		return nil
	})
	err := b.dev.Finish()
	var lost *writeback.LostError
	if !errors.As(err, &lost) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("finish: %v", err)
	}
	if want := []block.Range{{Off: 0, Length: 800 * sector}, {Off: 1700 * sector, Length: 2 * sector}}; !slices.Equal(lost.Ranges, want) {
		t.Errorf("lost %v, want %v", lost.Ranges, want)
	}
	if !bytes.Equal(b.memory.Bytes()[800*sector:1600*sector], fill(800, 1)) {
		t.Error("what could be written was not")
	}
	b.faults.Set(nil)
	if err := b.dev.Flush(); !errors.As(err, &lost) {
		t.Errorf("flush after it: %v", err)
	}
	b = newBench(t, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
	b.put(0, 8, 1)
	if err := b.dev.Finish(); err != nil || b.memory.Bytes()[0] != 1 {
		t.Errorf("finish: %v", err)
	}
}

// TestReserveReportsAFullDisk without changing it.
func TestReserveReportsAFullDisk(t *testing.T) {
	quota := blocktest.NewQuota(block.NewMemory(1<<20), 16<<10, true)
	dev := writeback.New(quota, writeback.Options{Limit: 1 << 20, Delay: time.Hour})
	if err := dev.WriteBack(fill(8, 1), 80*sector); err != nil {
		t.Fatal(err)
	}
	if err := dev.Reserve(); err != nil {
		t.Errorf("with space: %v", err)
	}
	if err := dev.WriteBack(fill(64, 1), 160*sector); err != nil {
		t.Fatal(err)
	}
	if err := dev.Reserve(); !block.IsNoSpace(err) {
		t.Errorf("without: %v", err)
	}
}

// TestLockIsHeldByTimerAndFlush, and by nobody else.
func TestLockIsHeldByTimerAndFlush(t *testing.T) {
	var mu sync.RWMutex
	held := func() bool { // by a reader or a writer
		if mu.TryLock() {
			mu.Unlock()
			return false
		}
		return true
	}
	var bad, rounds int
	dev := writeback.New(block.NewMemory(1<<20), writeback.Options{Limit: 1 << 20, Delay: time.Millisecond, Lock: mu.RLocker(),
		Barrier: func() error {
			rounds++
			if !held() {
				bad++
			}
			return nil
		}})
	put := func() {
		mu.RLock()
		defer mu.RUnlock()
		if err := dev.WriteBack(fill(8, 1), 0); err != nil {
			t.Error(err)
		}
	}
	put()
	waitFor(t, func() bool { return dev.Status().Dirty == 0 })
	put()
	if err := dev.Flush(); err != nil {
		t.Error(err)
	}
	if bad > 0 || rounds < 2 {
		t.Errorf("%d of %d barriers ran without the lock", bad, rounds)
	}
}

// TestAgainstAModel: random writes, reads, flushes and faults by several users, each with a part of the disk of its own.
func TestAgainstAModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	memory := block.NewMemory(1 << 20)
	var faults sync.Map // whether writes fail
	faulty := blocktest.NewFaulty(memory, func(op blocktest.Op) error {
		if _, on := faults.Load(op.Off / (256 << 10)); on && op.Kind == blocktest.Write {
			return syscall.ENOSPC
		}
		return nil
	})
	dev := writeback.New(faulty, writeback.Options{Limit: 64 << 10, Delay: time.Millisecond})
	var all sync.WaitGroup
	for user := range int64(4) {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(user)))
			base, size := user*256<<10, int64(256<<10)
			model := make([]byte, size)
			for range 400 {
				n := (1 + rnd.Int64N(20)) * sector
				off := rnd.Int64N((size-n)/sector) * sector
				p := bytes.Repeat([]byte{byte(rnd.Uint32())}, int(n))
				var err error
				switch rnd.IntN(8) {
				case 0:
					_, err = dev.WriteAt(p, base+off)
				case 1:
					clear(p)
					err = block.Zero(dev, base+off, n, 0)
				case 2:
					err = dev.Flush()
					p = nil
				case 3:
					if rnd.IntN(2) == 0 {
						faults.Store(user, true)
					} else {
						faults.Delete(user)
					}
					p = nil
				default:
					err = dev.WriteBack(p, base+off)
				}
				if err != nil && !errors.Is(err, syscall.ENOSPC) {
					t.Error(err)
					return
				}
				if err == nil && p != nil {
					copy(model[off:], p)
				}
				got := make([]byte, size)
				if _, err := dev.ReadAt(got, base); err != nil {
					t.Error(err)
					return
				}
				// A plain write that failed may have changed a part: only what was acknowledged is compared.
				if err == nil && !bytes.Equal(got, model) {
					t.Errorf("seed %d, user %d: reads differ from what was acknowledged", seed, user)
					return
				}
				copy(model, got)
			}
			faults.Delete(user)
		})
	}
	all.Wait()
	want := make([]byte, 1<<20)
	dev.ReadAt(want, 0)
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(memory.Bytes(), want) {
		t.Error("the device differs from what was read")
	}
}
