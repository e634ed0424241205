package blocktest_test

import (
	"bytes"
	"errors"
	"runtime"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestLogPrintsAllDevicesInOrder(t *testing.T) {
	var log blocktest.Log
	origin := log.Record("ORIGIN", block.NewMemory(1<<20))
	cow := log.Record("COW", blocktest.Plain(block.NewMemory(1<<20)))

	origin.ReadAt(make([]byte, 4096), 4096)
	p := []byte("0123456789abcdef")
	cow.WriteAt(p, 512)
	p[0] = 'x' // the log has a copy
	cow.Flush()
	block.WriteDurable(cow, make([]byte, 512), 1024)
	block.Zero(cow, 4096, 4096, block.KeepAllocated|block.OnlyFast)
	block.Zero(origin, 4096, 4096, 0)
	block.Discard(cow, 8192, 512)
	block.Extents(origin, 0, 512)
	origin.Grow(2 << 20)
	cow.Grow(2 << 20)
	origin.ReadAt(make([]byte, 1), 1<<30)

	const golden = `ORIGIN R 8+8
COW W 512+16 bytes
COW F
COW WD 2+1
COW Z 8+8 keep fast error: no fast way to write zeros
ORIGIN Z 8+8
COW D 16+1
ORIGIN G 4096
COW G 4096 error: grow from 1048576 to 2097152 bytes: the size of the device is fixed
ORIGIN R 1073741824+1 bytes error: read of 1 bytes at byte 1073741824 is outside a device of 2097152 bytes
`
	if got := log.String(); got != golden {
		t.Errorf("log:\n%s\nwant:\n%s", got, golden)
	}
	if op := log.Ops()[1]; string(op.Data) != "0123456789abcdef" || op.N != 2 || op.Device != "COW" {
		t.Errorf("%+v", op)
	}
}

func TestLogPauseAndTake(t *testing.T) {
	var log blocktest.Log
	dev := log.Record("", block.NewMemory(1<<20))
	dev.Flush()
	if got := blocktest.Lines(log.Take()); got != "F\n" {
		t.Errorf("taken: %q", got)
	}
	log.Pause()
	dev.WriteAt(make([]byte, 512), 0)
	log.Resume()
	dev.WriteAt(make([]byte, 512), 512)
	if got := log.String(); got != "W 1+1\n" {
		t.Errorf("after a pause: %q", got)
	}
	log.Clear()
	if got := log.String(); got != "" {
		t.Errorf("after clearing: %q", got)
	}
}

// The log shows whether an operation had returned when another began, which its order alone does not.
func TestBefore(t *testing.T) {
	var log blocktest.Log
	slow := blocktest.NewFaulty(block.NewMemory(4096), nil)
	a := log.Record("A", slow)
	b := log.Record("B", block.NewMemory(4096))

	hold := slow.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Flush })
	done := make(chan error)
	go func() { done <- a.Flush() }()
	<-hold.Reached()
	b.WriteAt(make([]byte, 512), 0)
	if ops := log.Ops(); len(ops) != 2 || ops[0].Ended != 0 {
		t.Errorf("a flush under way: %+v", ops)
	}
	hold.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	b.WriteAt(make([]byte, 512), 512)

	ops := log.Ops()
	if got := blocktest.Lines(ops); got != "A F\nB W 0+1\nB W 1+1\n" {
		t.Fatalf("log:\n%s", got)
	}
	for _, c := range []struct {
		i, j   int
		before bool
	}{{0, 1, false}, {0, 2, true}, {1, 2, true}, {1, 0, false}, {2, 1, false}, {2, 0, false}} {
		if got := ops[c.i].Before(ops[c.j]); got != c.before {
			t.Errorf("%v before %v: %v", ops[c.i], ops[c.j], got)
		}
	}
}

func TestFaultyFailsTheNth(t *testing.T) {
	run := func(dev block.Device) []error {
		_, w := dev.WriteAt([]byte("abc"), 0)
		_, r := dev.ReadAt(make([]byte, 3), 0)
		return []error{w, r, block.WriteDurable(dev, []byte("d"), 3), block.Zero(dev, 8, 8, 0), block.Discard(dev, 16, 8), dev.Flush(), block.Grow(dev, 8192)}
	}
	count := blocktest.NewFaulty(block.NewMemory(4096), nil)
	run(count)
	if count.Count() != 7 {
		t.Fatalf("%d operations", count.Count())
	}
	for n := 1; n <= count.Count(); n++ {
		for i, err := range run(blocktest.NewFaulty(block.NewMemory(4096), blocktest.FailNth(n, errDisk))) {
			if (i+1 == n || n == 3 && i+1 == 6) != errors.Is(err, errDisk) { // a failed durable write fails the flush
				t.Errorf("failing number %d: number %d returned %v", n, i+1, err)
			}
		}
		for i, err := range run(blocktest.NewFaulty(block.NewMemory(4096), blocktest.FailFrom(n, errDisk))) {
			if (i+1 >= n) != errors.Is(err, errDisk) {
				t.Errorf("failing from number %d: number %d returned %v", n, i+1, err)
			}
		}
	}
}

func TestFaultyLeavesTheDeviceAlone(t *testing.T) {
	m := block.MemoryFrom(bytes.Repeat([]byte("."), 4096))
	f := blocktest.NewFaulty(m, func(op blocktest.Op) error {
		if op.Kind.Changes() {
			return errDisk
		}
		return nil
	})
	for _, err := range []error{
		block.WriteDurable(f, []byte("abc"), 0), block.Zero(f, 0, 4096, 0), block.Discard(f, 0, 4096),
	} {
		if err != errDisk {
			t.Error(err)
		}
	}
	if n, err := f.WriteAt([]byte("abc"), 0); n != 0 || err != errDisk {
		t.Error(n, err)
	}
	if !bytes.Equal(m.Bytes(), bytes.Repeat([]byte("."), 4096)) {
		t.Error("a failed operation changed the device")
	}

	f = blocktest.NewFaulty(m, func(op blocktest.Op) error { return &blocktest.ShortError{Done: 2, Err: errDisk} })
	if n, err := f.WriteAt([]byte("abc"), 0); n != 2 || !errors.Is(err, errDisk) {
		t.Errorf("short write: %d, %v", n, err)
	}
	p := []byte("xyz")
	if n, err := f.ReadAt(p, 0); n != 2 || !errors.Is(err, errDisk) || string(p) != "abz" {
		t.Errorf("short read: %d, %v, %q", n, err, p)
	}
	if err := block.WriteDurable(f, []byte("defg"), 4); !errors.Is(err, errDisk) {
		t.Error(err)
	}
	if err := block.Zero(f, 10, 4, 0); !errors.Is(err, errDisk) {
		t.Error(err)
	}
	if got := string(m.Bytes()[:14]); got != "ab..de....\x00\x00.." {
		t.Errorf("after short operations: %q", got)
	}
}

func TestFaultyAfterAFailedFlush(t *testing.T) {
	blocktest.RunFailedFlush(t, func(*testing.T) (block.Device, func(blocktest.Kind, error) error) {
		f := blocktest.NewFaulty(block.NewMemory(64<<10), nil)
		return f, func(k blocktest.Kind, err error) error {
			f.Set(blocktest.FailKind(k, err))
			defer f.Set(nil)
			if k == blocktest.Flush {
				return f.Flush()
			}
			return f.WriteDurableAt(make([]byte, 512), 8192)
		}
	})
}

// A failure of the underlying device counts like one that was decided.
func TestFaultyKeepsAFailureBeneath(t *testing.T) {
	lower := blocktest.NewPageCache(block.NewMemory(64<<10), blocktest.FailNth(1, errDisk)).Open()
	f := blocktest.NewFaulty(lower, nil)
	write(t, f, 0, "lost")
	for range 3 { // the page cache reports it once
		if err := f.Flush(); !errors.Is(err, errDisk) {
			t.Errorf("flush: %v", err)
		}
	}
}

func TestFailEvery(t *testing.T) {
	f := blocktest.NewFaulty(block.NewMemory(4096), blocktest.FailEvery(2, errDisk))
	for i := 1; i < 9; i++ {
		if _, err := f.ReadAt(make([]byte, 1), 0); (i%2 == 0) != errors.Is(err, errDisk) {
			t.Errorf("read %d: %v", i, err)
		}
	}
}

func TestHang(t *testing.T) {
	f := blocktest.NewFaulty(block.NewMemory(4096), nil)
	hang := f.Hang(func(op blocktest.Op) bool { return op.Kind != blocktest.Flush })
	defer hang.Release()
	done := make(chan error, 3)
	for range 3 {
		go func() {
			_, err := f.WriteAt([]byte("x"), 0)
			done <- err
		}()
	}
	<-hang.Reached()
	for f.Count() < 3 {
		runtime.Gosched()
	}
	if err := f.Flush(); err != nil { // passes
		t.Error(err)
	}
	if len(done) > 0 {
		t.Error("a write did not hang")
	}
	hang.Release()
	for range 3 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if _, err := f.WriteAt([]byte("x"), 0); err != nil { // passes, too
		t.Error(err)
	}
}

func TestHold(t *testing.T) {
	f := blocktest.NewFaulty(block.MemoryFrom([]byte("old old old")), nil)
	hold := f.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Read && op.Overlaps(4, 3) })
	defer hold.Release()
	p, done := make([]byte, 3), make(chan error)
	go func() {
		_, err := f.ReadAt(p, 4)
		done <- err
	}()
	if op := <-hold.Reached(); op.Off != 4 || op.Len != 3 || op.N != 1 {
		t.Errorf("held: %+v", op)
	}
	// Others pass, also the next that would match: a hold stops one.
	for off := range int64(8) {
		if _, err := f.ReadAt(make([]byte, 3), off); err != nil {
			t.Error(err)
		}
	}
	f.WriteAt([]byte("new"), 4)
	select {
	case <-done:
		t.Error("the read was not held")
	default:
	}
	hold.Release()
	hold.Release()
	if err := <-done; err != nil || string(p) != "new" {
		t.Errorf("the held read saw %q, %v", p, err)
	}
}
