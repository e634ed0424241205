package block_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
)

// backing makes a file with noise for a loop device.
func backing(t *testing.T, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, blocktest.Pattern(size, 1), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBlockSpecialFile(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			dev := testhost.Loop(t, backing(t, 320<<10), sector)
			f := open(t, dev, block.Options{})
			if f.Size() != 320<<10 || f.BlockSize() != sector {
				t.Errorf("size %d, logical block size %d", f.Size(), f.BlockSize())
			}
			list, err := f.Extents(512, 4096)
			if err != nil || len(list) != 1 || list[0] != (block.Extent{Length: 4096}) {
				t.Errorf("extents %v, %v", list, err)
			}
			if err := block.Zero(f, 0, 65536, block.OnlyFast|block.KeepAllocated); !errors.Is(err, block.ErrNotFast) {
				t.Errorf("zero that may not write: %v", err)
			}
			f.Close()
			blocktest.Run(t, func(t *testing.T) block.Device { return open(t, dev, block.Options{}) })
			t.Run("read-only", func(t *testing.T) {
				blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return open(t, dev, block.Options{ReadOnly: true}) })
			})
		})
	}
}

// A device grows while it is open, as a logical volume does, and two special files are one device.
func TestBlockSpecialFileChanges(t *testing.T) {
	path := backing(t, 320<<10)
	dev := testhost.Loop(t, path, 512)
	f := open(t, dev, block.Options{})
	if err := os.Truncate(path, 640<<10); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("losetup", "--set-capacity", dev).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if f.Size() != 320<<10 {
		t.Error("the size changed without Refresh")
	}
	if n, err := block.Refresh(f); n != 640<<10 || err != nil {
		t.Errorf("refresh: %d, %v", n, err)
	}
	if err := f.Grow(641 << 10); err == nil || !strings.Contains(err.Error(), dev) {
		t.Errorf("grow of a block device: %v", err)
	}

	var st syscall.Stat_t
	if err := syscall.Stat(dev, &st); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(t.TempDir(), "node")
	if err := syscall.Mknod(node, syscall.S_IFBLK|0o600, int(st.Rdev)); err != nil {
		t.Skipf("SKIPPED: a second special file: %v", err)
	}
	again, err := block.Open(node, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		t.Skipf("SKIPPED: a second special file: %v", err)
	}
	defer again.Close()
	if !block.Same(f, again) {
		t.Errorf("%s is not %s", again.Identity(), f.Identity())
	}
	// The locks are those of another inode, but the kernel knows that the device is taken.
	if _, err := block.Open(node, block.Options{}); !errors.Is(err, block.ErrInUse) {
		t.Errorf("a second writer by another special file: %v", err)
	}
}

// Flush reports what a disk failed to write: the kernel once, File always.
func TestFlushOfABrokenDisk(t *testing.T) {
	dir := testhost.Mount(t, "tmpfs", "tmpfs", "size=256k")
	path := filepath.Join(dir, "backing")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	f := open(t, testhost.Loop(t, path, 512), block.Options{})
	if _, err := f.WriteAt(blocktest.Pattern(1<<20, 2), 0); err != nil {
		t.Fatal(err)
	}
	lost := f.Flush()
	if !errors.Is(lost, syscall.EIO) && !errors.Is(lost, syscall.ENOSPC) {
		t.Fatalf("flush of more than the disk can hold: %v", lost)
	}
	if err := f.Flush(); err != lost {
		t.Errorf("the second flush: %v, the first: %v", err, lost)
	}
	if err := f.WriteDurableAt(make([]byte, 512), 0); err != lost {
		t.Errorf("a durable write: %v, the first flush: %v", err, lost)
	}
}

func TestMountedDeviceIsInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "backing")
	create(t, path, 4<<20).Close()
	if out, err := exec.Command("mkfs.ext4", "-q", path).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: no file system to mount: %v: %s", err, out)
	}
	dev := testhost.Loop(t, path, 512)
	testhost.Mount(t, dev, "ext4", "")
	if _, err := block.Open(dev, block.Options{}); !errors.Is(err, block.ErrInUse) || !strings.Contains(err.Error(), dev) {
		t.Errorf("open of a mounted device for writing: %v", err)
	}
	f, err := block.Open(dev, block.Options{ReadOnly: true})
	if err != nil {
		t.Errorf("open of a mounted device for reading: %v", err)
	} else {
		f.Close()
	}
}
