package load_test

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/bench/load"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/vhost"
)

// counted is a device that counts what is done to each block, and flushes.
type counted struct {
	*block.Memory // the servers here get plain reads and writes
	unit          int64
	reads         []atomic.Int32
	writes        []atomic.Int32
	flushes       atomic.Int64
}

func newCounted(size, unit int64) *counted {
	n := size / unit
	return &counted{Memory: block.NewMemory(size), unit: unit, reads: make([]atomic.Int32, n), writes: make([]atomic.Int32, n)}
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.reads[off/c.unit].Add(1)
	return c.Memory.ReadAt(p, off)
}

func (c *counted) WriteAt(p []byte, off int64) (int, error) {
	c.writes[off/c.unit].Add(1)
	return c.Memory.WriteAt(p, off)
}

func (c *counted) Flush() error {
	c.flushes.Add(1)
	return c.Memory.Flush()
}

// runners serve a device over each transport and return how a job is executed there.
var runners = map[string]func(t *testing.T, dev block.Device) func(load.Job) (load.Result, error){
	"nbd": func(t *testing.T, dev block.Device) func(load.Job) (load.Result, error) {
		socket := filepath.Join(testhost.ShortDir(t), "s")
		ln, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		s := nbd.NewServer(nbd.Options{})
		if err := s.Add(nbd.Export{Name: "a", Device: dev}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var done sync.WaitGroup
		done.Go(func() { s.Serve(ctx, ln) })
		t.Cleanup(func() { cancel(); done.Wait() })
		return func(j load.Job) (load.Result, error) { return load.NBD(context.Background(), socket, "a", j) }
	},
	"vhost": func(t *testing.T, dev block.Device) func(load.Job) (load.Result, error) {
		s := vhost.NewServer(testhost.ShortDir(t), vhost.Options{})
		if err := s.Add(vhost.Export{Name: "a", Device: dev}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			s.Serve(ctx)
		})
		return func(j load.Job) (load.Result, error) { return load.Vhost(context.Background(), s.Path("a"), j) }
	},
}

// TestEachBlockOnce: a job of as many requests as there are blocks comes to each block once, in any order, and the data of a write is
// nowhere zero.
func TestEachBlockOnce(t *testing.T) {
	for name, serve := range runners {
		t.Run(name, func(t *testing.T) {
			const size, unit = 3 << 20, 4096 // not a power of two
			dev := newCounted(size, unit)
			run := serve(t, dev)
			for _, j := range []load.Job{
				{Write: true, Block: unit, Depth: 16, Size: size, Random: true, Seed: 7, Count: size / unit},
				{Block: unit, Depth: 16, Size: size, Random: true, Seed: 8, Count: size / unit},
				{Block: unit, Depth: 1, Size: size, Count: size / unit},
			} {
				r, err := run(j)
				if err != nil || r.Requests != j.Count || r.Rate() <= 0 {
					t.Fatalf("%+v: %+v, %v", j, r, err)
				}
			}
			for i := range dev.reads {
				if r, w := dev.reads[i].Load(), dev.writes[i].Load(); r != 2 || w != 1 {
					t.Fatalf("block %d: %d reads and %d writes", i, r, w)
				}
			}
			b := make([]byte, size)
			if _, err := dev.Memory.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			for i, x := range b {
				if x == 0 {
					t.Fatalf("byte %d is zero", i)
				}
			}
		})
	}
}

// TestFlushAfterEach: and a block that is longer than what is received at once.
func TestFlushAfterEach(t *testing.T) {
	for name, serve := range runners {
		t.Run(name, func(t *testing.T) {
			dev := newCounted(8<<20, 2<<20)
			run := serve(t, dev)
			if r, err := run(load.Job{Write: true, Block: 2 << 20, Depth: 1, Size: 8 << 20, Flush: true, Count: 9}); err != nil || r.Requests != 9 || dev.flushes.Load() != 9 {
				t.Fatalf("%+v, %v, %d flushes", r, err, dev.flushes.Load())
			}
			if r, err := run(load.Job{Block: 2 << 20, Depth: 3, Size: 8 << 20, Count: 10}); err != nil || r.Requests != 10 {
				t.Fatalf("%+v, %v", r, err)
			}
		})
	}
}

func TestTimeEndsAJob(t *testing.T) {
	for name, serve := range runners {
		t.Run(name, func(t *testing.T) {
			run := serve(t, block.NewMemory(1<<20))
			r, err := run(load.Job{Block: 4096, Depth: 4, Size: 1 << 20, Time: 20 * time.Millisecond})
			if err != nil || r.Elapsed < 20*time.Millisecond || r.Requests < 4 {
				t.Fatalf("%+v, %v", r, err)
			}
		})
	}
}

// TestErrorsEndAJob: a request that fails, and a job that can't be.
func TestErrorsEndAJob(t *testing.T) {
	for name, serve := range runners {
		t.Run(name, func(t *testing.T) {
			run := serve(t, failing{block.NewMemory(1 << 20)})
			for _, j := range []load.Job{
				{Block: 4096, Depth: 4, Size: 1 << 20, Count: 100},
				{Block: 4096, Depth: 4, Size: 2 << 20, Count: 100},
				{Block: 4096, Depth: 4, Size: 1 << 20},
				{Block: 4096, Depth: 4, Size: 1 << 20, Count: 1, Flush: true},
				{Block: 0, Depth: 4, Size: 1 << 20, Count: 1},
			} {
				if r, err := run(j); err == nil {
					t.Errorf("%+v: %+v and no error", j, r)
				}
			}
		})
	}
}

type failing struct{ *block.Memory }

func (failing) ReadAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }
