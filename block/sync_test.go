package block_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
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

func TestFileAfterAFailedFlush(t *testing.T) {
	n := 0
	blocktest.RunFailedFlush(t, func(t *testing.T) (block.Device, func(blocktest.Kind, error) error) {
		n++
		f := create(t, filepath.Join(t.TempDir(), fmt.Sprint(n)), 64<<10)
		return f, func(kind blocktest.Kind, err error) error {
			if kind == blocktest.WriteDurable { // the file system takes the write and fails to make it durable
				return f.WriteDurableBy([]byte("x"), 8192, func([]byte, int64) (int, error) { return 0, err })
			}
			return f.Synced(func() error { return err })
		}
	})
}

// A lack of space for the bytes of a durable write fails neither the next flush nor, when there is space, the next
// durable write. Nothing is injected: the file is longer than the process may write. The limit is the whole process's,
// so it is a process of its own.
func TestDurableWriteWithoutSpace(t *testing.T) {
	path := os.Getenv("BLOCK_LIMITED")
	if path == "" {
		path = filepath.Join(t.TempDir(), "x")
		if err := create(t, path, 64<<10).Close(); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestDurableWriteWithoutSpace$")
		cmd.Env = append(os.Environ(), "BLOCK_LIMITED="+path)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	f, err := block.Open(path, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	signal.Ignore(unix.SIGXFSZ)
	limit := func(size uint64) {
		t.Helper()
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: 64 << 10}); err != nil {
			t.Fatal(err)
		}
	}
	for _, way := range []string{"one system call", "write and flush"} {
		if way != "one system call" {
			f.Forget(block.DsyncWrite)
		}
		limit(8192)
		if err := f.WriteDurableAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{8192, 8192 - 512, 16384} { // the second is written in part
			if err := f.WriteDurableAt(make([]byte, 1024), off); !block.IsNoSpace(err) {
				t.Fatalf("%s: past the limit: %v", way, err)
			}
			if err := f.Flush(); err != nil {
				t.Errorf("%s: flush: %v", way, err)
			}
		}
		limit(64 << 10)
		if err := f.WriteDurableAt(make([]byte, 1024), 8192-512); err != nil {
			t.Errorf("%s: with space: %v", way, err)
		}
	}
}

// The same on a file system that is full.
func TestDurableWriteOnAFullFileSystem(t *testing.T) {
	dir := testhost.Mount(t, "tmpfs", "tmpfs", "size=64k")
	f := create(t, filepath.Join(dir, "x"), 1<<20)
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 60<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, f, 0, "before")
	if err := f.WriteDurableAt(make([]byte, 8192), 64<<10); !block.IsNoSpace(err) {
		t.Fatalf("without space: %v", err)
	}
	if err := f.Flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteDurableAt(make([]byte, 8192), 64<<10); err != nil {
		t.Errorf("with space: %v", err)
	}
}

// The kernel reports a lost write to one of two concurrent syncs; neither may succeed, in whichever order they return.
func TestFailureIsSeenByTheSyncBeside(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "x"), 8192)
	reported, goOn := make(chan struct{}), make(chan struct{})
	results := make(chan error, 2)
	go func() {
		results <- f.Synced(func() error {
			close(reported) // the kernel has reported to this one
			<-goOn
			return syscall.EIO
		})
	}()
	<-reported
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
