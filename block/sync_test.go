package block_test

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// On a file system without the fast ways everything still works.
func TestFileWithoutAbilities(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	n := 0
	blocktest.Run(t, func(t *testing.T) block.Device {
		n++
		f := create(t, path+string(rune('a'+n)), 300<<10)
		f.Forget(block.DsyncWrite, block.PunchHole, block.ZeroRange)
		return f
	})
	f := create(t, path, 8192)
	f.Forget(block.PunchHole, block.ZeroRange)
	write(t, f, 0, "x")
	if err := f.ZeroAt(0, 4096, 0); !errors.Is(err, block.ErrNotFast) {
		t.Errorf("zero without a fast way: %v", err)
	}
	if err := block.Zero(f, 0, 4096, block.OnlyFast); !errors.Is(err, block.ErrNotFast) {
		t.Errorf("fast zero without a fast way: %v", err)
	}
	want(t, f, 0, "x\x00")
	if err := block.Zero(f, 0, 4096, 0); err != nil {
		t.Error(err)
	}
	want(t, f, 0, "\x00")
}

func want(t *testing.T, dev block.Device, off int64, s string) {
	t.Helper()
	p := make([]byte, len(s))
	if _, err := dev.ReadAt(p, off); err != nil || string(p) != s {
		t.Fatalf("at %d: %q, %v, want %q", off, p, err, s)
	}
}

func TestFailedFlushIsForGood(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "x"), 8192)
	write(t, f, 0, "before")
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	lost := f.Synced(func() error { return syscall.EIO })
	if !errors.Is(lost, syscall.EIO) {
		t.Fatal(lost)
	}
	for range 2 {
		if err := f.Flush(); err != lost {
			t.Errorf("flush: %v", err)
		}
		if err := f.WriteDurableAt([]byte("after"), 0); err != lost {
			t.Errorf("durable write: %v", err)
		}
	}
	want(t, f, 0, "before") // the durable write did not begin
	write(t, f, 0, "ordinary writes go on")
	f.Synced(func() error { return syscall.ENOSPC })
	if err := f.Flush(); err != lost {
		t.Errorf("the first error was replaced by %v", err)
	}
}

// The kernel tells one of two syncs at the same time of a lost write; neither may succeed, in whichever
// order they return.
func TestFailureIsSeenByTheSyncBeside(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "x"), 8192)
	told, goOn := make(chan struct{}), make(chan struct{})
	results := make(chan error, 2)
	go func() {
		results <- f.Synced(func() error {
			close(told) // the kernel has told this one
			<-goOn
			return syscall.EIO
		})
	}()
	<-told
	done := make(chan struct{})
	go func() {
		defer close(done)
		results <- f.Synced(func() error {
			defer close(goOn)
			return nil
		})
	}()
	<-done
	for range 2 {
		if err := <-results; !errors.Is(err, syscall.EIO) {
			t.Errorf("one of two flushes returned %v", err)
		}
	}
}
