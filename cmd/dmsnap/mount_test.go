package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
)

// mountable returns why no FUSE file system can be mounted here.
func mountable() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// A mounting is a folder for dmsnap mount, and how its user runs programs.
type mounting struct {
	pair
	files   string
	program string
	user    *syscall.Credential
}

// newMounting skips the test where the user can't mount.
func newMounting(t *testing.T, user *syscall.Credential) mounting {
	t.Helper()
	if err := mountable(); err != nil {
		t.Skip("SKIPPED: no FUSE file system can be mounted: ", err)
	}
	m := mounting{pair: newShortPair(t), program: program(t), user: user}
	m.files = filepath.Join(m.dir, "files")
	if err := os.Mkdir(m.files, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(m.files, unix.MNT_DETACH) }) // what is left of a test that failed
	if user != nil {
		m.program = filepath.Join(m.dir, "dmsnap") // the folder of the other is private
		writeFile(t, m.program, readFile(t, program(t)))
		if err := os.Chmod(m.program, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{m.dir, m.files, m.origin, m.cow} {
			if err := os.Chown(name, int(user.Uid), int(user.Gid)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return m
}

// run runs a program as the user.
func (m mounting) run(t *testing.T, name string, args ...string) (out string, status int) {
	t.Helper()
	c := exec.Command(name, args...)
	c.Dir = m.dir
	c.SysProcAttr = &syscall.SysProcAttr{Credential: m.user}
	b, err := c.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(b), c.ProcessState.ExitCode()
}

// mount mounts in the background. Where that is not possible the test is skipped.
func (m mounting) mount(t *testing.T, more ...string) {
	t.Helper()
	args := append([]string{"mount", "--background", m.origin, "vm=" + m.cow, m.files}, more...)
	out, status := m.run(t, m.program, args...)
	if status != exitDone && strings.Contains(out, "mount "+m.files) {
		t.Skip("SKIPPED: no FUSE file system can be mounted: ", out)
	}
	if want := "vm  file " + filepath.Join(m.files, "vm") + "\n"; status != exitDone || !strings.HasPrefix(out, want) {
		t.Fatalf("status %d, %q; want %q", status, out, want)
	}
}

// umount wants that umount succeeds, that nothing is mounted, and that the store is free and sound.
func (m mounting) umount(t *testing.T, args ...string) {
	t.Helper()
	if out, status := m.run(t, m.program, append([]string{"umount", m.files}, args...)...); status != exitDone || !strings.Contains(out, "unmounted") {
		t.Fatalf("status %d, %s", status, out)
	}
	if entries, err := os.ReadDir(m.files); err != nil || len(entries) > 0 {
		t.Errorf("the folder has %v, %v", entries, err)
	}
}

// wantShown wants a text at a place of the snapshot.
func (m mounting) wantShown(t *testing.T, text string, off int) {
	t.Helper()
	mustRun(t, "check", m.cow, "--origin", m.origin) // which needs it for itself
	image := filepath.Join(t.TempDir(), "image")
	mustRun(t, "export", m.origin, m.cow, image)
	if b := readFile(t, image); string(b[off:][:len(text)]) != text {
		t.Errorf("the snapshot has %q at %d, want %q", b[off:][:len(text)], off, text)
	}
}

// Mounted, written without an fsync, unmounted in each way there is: everything is there, and the process is gone.
func TestMountAndUmount(t *testing.T) {
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	for name, c := range map[string]struct {
		user   *syscall.Credential
		umount func(t *testing.T, m mounting)
	}{
		"umount":       {nil, func(t *testing.T, m mounting) { m.umount(t) }},
		"json":         {nil, func(t *testing.T, m mounting) { m.umount(t, "--json") }},
		"unprivileged": {nobody, func(t *testing.T, m mounting) { m.umount(t) }},
	} {
		t.Run(name, func(t *testing.T) {
			if c.user != nil && os.Geteuid() != 0 {
				t.Skip("SKIPPED: another user needs root")
			}
			if _, err := exec.LookPath("fusermount3"); c.user != nil && err != nil {
				t.Skip("SKIPPED: no fusermount3 (Debian's package fuse3)")
			}
			m := newMounting(t, c.user)
			m.mount(t)
			if out, status := m.run(t, "sh", "-ec", `printf written | dd of=files/vm bs=512 seek=10 conv=notrunc 2>/dev/null; stat -c "%s %a" files/vm`); status != 0 || out != "1048576 600\n" {
				t.Errorf("status %d, %s", status, out)
			}
			c.umount(t, m)
			m.wantShown(t, "written", 5120)
		})
	}
}

// What umount refuses, and does with a folder in use; a mount that a killed process left; umount(8).
func TestUmountOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: it makes a mount that is not dmsnap's, as root")
	}
	m := newMounting(t, nil)
	refused := func(says string, args ...string) {
		t.Helper()
		if o := dmsnap(args...); o.status != exitTrouble || !strings.Contains(o.stderr, says) {
			t.Errorf("%q: status %d, %s; want %q", args, o.status, o.stderr, says)
		}
	}
	refused("no mount of dmsnap", "umount", m.files)
	refused("no mount of dmsnap", "umount", "/proc")
	refused("no such file", "umount", filepath.Join(m.dir, "none"))
	refused("no such file", "mount", "--read-only", m.origin, filepath.Join(m.dir, "none"), m.files)
	if out, status := m.run(t, m.program, "mount", "--background", m.origin, filepath.Join(m.dir, "none"), m.files); status != exitTrouble || !strings.HasPrefix(out, "dmsnap: open ") || strings.Count(out, "\n") != 1 {
		t.Errorf("status %d, %s", status, out)
	}

	m.mount(t)
	f, err := os.OpenFile(filepath.Join(m.files, "vm"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	refused("in use", "umount", m.files)
	m.umount(t, "--lazy")
	if _, err := f.WriteAt([]byte("last"), 0); err != nil { // it is still a file
		t.Error(err)
	}
	f.Close()
	p := launchMount(t, m) // waits for the lock of the last one
	p.Process.Kill()
	p.Wait()
	m.umount(t) // what it left
	m.wantShown(t, "last", 0)

	p = launchMount(t, m)
	if err := os.WriteFile(filepath.Join(m.files, "vm"), []byte("by umount(8)"), 0); err != nil && !errors.Is(err, syscall.EPERM) {
		t.Error(err)
	}
	if err := unix.Unmount(m.files, 0); err != nil {
		t.Fatal(err)
	}
	if status := p.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, p.stderr.String())
	}
	m.wantShown(t, "last", 0)
}

// launchMount runs dmsnap mount in the foreground, again until the store is free.
func launchMount(t *testing.T, m mounting) *process {
	t.Helper()
	for {
		p := launch(t, "mount", m.origin, "vm="+m.cow, m.files)
		if line, err := p.stdout.ReadString('\n'); err == nil {
			if !strings.HasPrefix(line, "vm  file ") {
				t.Fatal(line)
			}
			return p
		}
		if p.end(t); !strings.Contains(p.stderr.String(), "in use") && !strings.Contains(p.stderr.String(), "lock") {
			t.Fatal(p.stderr.String())
		}
	}
}

// With --fuse-cache, what another transport and a live merge change is seen by the next read.
func TestFuseCache(t *testing.T) {
	p := newShortPair(t)
	r := serveFiles(t, p, "--fuse-cache")
	disk, origin := r.open(t, "disk"), r.open(t, "origin")
	want := func(f *os.File, text string, off int64) {
		t.Helper()
		got := make([]byte, len(text))
		if _, err := f.ReadAt(got, off); err != nil || string(got) != text {
			t.Errorf("%s at %d: %q, %v; want %q", f.Name(), off, got, err, text)
		}
	}
	want(disk, "origin, ", 0)
	want(origin, "origin, ", 0)
	over := func(export string) (write func(text string, off int64)) {
		c, err := nbd.Dial(t.Context(), "nbd+unix:///"+export+"?socket="+filepath.Join(p.dir, "s"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return func(text string, off int64) {
			t.Helper()
			if _, err := c.WriteAt([]byte(text), off); err != nil {
				t.Fatal(err)
			}
		}
	}
	toDisk, toOrigin := over("disk"), over("origin")
	toDisk("changed ", 0)
	want(disk, "changed ", 0)
	want(origin, "origin, ", 0)
	toOrigin("preserve", 4096)
	want(origin, "preserve", 4096)
	want(disk, "origin, ", 4096)

	// Its own writes go through, and fsync holds for what mmap changed.
	if _, err := disk.WriteAt(blocktest.Pattern(8192, 1), 8192); err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(disk.Fd()), 32<<10, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	copy(b, "mapped")
	if err := disk.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Munmap(b); err != nil {
		t.Fatal(err)
	}

	// A merge: the origin shows the snapshot at once, and both are one disk then.
	want(origin, "origin, ", 8192)
	mustRun(t, "merge", "disk", "--wait", "--control", filepath.Join(p.dir, "c"))
	want(origin, "changed ", 0)
	want(origin, string(blocktest.Pattern(8192, 1)), 8192)
	want(origin, "mapped", 32<<10)
	want(disk, "origin, ", 4096)
	toDisk("both", 64<<10)
	want(disk, "both", 64<<10)
	for got := make([]byte, 4); string(got) != "both"; { // the write did not wait for this file
		if _, err := origin.ReadAt(got, 64<<10); err != nil {
			t.Fatal(err)
		}
	}
	r.stop(t)
	if b := readFile(t, p.origin); !bytes.Equal(b[8192:][:8192], blocktest.Pattern(8192, 1)) || string(b[64<<10:][:4]) != "both" || string(b[32<<10:][:6]) != "mapped" {
		t.Error("the disk has not what was written")
	}
}
