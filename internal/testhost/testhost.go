// Package testhost gives tests loop devices and mounts of the host they run on, and directories whose paths are short
// enough for sockets, and takes them away again.
//
// Loop devices and mounts change the state of the host outside the test's own files, so they are for those who ask: without
// DMSNAP_TEST_HOST=1 in the environment, without root, or where the host has no such thing, the test is skipped.
// No test opens a device of the host that it did not set up itself.
package testhost

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// variable is the environment variable by which loop devices and mounts are asked for.
const variable = "DMSNAP_TEST_HOST"

// need skips the test unless it may change the host.
func need(t testing.TB, what string) {
	t.Helper()
	switch {
	case os.Getenv(variable) != "1":
		t.Skipf("SKIPPED: %s needs %s=1", what, variable)
	case os.Geteuid() != 0:
		t.Skipf("SKIPPED: %s needs root", what)
	}
}

// Loop attaches a loop device to a file and returns its path. sectorSize is its logical block size in bytes. The
// device is detached when the test ends.
func Loop(t testing.TB, file string, sectorSize int) string {
	t.Helper()
	need(t, "a loop device")
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", fmt.Sprint(sectorSize), file).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: no loop device: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	return dev
}

// Mount mounts source on a new directory and returns the directory. options are those of mount(2), such as "size=16m"
// of a tmpfs. It is unmounted when the test ends, also while files in it are open.
func Mount(t testing.TB, source, fsType, options string) string {
	t.Helper()
	need(t, "a mount")
	dir := t.TempDir()
	if err := syscall.Mount(source, dir, fsType, 0, options); err != nil {
		t.Skipf("SKIPPED: no mount of %s: %v", fsType, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}
