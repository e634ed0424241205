package faultfs

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// start mounts a file system with one directory "d" and returns the directory's path.
func start(t *testing.T, limit int64) (*FS, string) {
	t.Helper()
	f, err := Start(t.TempDir())
	if errors.Is(err, ErrUnavailable) {
		t.Skip("SKIPPED:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil || strings.Contains(string(mounts), f.Dir()+" ") {
			t.Errorf("still mounted (%v)", err)
		}
	})
	must(t, f.Folder("d", limit))
	return f, filepath.Join(f.Dir(), "d")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func put(t *testing.T, f *os.File, c byte, off, n int64) {
	t.Helper()
	_, err := f.WriteAt(bytes.Repeat([]byte{c}, int(n)), off)
	must(t, err)
}

func holds(t *testing.T, f *os.File, c byte, off, n int64) bool {
	t.Helper()
	b := make([]byte, n)
	_, err := f.ReadAt(b, off)
	must(t, err)
	return bytes.Equal(b, bytes.Repeat([]byte{c}, int(n)))
}

// What was flushed survives a power cut, the rest by sectors; names need a flush of the directory.
func TestPowerCut(t *testing.T) {
	f, dir := start(t, 0)
	d, err := os.Open(dir)
	must(t, err)
	defer func() { d.Close() }()
	a := open(t, filepath.Join(dir, "a"))
	put(t, a, 'A', 0, 64<<10)
	must(t, a.Sync())
	must(t, d.Sync())
	old, fresh, missing := 0, 0, 0
	for seed := range uint64(30) {
		put(t, a, 'B', 8192, 8192)
		b := open(t, filepath.Join(dir, "b"))
		must(t, b.Sync())
		must(t, f.PowerOff())
		if _, err := a.WriteAt([]byte("x"), 0); err == nil {
			t.Fatal("a write without power")
		}
		a.Close()
		b.Close()
		d.Close()
		if _, err := f.PowerOn(seed); err != nil {
			t.Fatal(err)
		}
		d, err = os.Open(dir)
		must(t, err)
		a = open(t, filepath.Join(dir, "a"))
		if !holds(t, a, 'A', 0, 8192) || !holds(t, a, 'A', 16384, 48<<10) {
			t.Fatal("flushed data is lost")
		}
		for s := int64(8192); s < 16384; s += sectorSize {
			switch {
			case holds(t, a, 'A', s, sectorSize):
				old++
			case holds(t, a, 'B', s, sectorSize):
				fresh++
			default:
				t.Fatal("a torn sector")
			}
		}
		if err := os.Remove(filepath.Join(dir, "b")); err != nil {
			missing++
		}
		put(t, a, 'A', 8192, 8192)
		must(t, a.Sync())
		must(t, d.Sync())
	}
	if old == 0 || fresh == 0 || missing == 0 || missing == 30 {
		t.Errorf("%d sectors old, %d new; %d of 30 new files lost", old, fresh, missing)
	}
}

// After a failed fsync the page cache shows what is not on the disk, the next fsync succeeds, and the data comes
// to light by dropping the cached pages.
func TestFailedFsync(t *testing.T) {
	f, dir := start(t, 0)
	a := open(t, filepath.Join(dir, "a"))
	put(t, a, 'A', 0, 16384)
	must(t, a.Sync())
	must(t, f.Add(Rule{Op: Fsync, File: "a", Errno: syscall.EIO, Count: 1}))
	put(t, a, 'B', 4096, 4096)
	if err := unix.Fdatasync(int(a.Fd())); err != unix.EIO {
		t.Fatalf("fdatasync: %v", err)
	}
	if hits, err := f.Hits(); err != nil || len(hits) != 1 || hits[0] != (Hit{Fsync, "a", syscall.EIO}) {
		t.Errorf("hits %v, %v", hits, err)
	}
	must(t, a.Sync())
	again := open(t, filepath.Join(dir, "a"))
	if !holds(t, again, 'B', 4096, 4096) {
		t.Error("another open drops the page cache")
	}
	must(t, unix.Fadvise(int(again.Fd()), 0, 0, unix.FADV_DONTNEED))
	if !holds(t, again, 'A', 0, 16384) {
		t.Error("the disk has what failed to reach it")
	}
	// A write with RWF_DSYNC is a write and a flush.
	must(t, f.Add(Rule{Op: Fsync, File: "a", Errno: syscall.EIO, Count: 1}))
	if _, err := unix.Pwritev2(int(a.Fd()), [][]byte{[]byte("x")}, 0, unix.RWF_DSYNC); err != unix.EIO {
		t.Errorf("RWF_DSYNC: %v", err)
	}
}

func TestRules(t *testing.T) {
	f, dir := start(t, 64<<10)
	a := open(t, filepath.Join(dir, "a"))
	must(t, f.Add(Rule{Op: Write, File: "*", Errno: syscall.EIO, Skip: 1, Every: 2, Count: 2}))
	var got []bool
	for range 7 {
		_, err := unix.Pwrite(int(a.Fd()), []byte("x"), 0)
		got = append(got, err == nil)
	}
	for i, want := range []bool{true, true, false, true, false, true, true} {
		if got[i] != want {
			t.Fatalf("writes succeed: %v", got)
		}
	}
	must(t, f.Clear())
	must(t, f.Add(Rule{Op: Write, File: "a", Short: 100, Count: 1}))
	if n, err := unix.Pwrite(int(a.Fd()), make([]byte, 4096), 0); n != 100 || err != nil {
		t.Errorf("a short write: %d, %v", n, err)
	}
	must(t, f.Add(Rule{Op: Fsync, File: "a", Hang: true, Count: 1}))
	done := make(chan error)
	go func() { done <- a.Sync() }()
	for n := 0; n == 0; time.Sleep(time.Millisecond) {
		var err error
		n, err = f.Hanging()
		must(t, err)
	}
	select {
	case err := <-done:
		t.Fatalf("it did not hang: %v", err)
	default:
	}
	must(t, f.Release())
	must(t, <-done)
}

// The files of a directory share its room. Holes take none, punching gives room back.
func TestRoom(t *testing.T) {
	f, dir := start(t, 64<<10)
	a, b := open(t, filepath.Join(dir, "a")), open(t, filepath.Join(dir, "b"))
	must(t, a.Truncate(1<<40))
	put(t, a, 'A', 1<<30, 32<<10)
	must(t, unix.Fallocate(int(b.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 16<<10))
	if err := unix.Fallocate(int(b.Fd()), 0, 0, 64<<10); err != unix.ENOSPC {
		t.Errorf("fallocate: %v", err)
	}
	if n, err := unix.Pwrite(int(b.Fd()), make([]byte, 64<<10), 0); n != 32<<10 || err != nil {
		t.Errorf("a write that half fits: %d, %v", n, err)
	}
	if _, err := unix.Pwrite(int(a.Fd()), []byte("x"), 0); err != unix.ENOSPC {
		t.Errorf("a write without space: %v", err)
	}
	put(t, a, 'B', 1<<30, 32<<10) // in place
	at, err := unix.Seek(int(a.Fd()), 0, unix.SEEK_DATA)
	if err != nil || at != 1<<30 {
		t.Errorf("data at %d, %v", at, err)
	}
	if at, err = unix.Seek(int(a.Fd()), at, unix.SEEK_HOLE); err != nil || at != 1<<30+32<<10 {
		t.Errorf("a hole at %d, %v", at, err)
	}
	must(t, unix.Fallocate(int(a.Fd()), unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, 1<<30, 16<<10))
	if !holds(t, a, 0, 1<<30, 16<<10) || !holds(t, a, 'B', 1<<30+16<<10, 16<<10) {
		t.Error("punched wrongly")
	}
	if n, err := f.Used("d"); err != nil || n != 48<<10 {
		t.Errorf("%d bytes used, %v", n, err)
	}
	put(t, b, 'C', 1<<20, 16<<10)
}
