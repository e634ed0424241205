package fleet

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
)

// realBytes is what the files of some layers use, by the file system, and how much of that is not for maps of files.
func (f *testFleet) realBytes(of func(*layerRecord) bool) (all, data int64) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.state.Layers {
		if of(r) {
			path := f.layers[r.ID].path
			n := allocatedBytes(path)
			all += n
			data += n - mapBytes(f.t, path, n)
		}
	}
	return all, data
}

// mapBytes is how many of the used bytes of a file are for the map of a fragmented file, which a file system keeps outside
// of the inode: ext4 from the fifth extent on, in blocks of some 340 extents.
func mapBytes(t testing.TB, path string, used int64) int64 {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const most = 500
	var m struct { // struct fiemap of linux/fiemap.h
		start, length                  uint64
		flags, mapped, count, reserved uint32
		extents                        [most]struct {
			logical, physical, length uint64
			_                         [2]uint64
			flags                     uint32
			_                         [3]uint32
		}
	}
	const fsIocFiemap = 0xc020660b
	m.length, m.count = 1<<62, most
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		return 0 // no such file system, as tmpfs
	}
	if m.mapped == most {
		t.Fatalf("%s has more than %d extents", path, most)
	}
	for _, e := range m.extents[:m.mapped] {
		used -= int64(e.length)
	}
	return max(used, 0)
}

// TestMapOfFragmentedFile shows what quotas allow for: ext4 counts a block for the map of a file of five extents, and another one
// when that is full.
func TestMapOfFragmentedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &fs); err != nil || fs.Type != unix.EXT4_SUPER_MAGIC {
		t.Skip("not on ext4")
	}
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	write := func(from, to int64) int64 { // every second block
		for i := from; i < to; i++ {
			if _, err := file.WriteAt(make([]byte, 4096), i*8192); err != nil {
				t.Fatal(err)
			}
		}
		if err := file.Sync(); err != nil {
			t.Fatal(err)
		}
		return mapBytes(t, path, allocatedBytes(path))
	}
	if four, five, many := write(0, 4), write(4, 5), write(5, 400); four != 0 || five != 4096 || many != 8192 {
		t.Errorf("maps of 4, 5 and 400 extents use %d, %d and %d bytes", four, five, many)
	}
}

// wantCounted checks the account of a disk against the file system.
func (f *testFleet) wantCounted(disk string) {
	f.t.Helper()
	real, data := f.realBytes(func(r *layerRecord) bool { return r.Disk == disk })
	f.accounts.mu.Lock()
	defer f.accounts.mu.Unlock()
	// Writing data out may fragment a file: a part of an extent that was only reserved becomes one of its own.
	if got := f.disks[disk].account.used; got < data || got > real {
		f.t.Errorf("%d bytes of disk %s are counted, %d are used, %d without maps", got, disk, real, data)
	}
}

// fillChunks writes to chunk after chunk from one on, until there is no space or count are written, and returns how many were.
func fillChunks(t *testing.T, dev block.Device, from, count int64) int64 {
	t.Helper()
	for n := range count {
		if _, err := dev.WriteAt(bytes.Repeat([]byte{byte(from + n), 1}, 2048), (from+n)*4096); errors.Is(err, syscall.ENOSPC) {
			return n
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return count
}

// A node's quota counts its top and the layers that only it needs, at the moment of each write, through forks, checkpoints,
// drops and a restart.
func TestNodeQuota(t *testing.T) {
	f := newFleet(t, Options{})
	const quota = 256 << 10
	limit := func() { f.SetSpace("golden", Space{Node: quota}) }
	limit()
	f.fork("golden", "vm")
	node := func() block.Device { return f.nodes["vm"].dev }
	own := func(name string) (all, data int64) {
		return f.realBytes(func(r *layerRecord) bool { return r.Node == name })
	}
	fillChunks(t, node(), 0, 20)
	f.checkpoint("a", "vm")
	n := fillChunks(t, node(), 20, 100)
	if used, data := own("vm"); n == 100 || data > quota || used < quota*3/4 {
		t.Fatalf("%d chunks written over a checkpoint, %d bytes in use, %d without maps, of %d", n, used, data, quota)
	}
	next := 20 + n
	if fillChunks(t, node(), 20, 1) != 1 {
		t.Error("a chunk of the top can't be written")
	}
	below := fillChunks(t, node(), 0, 1)
	if _, data := own("vm"); below == 1 && data > quota {
		t.Error("a chunk of the checkpoint, which needs a new one, was written")
	}
	f.wantCounted("golden")
	f.restart()
	limit()
	f.wantCounted("golden")
	if fillChunks(t, node(), next, 100) > 2 { // what was reserved for a step may be used now
		t.Error("chunks after a restart")
	}
	f.fork("vm@a", "other") // the checkpoint is not vm's own any more
	n = fillChunks(t, node(), next, 100)
	if n < 10 || n == 100 {
		t.Errorf("%d chunks after the checkpoint is shared", n)
	}
	next += n
	if err := f.Drop(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	if n := fillChunks(t, node(), next, 100); n > 0 {
		t.Errorf("%d chunks after the checkpoint is its own again", n)
	}
	used, _ := own("vm")
	f.SetSpace("golden", Space{Node: quota, Grow: 64 << 10, Disk: used + 128<<10})
	if n := fillChunks(t, node(), next, 100); n < 16 || n > 48 {
		t.Errorf("%d chunks in a quota that grows", n)
	}
	f.wantCounted("golden")
	f.SetSpace("golden", Space{})
	if n := fillChunks(t, node(), 0, 200); n != 200 {
		t.Errorf("%d chunks without a quota", n)
	}
}

// A disk's quota is for all its layers together, preserve layers included; what a squash copies is counted and not refused.
func TestDiskQuota(t *testing.T) {
	f := newFleet(t, Options{})
	if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "base", Source: copyOf(t, f.golden), Raw: true, Writable: true}); err != nil {
		t.Fatal(err)
	}
	const quota = 1 << 20
	f.SetSpace("base", Space{Disk: quota})
	for i := range 3 {
		f.fork("base", fmt.Sprint("n", i))
	}
	total := int64(0)
	for i := range 3 {
		total += fillChunks(t, f.nodes[fmt.Sprint("n", i)].dev, 0, 100)
	}
	used, data := f.realBytes(func(r *layerRecord) bool { return r.Disk == "base" })
	if total == 300 || data > quota || used < quota*3/4 {
		t.Errorf("%d chunks, %d bytes in use, %d without maps, of %d", total, used, data, quota)
	}
	if _, err := f.disks["base"].origin.WriteAt(make([]byte, 512<<10), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a write to the disk that must be preserved: %v", err)
	}
	f.wantCounted("base")
	f.SetSpace("base", Space{Disk: quota, Pause: true})
	_, err := f.nodes["n2"].dev.WriteAt(make([]byte, 4096), 200*4096)
	changed := block.CanRetry(err)
	if changed == nil || !strings.Contains(fmt.Sprint(err), "quota is 1 MiB") {
		t.Fatalf("a write that is to wait: %v", err)
	}
	if err := f.Drop(t.Context(), "n0"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	case <-time.After(time.Minute):
		t.Error("a write that waits is not notified that a node was dropped")
	}
	f.wantCounted("base")
	f.SetSpace("base", Space{Disk: 1})
	f.checkpoint("a", "n1")
	f.wantCounted("base")
	f.mu.Lock()
	r := f.state.Layers[f.state.titles["n1@a"]]
	f.mu.Unlock()
	if r == nil || f.nodes["n1"].dev.view.Load().top.disk.account.used <= 1 {
		t.Error("no checkpoint beyond the quota")
	}
	if err := f.Forget(t.Context(), "n1@a"); err != nil {
		t.Fatal(err)
	}
	f.SetSpace("base", Space{})
	fillChunks(t, f.nodes["n1"].dev, 150, 1)
	f.SetSpace("base", Space{Disk: 1})
	if _, err := f.Squash(t.Context(), api.SquashRequest{Node: "n1"}); err != nil {
		t.Errorf("squash beyond the quota: %v", err)
	}
	f.wantCounted("base")
}

// A chunk that was trimmed has given its space back, for others too, and needs some to be written again.
func TestQuotaOfTrimmedChunks(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	f.SetSpace("golden", Space{Node: 512 << 10})
	dev := f.nodes["vm"].dev
	n := fillChunks(t, dev, 0, 200)
	if err := dev.Discard(0, 64*4096); err != nil {
		t.Fatal(err)
	}
	f.wantCounted("golden")
	more := fillChunks(t, dev, n, 200-n)
	if more < 32 || more > 64 {
		t.Errorf("%d new chunks after 64 were trimmed", more)
	}
	if again := fillChunks(t, dev, 0, 64); again > 64-more+16 {
		t.Errorf("%d trimmed chunks written again after %d new ones", again, more)
	}
	if _, used := f.realBytes(func(r *layerRecord) bool { return r.Node == "vm" }); used > 512<<10 {
		t.Errorf("%d bytes in use", used)
	}
	if fillChunks(t, dev, 64, n-64) != n-64 {
		t.Error("chunks that were not trimmed can't be written")
	}
	if err := dev.Flush(); err != nil {
		t.Error(err)
	}
	f.wantCounted("golden")
}

// Many nodes that write at once use no more than the quota.
func TestQuotaConcurrently(t *testing.T) {
	f := newFleet(t, Options{})
	const quota = 2 << 20
	f.SetSpace("golden", Space{Disk: quota})
	for i := range 8 {
		f.fork("golden", fmt.Sprint("n", i))
	}
	var all sync.WaitGroup
	for i := range 8 {
		dev := f.nodes[fmt.Sprint("n", i)].dev
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for range 500 {
				off := r.Int64N(testSize/4096) * 4096
				if r.IntN(20) == 0 {
					if err := dev.Discard(off, 16384); err != nil && !errors.As(err, new(*block.RangeError)) {
						t.Error(err)
					}
				} else if _, err := dev.WriteAt(make([]byte, 4096), off); err != nil && !errors.Is(err, syscall.ENOSPC) {
					t.Error(err)
				}
			}
		})
	}
	for i := range 20 {
		if _, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{fmt.Sprint("n", i%8)}, Name: fmt.Sprint("c", i)}); err != nil {
			t.Error(err)
		}
	}
	all.Wait()
	if _, used := f.realBytes(func(*layerRecord) bool { return true }); used > quota+20*8192 { // the first blocks of layers
		t.Errorf("%d bytes in use, the quota is %d", used, quota)
	}
	f.wantCounted("golden")
}

// A layer's device passes on what its file can do, with a limit and without.
func TestLayerDevice(t *testing.T) {
	for _, limit := range []int64{0, 1 << 40} {
		f := newFleet(t, Options{})
		f.SetSpace("golden", Space{Disk: limit})
		n := 0
		blocktest.Run(t, func(t *testing.T) block.Device {
			n++
			l := &layer{id: uint64(n), path: filepath.Join(t.TempDir(), "x"), disk: f.disks["golden"]}
			file, err := block.Create(l.path, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { file.Close() })
			l.file = file
			return f.newDevice(l, file, ondisk.Layout{ChunkSectors: 8}, true)
		})
	}
}

func copyOf(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(filepath.Dir(path), "copy.img")
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}
