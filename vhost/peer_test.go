package vhost_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
)

// TestPeer has the tests' front-end use qemu-storage-daemon's export, so that it is no front-end for our back-end alone.
func TestPeer(t *testing.T) {
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		t.Skip("SKIPPED: no qemu-storage-daemon (Debian's package qemu-system-common)")
	}
	blocktest.Run(t, func(t *testing.T) block.Device {
		dir := testhost.ShortDir(t)
		image, socket := filepath.Join(dir, "image"), filepath.Join(dir, "s")
		if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		daemon := exec.Command("qemu-storage-daemon", "--blockdev", "driver=file,filename="+image+",node-name=disk,discard=unmap",
			"--export", "type=vhost-user-blk,id=x,node-name=disk,writable=on,addr.type=unix,addr.path="+socket)
		daemon.Stderr = os.Stderr
		if err := daemon.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			daemon.Process.Kill()
			daemon.Wait()
		})
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			c, err := net.Dial("unix", socket)
			if err == nil {
				c.Close()
				break
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
		return connect(t, socket)
	})
}
