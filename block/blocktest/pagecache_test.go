package blocktest_test

import (
	"errors"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func write(t *testing.T, dev block.Device, off int64, s string) {
	t.Helper()
	if _, err := dev.WriteAt([]byte(s), off); err != nil {
		t.Fatal(err)
	}
}

func wantText(t *testing.T, dev block.Device, off int64, s string) {
	t.Helper()
	p := make([]byte, len(s))
	if _, err := dev.ReadAt(p, off); err != nil || string(p) != s {
		t.Errorf("at %d: %q, %v, want %q", off, p, err, s)
	}
}

// TestForgetLost: what could not be written is not even readable.
func TestForgetLost(t *testing.T) {
	for name, fail := range map[string]blocktest.Kind{"flush": blocktest.Flush, "page": blocktest.Write} {
		t.Run(name, func(t *testing.T) {
			c := blocktest.NewPageCache(block.NewMemory(64<<10), blocktest.FailKind(fail, syscall.EIO))
			c.ForgetLost()
			f := c.Open()
			write(t, f, 5000, "new")
			wantText(t, f, 5000, "new")
			if err := f.Flush(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("the failed flush: %v", err)
			}
			wantText(t, f, 5000, "\x00\x00\x00")
			if c.Dirty() != 0 {
				t.Error("the lost page is dirty")
			}
		})
	}
}

// A failed flush leaves the data readable, clean and not on the disk.
func TestPageCacheAfterAFailedFlush(t *testing.T) {
	for name, fail := range map[string]blocktest.Kind{"flush": blocktest.Flush, "page": blocktest.Write} {
		t.Run(name, func(t *testing.T) {
			disk := block.MemoryFrom(make([]byte, 64<<10))
			c := blocktest.NewPageCache(disk, nil)
			f, other := c.Open(), c.Open()
			write(t, f, 5000, "old")
			if err := f.Flush(); err != nil {
				t.Fatal(err)
			}
			wantText(t, disk, 5000, "old")
			write(t, f, 5000, "new")
			wantText(t, disk, 5000, "old")
			if c.Dirty() != 4096 {
				t.Errorf("%d bytes are dirty", c.Dirty())
			}
			c.Set(blocktest.FailKind(fail, syscall.EIO))
			if err := f.Flush(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("the failed flush: %v", err)
			}
			c.Set(nil)
			if c.Dirty() != 0 {
				t.Error("the lost page is dirty")
			}
			if err := f.Flush(); err != nil {
				t.Errorf("the next flush: %v", err)
			}
			if err := other.Flush(); !errors.Is(err, syscall.EIO) {
				t.Errorf("the failure was not reported to the other file: %v", err)
			}
			if err := other.Flush(); err != nil {
				t.Errorf("reported twice to the other file: %v", err)
			}
			later := c.Open() // the failure was reported to every open file
			if err := later.Flush(); err != nil {
				t.Errorf("reported to a later file: %v", err)
			}
			wantText(t, later, 5000, "new")
			wantText(t, disk, 5000, "old")
			write(t, later, 0, "x") // another page does not bring it back
			if err := later.Flush(); err != nil {
				t.Error(err)
			}
			wantText(t, disk, 5000, "old")
			if err := block.DropCache(later, 4096, 1); err != nil {
				t.Error(err)
			}
			wantText(t, f, 5000, "old")
		})
	}
}

func TestPageCacheReportsToTheNextOpener(t *testing.T) {
	c := blocktest.NewPageCache(block.NewMemory(64<<10), nil)
	write(t, c.Open(), 0, "lost")
	c.Set(blocktest.FailKind(blocktest.Write, syscall.ENOSPC))
	c.WriteBack()
	c.Set(nil)
	if err := c.Open().Flush(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("reported to nobody, and then %v", err)
	}
	if err := c.Open().Flush(); err != nil {
		t.Error(err)
	}
}

func TestPageCacheDropsWhatIsClean(t *testing.T) {
	disk := block.NewMemory(64 << 10)
	c := blocktest.NewPageCache(disk, nil)
	f := c.Open()
	write(t, f, 0, "dirty")
	if err := f.DropCache(0, f.Size()); err != nil {
		t.Error(err)
	}
	wantText(t, f, 0, "dirty")
	c.PowerCut()
	wantText(t, f, 0, "\x00\x00\x00\x00\x00")
	if err := block.WriteDurable(f, []byte("durable"), 10000); err != nil {
		t.Error(err)
	}
	write(t, f, 0, "dirty")
	c.PowerCut()
	wantText(t, f, 10000, "durable")
	wantText(t, f, 0, "\x00")
}

// A durable write flushes its own pages alone.
func TestPageCacheDurableWrite(t *testing.T) {
	disk := block.NewMemory(64 << 10)
	c := blocktest.NewPageCache(disk, nil)
	f := c.Open()
	write(t, f, 0, "dirty")
	if err := block.WriteDurable(f, []byte("durable"), 10000); err != nil {
		t.Fatal(err)
	}
	wantText(t, disk, 10000, "durable")
	wantText(t, disk, 0, "\x00")
	c.Set(blocktest.FailKind(blocktest.WriteDurable, syscall.EIO))
	if err := block.WriteDurable(f, []byte("no"), 10000); !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	wantText(t, f, 10000, "norable")
	wantText(t, disk, 10000, "durable")
	if c.Dirty() != 4096 {
		t.Errorf("%d bytes are dirty", c.Dirty())
	}
}

// Files of one file system use up each other's space.
func TestPool(t *testing.T) {
	pool := blocktest.NewPool(4 * 4096)
	a, b := pool.Sparse(block.NewMemory(1<<20), true), pool.Sparse(block.NewMemory(1<<20), true)
	write(t, a, 0, "a")
	if err := block.WriteDurable(b, []byte("bb"), 4095); err != nil {
		t.Fatal(err)
	}
	if can, err := block.Allocate(b, 2*4096, 1); !can || err != nil {
		t.Fatalf("allocate: %v, %v", can, err)
	}
	if a.Taken() != 4096 || b.Taken() != 3*4096 || pool.Free() != 0 {
		t.Errorf("%d, %d taken, %d free", a.Taken(), b.Taken(), pool.Free())
	}
	full := func() {
		t.Helper()
		_, err := a.WriteAt([]byte("more"), 4096)
		can, err2 := block.Allocate(a, 4096, 1)
		for _, err := range []error{err, err2, block.WriteDurable(a, []byte("more"), 4096), block.Zero(a, 4096, 1, block.KeepAllocated)} {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("full: %v", err)
			}
		}
		if !can {
			t.Error("no space is no lack of means")
		}
		wantText(t, a, 4096, "\x00")
	}
	full()
	write(t, a, 0, "again") // needs nothing
	write(t, b, 2*4096, "was reserved")
	if err := block.Discard(b, 0, 8192); err != nil {
		t.Fatal(err)
	}
	if pool.Free() != 2*4096 {
		t.Errorf("%d bytes are free", pool.Free())
	}
	write(t, a, 4096, "more")
	pool.SetSize(0)
	if _, err := b.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.ENOSPC) || pool.Free() != 0 {
		t.Errorf("shrunk: %v", err)
	}
	write(t, a, 0, "still needs nothing")
}
