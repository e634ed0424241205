package main

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

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// A fuseRun is a server with a mounted folder.
type fuseRun struct {
	*process
	pair
	mount string
}

func (r fuseRun) file(name string) string { return filepath.Join(r.mount, name) }

// serveFiles starts a server of p that shows its exports as files. The test is skipped where nothing can be mounted.
func serveFiles(t *testing.T, p pair, more ...string) fuseRun {
	t.Helper()
	err := mountable()
	if err != nil {
		t.Skip("SKIPPED: no FUSE file system can be mounted: ", err)
	}
	mount := filepath.Join(p.dir, "files")
	if err := os.Mkdir(mount, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		if _, err := os.Stat(mount); !errors.Is(err, syscall.ENOTCONN) {
			t.Fatal(err)
		}
	}
	args := append([]string{"serve", p.origin, "disk=" + p.cow, "--export-origin", "--fuse", mount, "--socket", filepath.Join(p.dir, "s"), "--control", filepath.Join(p.dir, "c")}, more...)
	r := fuseRun{launch(t, args...), p, mount}
	t.Cleanup(func() {
		r.Process.Kill()
		r.Wait()
		unix.Unmount(mount, unix.MNT_DETACH) // what is left of a test that failed
	})
	for line := ""; !strings.HasPrefix(line, "origin  file "); {
		if line, err = r.stdout.ReadString('\n'); err != nil {
			r.end(t)
			if strings.Contains(r.stderr.String(), "mount ") {
				t.Skip("SKIPPED: no FUSE file system can be mounted: ", r.stderr.String())
			}
			t.Fatal(err, r.stderr.String())
		}
	}
	return r
}

func newShortPair(t *testing.T) pair {
	t.Helper()
	dir, err := os.MkdirTemp("", "fu-") // short: it has sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := pair{dir: dir, origin: filepath.Join(dir, "disk.img"), cow: filepath.Join(dir, "disk.cow")}
	writeFile(t, p.origin, bytes.Repeat([]byte("origin, "), 128<<10)) // 1 MiB
	mustRun(t, "create", p.origin, p.cow)
	return p
}

func (r fuseRun) open(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile(r.file(name), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// stop ends the server, which must end well, with nothing mounted and a sound store.
func (r fuseRun) stop(t *testing.T) {
	t.Helper()
	r.Process.Signal(syscall.SIGTERM)
	if status := r.end(t); status != exitDone {
		t.Fatalf("status %d, %s", status, r.stderr.String())
	}
	if entries, err := os.ReadDir(r.mount); err != nil || len(entries) > 0 {
		t.Errorf("the folder has %v, %v", entries, err)
	}
	mustRun(t, "check", r.cow, "--origin", r.origin)
}

// fixed is a file that can't grow.
type fixed struct{ block.Forward }

func (fixed) CanGrow() bool { return false }
func (f fixed) Grow(size int64) error {
	if size <= f.Size() {
		return nil
	}
	return block.ErrFixedSize
}

// The files are devices as any other.
func TestFuseFilesAreDevices(t *testing.T) {
	r := serveFiles(t, newShortPair(t))
	for _, name := range []string{"disk", "origin"} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				f, err := block.Open(r.file(name), block.Options{Lock: block.LockNone})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { f.Close() })
				return fixed{block.NewForward(f)}
			})
		})
	}
	r.stop(t)
}

// What a file does: sizes, holes, preserved data, refusals; exports that come and go.
func TestFuseFiles(t *testing.T) {
	p := newShortPair(t)
	r := serveFiles(t, p, "--fuse-mode", "0640")
	for _, name := range []string{"disk", "origin"} {
		if info, err := os.Stat(r.file(name)); err != nil || info.Size() != 1<<20 || info.Mode() != 0o640 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	disk, origin := r.open(t, "disk"), r.open(t, "origin")
	if _, err := origin.WriteAt(blocktest.Pattern(100, 1), 5000); err != nil { // not whole sectors
		t.Fatal(err)
	}
	got := make([]byte, 8)
	if _, err := disk.ReadAt(got, 5000); err != nil || string(got) != "origin, " {
		t.Errorf("the snapshot shows %q, %v", got, err)
	}
	if _, err := disk.WriteAt(got, 1<<20-4); err == nil {
		t.Error("a write past the end succeeded")
	}
	if err := disk.Truncate(100); !errors.Is(err, syscall.EPERM) {
		t.Errorf("truncate: %v", err)
	}
	if err := unix.Fallocate(int(disk.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 64<<10, 64<<10); err != nil {
		t.Fatal(err)
	}
	if at, err := unix.Seek(int(disk.Fd()), 0, unix.SEEK_HOLE); err != nil || at != 64<<10 {
		t.Errorf("the hole is at %d, %v", at, err)
	}
	if at, err := unix.Seek(int(disk.Fd()), 64<<10, unix.SEEK_DATA); err != nil || at != 128<<10 {
		t.Errorf("the data behind it is at %d, %v", at, err)
	}
	if _, err := os.Create(r.file("new")); err == nil {
		t.Error("a file was created")
	}

	more := filepath.Join(p.dir, "more.cow")
	mustRun(t, "snapshot", "more", more, "--create", "--control", filepath.Join(p.dir, "c"))
	f := r.open(t, "more")
	if out := mustRun(t, "status", "--control", filepath.Join(p.dir, "c"), "--json"); !strings.Contains(out, `"file": "`+r.file("more")+`"`) {
		t.Error("the status does not name the file:", out)
	}
	mustRun(t, "drop", "more", "--control", filepath.Join(p.dir, "c"))
	if _, err := f.ReadAt(got, 0); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("a dropped export: %v", err)
	}
	if _, err := os.Stat(r.file("more")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dropped export: %v", err)
	}
	r.stop(t) // while files are open
	if _, err := disk.ReadAt(got, 0); err == nil {
		t.Error("a read succeeded after the end")
	}

	r = serveFiles(t, p, "--read-only")
	if _, err := os.OpenFile(r.file("disk"), os.O_WRONLY, 0); !errors.Is(err, syscall.EROFS) && !errors.Is(err, syscall.EACCES) {
		t.Errorf("open for writing: %v", err)
	}
	if info, err := os.Stat(r.file("disk")); err != nil || info.Mode().Perm() != 0o400 {
		t.Errorf("%v, %v", info, err)
	}
	r.stop(t)
}

// A write that lacks space waits until there is some, or its export ends.
func TestFuseWaits(t *testing.T) {
	p := newShortPair(t)
	if err := os.Remove(p.cow); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "create", p.origin, p.cow, "--cow-size", "16KiB")
	r := serveFiles(t, p, "--on-full", "pause")
	disk := r.open(t, "disk")
	write := func(off int64) chan error {
		done := make(chan error, 1)
		go func() {
			_, err := disk.WriteAt(make([]byte, 4096), off)
			done <- err
		}()
		return done
	}
	for off := int64(0); off < 2*4096; off += 4096 { // header, area and two chunks
		if err := <-write(off); err != nil {
			t.Fatal(err)
		}
	}
	waits := func(done chan error) {
		t.Helper()
		select {
		case err := <-done:
			t.Fatalf("a write without space ended: %v", err)
		case <-time.After(300 * time.Millisecond):
		}
	}
	first := write(1 << 19)
	waits(first)
	mustRun(t, "grow", "disk", "20KiB", "--control", filepath.Join(p.dir, "c"))
	if err := <-first; err != nil {
		t.Fatalf("there is space now: %v", err)
	}
	second := write(1 << 18)
	waits(second)
	r.stop(t)
	if err := <-second; !errors.Is(err, syscall.ENODEV) {
		t.Errorf("the write that waited: %v", err)
	}
}

// A server that is killed loses nothing that was made durable, and hangs nobody; the next one finds its mount and removes it.
func TestFuseKilled(t *testing.T) {
	p := newShortPair(t)
	for round := range byte(8) {
		r := serveFiles(t, p)
		disk := r.open(t, "disk")
		want := bytes.Repeat([]byte{'a' + round}, 4096)
		if _, err := disk.WriteAt(want, 4096*int64(round)); err != nil {
			t.Fatal(err)
		}
		if err := disk.Sync(); err != nil {
			t.Fatal(err)
		}
		if _, err := disk.WriteAt(want, 512<<10); err != nil {
			t.Fatal(err)
		}
		r.Process.Kill()
		r.Wait()
		began := time.Now()
		if _, err := disk.ReadAt(want, 0); !errors.Is(err, syscall.ENOTCONN) {
			t.Errorf("after the end: %v", err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("a read took %v", took)
		}
	}
	r := serveFiles(t, p)
	got := make([]byte, 8*4096)
	if _, err := r.open(t, "disk").ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for round := range 8 {
		if b := got[round*4096:][:4096]; bytes.Count(b, []byte{'a' + byte(round)}) != 4096 {
			t.Errorf("round %d: what was synced is lost", round)
		}
	}
	r.stop(t)
}

// A refused serve leaves nothing mounted, and a folder that holds something is not mounted over.
func TestFuseRefused(t *testing.T) {
	p := newShortPair(t)
	full, empty := filepath.Join(p.dir, "full"), filepath.Join(p.dir, "empty")
	for _, dir := range []string{full, empty} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(full, "x"), nil)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--fuse", full}, "not empty"},
		{[]string{"--fuse", filepath.Join(p.dir, "none")}, "no such file"},
		{[]string{"--fuse", empty, "--fuse-mode", "0999"}, "octal"},
		{[]string{"--fuse", empty, "--fuse-owner", "root"}, "UID"},
		{[]string{"--fuse", empty, "more=" + filepath.Join(p.dir, "none.cow")}, "no such file"},
	} {
		if err := mountable(); err != nil && strings.HasPrefix(c.args[len(c.args)-1], "more=") {
			t.Log("SKIPPED: no FUSE file system can be mounted: ", err)
			continue
		}
		o := dmsnap(append([]string{"serve", p.origin, "disk=" + p.cow, "--socket", filepath.Join(p.dir, "s")}, c.args...)...)
		if o.status != exitTrouble || !strings.Contains(o.stderr, c.says) {
			t.Errorf("%q: status %d, %s", c.args, o.status, o.stderr)
		}
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil || strings.Contains(string(mounts), p.dir) {
			t.Errorf("%q: something is mounted, %v", c.args, err)
		}
	}
}
