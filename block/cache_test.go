package block_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
)

// cached reports whether the kernel has a page of a file in memory.
func cached(t *testing.T, path string, off int64) bool {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	page := int64(os.Getpagesize())
	m, err := unix.Mmap(fd, off/page*page, int(page), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	var resident byte
	if _, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(page), uintptr(unsafe.Pointer(&resident))); e != 0 {
		t.Fatal(e)
	}
	return resident&1 != 0
}

func TestFileDropCache(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	f := create(t, path, 1<<20)
	for off := int64(0); off < f.Size(); off += 4096 {
		write(t, f, off, "content")
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if !cached(t, path, 300<<10) || !cached(t, path, 0) {
		t.Fatal("what was just written is not cached")
	}
	if err := block.DropCache(f, 300<<10+5, 1); err != nil {
		t.Fatal(err)
	}
	if cached(t, path, 300<<10) {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err == nil && st.Type == unix.TMPFS_MAGIC {
			t.Skip("tmpfs has nothing but its cache")
		}
		t.Error("a dropped page is still there")
	}
	write(t, f, 512<<10, "dirty")
	if err := block.DropCache(f, 0, f.Size()); err != nil {
		t.Fatal(err)
	}
	want(t, f, 512<<10, "dirty")
	want(t, f, 300<<10, "content")
	if err := block.DropCache(f, f.Size(), 1); err == nil {
		t.Error("past the end")
	}
	f.Close()
	if err := block.DropCache(f, 0, 1); err == nil {
		t.Error("after close")
	}
}

// TestFileBeginRead: what was begun to be read is in memory soon. It is harmless on ranges and files that aren't there.
func TestFileBeginRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	f := create(t, path, 64<<20)
	const at = 32 << 20
	write(t, f, at, "content")
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := block.DropCache(f, 0, f.Size()); err != nil {
		t.Fatal(err)
	}
	if cached(t, path, at) {
		t.Skip("nothing is dropped on this file system")
	}
	block.BeginRead(f, at, 0)
	if cached(t, path, at) {
		t.Error("nothing was to be read")
	}
	block.BeginRead(f, at, 7)
	for late := time.Now().Add(10 * time.Second); !cached(t, path, at); time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Fatal("it is not read")
		}
	}
	want(t, f, at, "content")
	block.BeginRead(f, f.Size(), 1)
	block.BeginRead(block.NewMemory(4096), 0, 4096)
	f.Close()
	block.BeginRead(f, at, 7)
}
