package nbd_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
)

// A redialed is a Redialer whose connections a test can cut, and whose server it can replace or take away.
type redialed struct {
	*nbd.Redialer
	end   func() // of the first server
	mu    sync.Mutex
	uri   string // "": nobody answers
	nc    net.Conn
	dials int
}

func redial(t *testing.T, dev block.Device, bound time.Duration) *redialed {
	t.Helper()
	_, uri, end := serveUntil(t, nbd.Options{}, nbd.Export{Name: "x", Device: dev, CanTrim: true})
	d := &redialed{uri: uri("x"), end: end}
	var err error
	d.Redialer, err = nbd.NewRedialer(t.Context(), bound, d.dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func (d *redialed) dial(ctx context.Context) (*nbd.Client, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dials++
	if d.uri == "" {
		return nil, syscall.ECONNREFUSED
	}
	u, err := nbd.ParseURI(d.uri)
	if err != nil {
		return nil, err
	}
	if d.nc, err = net.Dial(u.Network, u.Address); err != nil {
		return nil, err
	}
	return nbd.NewClient(ctx, d.nc, u.Export)
}

// cut ends the connection, and has the next one go to another place.
func (d *redialed) cut(uri string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.uri = uri
	d.nc.Close()
}

func TestRedialerConformance(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device { return redial(t, block.NewMemory(1<<20), time.Second).Redialer })
}

func TestRedialerPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(t *testing.T, dev block.Device) block.Device {
		return redial(t, dev, time.Second).Redialer
	}, "ReadCached", "WriteLastAt", "BeginFlush", "BeginRead", "Allocate", "DropCache", "Refresh", "Grow", "CanGrow", "BlockSize", "Identity")
}

func TestRedialerReadsGoOn(t *testing.T) {
	disk := block.MemoryFrom(blocktest.Pattern(1<<20, 1))
	faulty := blocktest.NewFaulty(disk, nil)
	d := redial(t, faulty, 10*time.Second)
	for range 3 {
		d.cut(d.uri)
		if _, err := block.Extents(d, 0, 4096); err != nil {
			t.Error(err)
		}
		wantBytes(t, d, 5000, blocktest.Pattern(1<<20, 1)[5000:9000])
	}
	// One that is under way, too.
	h := faulty.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Read })
	defer h.Release()
	done := make(chan error, 1)
	p := make([]byte, 1000)
	go func() {
		_, err := d.ReadAt(p, 0)
		done <- err
	}()
	<-h.Reached()
	d.cut(d.uri)
	if err := <-done; err != nil || string(p) != string(blocktest.Pattern(1<<20, 1)[:1000]) {
		t.Error(err)
	}
	if err := d.Flush(); err != nil { // nothing was written
		t.Error(err)
	}
}

func wantBytes(t *testing.T, dev block.Device, off int64, want []byte) {
	t.Helper()
	p := make([]byte, len(want))
	if _, err := dev.ReadAt(p, off); err != nil || string(p) != string(want) {
		t.Errorf("read at %d: %v, as wanted: %v", off, err, string(p) == string(want))
	}
}

// What was acknowledged and not flushed may be lost with a connection: so every later Flush fails.
func TestRedialerAfterUnflushedChanges(t *testing.T) {
	for name, c := range map[string]struct {
		change func(d *redialed) error
		fails  bool
	}{
		"nothing":          {func(d *redialed) error { return nil }, false},
		"write":            {func(d *redialed) error { _, err := d.WriteAt([]byte("x"), 0); return err }, true},
		"zero":             {func(d *redialed) error { return block.Zero(d, 0, 4096, 0) }, true},
		"discard":          {func(d *redialed) error { return block.Discard(d, 0, 4096) }, true},
		"flushed write":    {func(d *redialed) error { _, err := d.WriteAt([]byte("x"), 0); return errors.Join(err, d.Flush()) }, false},
		"write after that": {func(d *redialed) error { d.Flush(); _, err := d.WriteAt([]byte("x"), 0); return err }, true},
	} {
		t.Run(name, func(t *testing.T) {
			d := redial(t, block.NewMemory(1<<20), 10*time.Second)
			if err := c.change(d); err != nil {
				t.Fatal(err)
			}
			d.cut(d.uri)
			wantBytes(t, d, 8192, make([]byte, 512)) // connects again
			for range 2 {
				if err := d.Flush(); (err != nil) != c.fails {
					t.Errorf("flush: %v", err)
				}
				if err := block.WriteDurable(d, []byte("y"), 4096); (err != nil) != c.fails {
					t.Errorf("durable write: %v", err)
				}
			}
			if _, err := d.WriteAt([]byte("z"), 0); err != nil {
				t.Errorf("write: %v", err)
			}
		})
	}
}

// A change that was under way fails, whatever became of it, and is not sent again.
func TestRedialerChangeUnderWay(t *testing.T) {
	faulty := blocktest.NewFaulty(block.NewMemory(1<<20), nil)
	d := redial(t, faulty, 10*time.Second)
	h := faulty.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Write })
	defer h.Release()
	done := make(chan error, 1)
	go func() {
		_, err := d.WriteAt([]byte("x"), 0)
		done <- err
	}()
	<-h.Reached()
	before := faulty.Count()
	d.cut(d.uri)
	if err := <-done; err == nil {
		t.Error("the write succeeded")
	}
	h.Release()
	wantBytes(t, d, 4096, make([]byte, 512))
	if n := faulty.Count(); n != before+1 {
		t.Errorf("%d requests after the cut", n-before)
	}
	if err := d.Flush(); err != nil { // the error was reported
		t.Error(err)
	}
}

func TestRedialerGivesUp(t *testing.T) {
	d := redial(t, block.NewMemory(1<<20), 300*time.Millisecond)
	d.cut("")
	start := time.Now()
	_, err := d.ReadAt(make([]byte, 1), 0)
	if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > 5*time.Second || d.dials < 3 {
		t.Errorf("%v after %v, %d dials", err, time.Since(start), d.dials)
	}
	dials := d.dials
	if _, again := d.WriteAt([]byte("x"), 0); again == nil || d.dials != dials {
		t.Errorf("a write later: %v", again)
	}
	if err := d.Flush(); err == nil {
		t.Error("a flush later")
	}
}

// An export that came back as another one is not used.
func TestRedialerRefusesAnotherExport(t *testing.T) {
	d := redial(t, block.NewMemory(1<<20), 300*time.Millisecond)
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(2 << 20)})
	d.cut(uri("x"))
	if _, err := d.ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("a disk of another size was read")
	}
}

func TestRedialerClose(t *testing.T) {
	d := redial(t, block.NewMemory(1<<20), time.Hour)
	d.cut("")
	done := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(make([]byte, 1), 0) // waits for a server
		done <- err
	}()
	for {
		d.mu.Lock()
		n := d.dials
		d.mu.Unlock()
		if n > 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	d.Close()
	if err := <-done; !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a read that waited: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a read after close: %v", err)
	}
}
