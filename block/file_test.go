package block_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// directories are where files are tested: the ordinary file system of temporary files, and one in memory, which has
// other abilities (no FALLOC_FL_ZERO_RANGE).
func folders(t *testing.T) map[string]string {
	list := map[string]string{"temporary folder": t.TempDir()}
	if dir, err := os.MkdirTemp("/dev/shm", "dmsnap-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		list["tmpfs"] = dir
	} else {
		t.Logf("SKIPPED: no tests on tmpfs: %v", err)
	}
	return list
}

// create makes a file that is closed when the test ends.
func create(t *testing.T, path string, size int64) *block.File {
	t.Helper()
	f, err := block.Create(path, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func open(t *testing.T, path string, o block.Options) *block.File {
	t.Helper()
	f, err := block.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestFileConformance(t *testing.T) {
	for name, dir := range folders(t) {
		n := 0
		next := func() string { n++; return filepath.Join(dir, fmt.Sprint(n)) }
		t.Run(name+"/created", func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device { return create(t, next(), 300<<10) })
		})
		t.Run(name+"/opened, large", func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				path := next()
				if err := os.WriteFile(path, blocktest.Pattern(100<<10, 1), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(path, 1<<40); err != nil {
					t.Fatal(err)
				}
				return open(t, path, block.Options{})
			})
		})
		t.Run(name+"/read-only", func(t *testing.T) {
			blocktest.RunReadOnly(t, func(t *testing.T) block.Device {
				path := next()
				create(t, path, 64<<10).Close()
				return open(t, path, block.Options{ReadOnly: true})
			})
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	unreadable := filepath.Join(dir, "unreadable")
	if err := os.WriteFile(unreadable, nil, 0); err != nil {
		t.Fatal(err)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, says string
		is         error
	}{
		{dir, "is a directory", syscall.EISDIR},
		{filepath.Join(dir, "missing"), "no such file", fs.ErrNotExist},
		{filepath.Join(dir, "fifo", "x"), "not a directory", syscall.ENOTDIR},
		{fifo, "a pipe", nil},
		{"/dev/null", "a character device", nil},
		{loop, "too many levels", syscall.ELOOP},
		{unreadable, "permission denied", fs.ErrPermission},
		{"", "no such file", fs.ErrNotExist},
	} {
		if c.path == unreadable && os.Getuid() == 0 {
			t.Log("SKIPPED: root reads unreadable files")
			continue
		}
		for _, o := range []block.Options{{}, {ReadOnly: true}} {
			_, err := block.Open(c.path, o)
			if err == nil || !strings.Contains(err.Error(), c.path) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("open %q with %+v: %v, want the path and %q", c.path, o, err, c.says)
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("open %q: %v is not %v", c.path, err, c.is)
			}
		}
	}
	if _, err := block.Open(unreadable, block.Options{Lock: block.LockShared}); err == nil {
		t.Error("a writer with a reader's lock was let in")
	}
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new")
	f := create(t, path, 1<<40)
	if f.Size() != 1<<40 || f.BlockSize() != 512 || f.ReadOnly() || f.Path() != path {
		t.Errorf("size %d, block size %d, read-only %v, path %s", f.Size(), f.BlockSize(), f.ReadOnly(), f.Path())
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Blocks > 64 || info.Mode() != 0o600 {
		t.Errorf("%d blocks, mode %v", st.Blocks, info.Mode())
	}
	write(t, f, 0, "content")
	f.Close()

	link := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "target"), link); err != nil {
		t.Fatal(err)
	}
	for _, taken := range []string{path, link, dir} {
		if _, err := block.Create(taken, 512); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), taken) {
			t.Errorf("create %s, which exists: %v", taken, err)
		}
	}
	if now, err := os.Stat(path); err != nil || now.Size() != 1<<40 {
		t.Errorf("the existing file was touched: %v, %v", now, err)
	}
	if _, err := block.Create(filepath.Join(dir, "missing", "x"), 512); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("create in a missing folder: %v", err)
	}
	for _, size := range []int64{-1, 1<<63 - 1} {
		big := filepath.Join(dir, "big")
		if f, err := block.Create(big, size); err == nil {
			f.Close()
			os.Remove(big)
			if size < 0 {
				t.Errorf("created with size %d", size)
			}
			t.Logf("the file system takes a file of %d bytes", size)
		} else if _, err := os.Lstat(big); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a file that could not be made was left behind: %v", err)
		}
	}
}

func write(t *testing.T, dev block.Device, off int64, s string) {
	t.Helper()
	if _, err := dev.WriteAt([]byte(s), off); err != nil {
		t.Fatal(err)
	}
}

func TestOddSizes(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 513, 100_001} {
		f := create(t, filepath.Join(t.TempDir(), "x"), size)
		if f.Size() != size {
			t.Fatalf("size %d of a file of %d bytes", f.Size(), size)
		}
		if size == 0 {
			continue
		}
		write(t, f, size-1, "x")
		if _, err := f.WriteAt([]byte("xy"), size-1); err == nil {
			t.Error("a write past the end was taken")
		}
		if err := block.Zero(f, 0, size, 0); err != nil {
			t.Error(err)
		}
		if n, err := f.Refresh(); n != size || err != nil {
			t.Errorf("the file of %d bytes has %d, %v", size, n, err)
		}
	}
}

func TestFileExtents(t *testing.T) {
	for name, dir := range folders(t) {
		t.Run(name, func(t *testing.T) {
			f := create(t, filepath.Join(dir, "extents"), 64<<20)
			write(t, f, 1<<20, strings.Repeat("x", 8192))
			write(t, f, 4<<20, strings.Repeat("x", 4096))
			probe, err := os.Open(f.Path())
			if err != nil {
				t.Fatal(err)
			}
			defer probe.Close()
			if at, err := probe.Seek(0, unix.SEEK_DATA); at != 1<<20 {
				t.Skipf("SKIPPED: the file system does not report holes of a page: data at %d, %v", at, err)
			}
			list, err := f.Extents(0, f.Size())
			if err != nil {
				t.Fatal(err)
			}
			hole := block.Hole | block.ReadsZero
			wanted := []block.Extent{{1 << 20, hole}, {8192, 0}, {3<<20 - 8192, hole}, {4096, 0}, {60<<20 - 4096, hole}}
			if fmt.Sprint(list) != fmt.Sprint(wanted) {
				t.Errorf("extents %v, want %v", list, wanted)
			}
			if err := f.Discard(1<<20, 4096); err != nil {
				t.Fatal(err)
			}
			list, err = f.Extents(1<<20, 10000)
			if wanted := []block.Extent{{4096, hole}, {4096, 0}, {1808, hole}}; err != nil || fmt.Sprint(list) != fmt.Sprint(wanted) {
				t.Errorf("after a discard: %v, %v, want %v", list, err, wanted)
			}
			// Many holes: a call stops early and the next goes on.
			for i := range int64(700) {
				write(t, f, 8<<20+i*16384, "x")
			}
			list, err = f.Extents(8<<20, 700*16384)
			if err != nil || len(list) == 0 || len(list) > 256 {
				t.Errorf("%d extents, %v", len(list), err)
			}
			// A file cut short beneath us is not called empty.
			if err := os.Truncate(f.Path(), 16<<20); err != nil {
				t.Fatal(err)
			}
			if list, err := f.Extents(32<<20, 4096); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("extents past a new end: %v, %v", list, err)
			}
		})
	}
}

func TestFileSizeChanges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	f := create(t, path, 8192)
	write(t, f, 4096, "kept")

	if err := os.Truncate(path, 20000); err != nil {
		t.Fatal(err)
	}
	if f.Size() != 8192 {
		t.Error("the size changed without Refresh")
	}
	// Grow to less than what the file became by itself must not cut it.
	if err := f.Grow(10000); err != nil || f.Size() != 20000 {
		t.Errorf("grow: %v, size %d", err, f.Size())
	}
	if n, err := block.Refresh(f); n != 20000 || err != nil {
		t.Errorf("refresh: %d, %v", n, err)
	}
	if err := os.Truncate(path, 4100); err != nil {
		t.Fatal(err)
	}
	if n, err := block.Refresh(f); n != 20000 || err != nil {
		t.Errorf("refresh of a file cut short: %d, %v", n, err)
	}
	p := make([]byte, 100)
	if n, err := f.ReadAt(p, 4096); n != 4 || !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(p[:4], []byte("kept")) {
		t.Errorf("read past the new end: %d, %v", n, err)
	}
}

func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	a := create(t, filepath.Join(dir, "a"), 512)
	b := create(t, filepath.Join(dir, "b"), 512)
	if err := os.Link(a.Path(), filepath.Join(dir, "again")); err != nil {
		t.Fatal(err)
	}
	again := open(t, filepath.Join(dir, "again"), block.Options{ReadOnly: true, Lock: block.LockNone})
	if block.Same(a, b) || !block.Same(a, again) {
		t.Errorf("identities %s, %s, %s", a.Identity(), b.Identity(), again.Identity())
	}
	if again.Locked() || !a.Locked() {
		t.Errorf("locked: %v with LockNone, %v otherwise", again.Locked(), a.Locked())
	}
}

// TestBeginFlush: it changes nothing, and is harmless on ranges and files that aren't there.
func TestBeginFlush(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f := create(t, path, 1<<20)
	want := blocktest.Pattern(1<<20, 1)
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	block.BeginFlush(f, 4096, 1<<19)
	block.BeginFlush(f, 1<<19, 1<<20)
	block.BeginFlush(block.NewMemory(4096), 0, 4096)
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	block.BeginFlush(f, 0, 4096)
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("content changed (%v)", err)
	}
}

// What was reserved has its space, written or not; what was punched out has none.
func TestHasSpace(t *testing.T) {
	f, err := block.Create(filepath.Join(t.TempDir(), "f"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Allocate(64<<10, 128<<10); errors.Is(err, block.ErrNotFast) {
		t.Skip("space can't be reserved here")
	} else if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 64<<10), 64<<10); err != nil {
		t.Fatal(err)
	}
	if f.Flush() != nil || !f.HasSpace(64<<10, 64<<10) || !f.HasSpace(68<<10, 4096) {
		t.Error("what was written has no space")
	}
	for _, r := range [][2]int64{{0, 4096}, {0, 68 << 10}, {60 << 10, 8192}, {188 << 10, 8192}, {1<<20 - 4096, 4096}, {1 << 20, 1}} {
		if f.HasSpace(r[0], r[1]) {
			t.Errorf("%d bytes at %d have space", r[1], r[0])
		}
	}
	if err := f.Discard(96<<10, 4096); err != nil {
		t.Fatal(err)
	}
	if f.HasSpace(64<<10, 64<<10) || !f.HasSpace(64<<10, 32<<10) || !f.HasSpace(100<<10, 28<<10) {
		t.Error("a hole between data is not seen")
	}
}
