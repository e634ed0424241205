package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/internal/testhost"
)

// TestDevicesPage runs the commands of docs/devices.md that need neither a virtual machine nor a kernel module.
func TestDevicesPage(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	testhost.Mount(t, "none", "tmpfs", "size=1m") // skips the test where it may not mount
	if err := mountable(); err != nil {
		t.Skip("SKIPPED: no FUSE file system can be mounted: ", err)
	}
	for _, tool := range []string{"mkfs.ext4", "e2fsck", "unshare", "losetup"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("SKIPPED: ", err)
		}
	}
	dir := testhost.ShortDir(t)
	if err := os.Symlink(program(t), filepath.Join(dir, "dmsnap")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // what is left of a page that failed
		for _, name := range []string{"mnt", "files"} {
			unix.Unmount(filepath.Join(dir, name), unix.MNT_DETACH)
		}
	})
	runPage(t, "../../docs/devices.md", dir, 13)
}
