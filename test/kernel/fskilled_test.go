package kernel_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// TestFileSystemKilled kills `dmsnap serve` under file systems that the kernel has mounted, one on the
// origin and one on a snapshot of it, while files are written and made durable on both. A new server takes
// over each time, the journals are replayed, and then every file that was made durable must be there, the
// file systems sound, and a second snapshot, to which nobody writes, what it was in the beginning. Every
// fourth time the first snapshot is being merged when the server is killed.
func TestFileSystemKilled(t *testing.T) {
	for _, fs := range []fileSystem{
		{"ext4", "mkfs.ext4 -q -F", "e2fsck -fn", "-t ext4"},
		{"xfs", "mkfs.xfs -q -f", "xfs_repair -n", "-t xfs -o nouuid"},
	} {
		t.Run(fs.name, func(t *testing.T) {
			needFileSystem(t, fs)
			newKilledFS(t, fs).rounds(rounds(t))
		})
	}
}

// needFileSystem skips the test with SKIPPED where a file system can't be made or served to the kernel.
func needFileSystem(t *testing.T, fs fileSystem) {
	t.Helper()
	need(t)
	for _, tool := range []string{"nbd-client", strings.Fields(fs.make)[0], strings.Fields(fs.check)[0]} {
		found := false
		for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/bin/"} {
			_, err := os.Stat(dir + tool)
			found = found || err == nil
		}
		if !found {
			t.Skipf("SKIPPED: no %s here (Debian's packages nbd-client, e2fsprogs, xfsprogs)", tool)
		}
	}
}

// A killedFS is a guest in which file systems lose their server.
type killedFS struct {
	t       *testing.T
	k       *kernel
	fs      fileSystem
	random  *rand.Rand
	server  int64  // its process
	frozen  string // digest of the snapshot that nobody writes to
	merging bool   // the first snapshot was being merged, and may be half merged
	cut     int    // merges that were
	kills   int
	found   []string // the last words of verifications
}

// An export, the kernel's device for it, and where it is mounted.
type nbdMount struct{ export, device, folder string }

var killedMounts = []nbdMount{{"snap", "/dev/nbd0", "/run/snap"}, {"origin", "/dev/nbd1", "/run/origin"}}

func newKilledFS(t *testing.T, fs fileSystem) *killedFS {
	x := &killedFS{t: t, k: newKernelOf(t, boot(t)), fs: fs, random: rand.New(rand.NewPCG(uint64(len(fs.name)), 0x6673))}
	for _, name := range []string{"dmsnap", "files"} {
		program, err := os.ReadFile(filepath.Join(binaries, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(x.k.m.Share(), name), program, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	size := "96M"
	if fs.name == "xfs" {
		size = "320M" // mkfs.xfs makes none below 300
	}
	x.k.sh("cd /run && cp /mnt/dmsnap /mnt/files . && mkdir snap origin && touch snap.log origin.log")
	x.k.sh("cd /run && truncate -s " + size + " disk.img && " + fs.make + " disk.img")
	x.k.sh("cd /run && ./dmsnap create disk.img snap.cow && ./dmsnap create disk.img frozen.cow --chunk-size 16KiB")
	x.frozen = x.frozenDigest()
	return x
}

// frozenDigest is the digest of the snapshot that is not written to. No server runs.
func (x *killedFS) frozenDigest() string {
	x.t.Helper()
	return x.k.sh("cd /run && ./dmsnap export disk.img frozen.cow - | sha256sum")
}

func (x *killedFS) rounds(n int) {
	x.t.Helper()
	for round := range n {
		x.serve(round)
		if x.merging {
			x.finishMerge()
			x.serve(round)
		}
		x.verify(killedMounts)
		x.loadAndKill(round)
		x.lookAtStores()
	}
	x.serve(n)
	if x.merging {
		x.finishMerge()
	} else {
		x.verify(killedMounts)
		x.stop()
	}
	x.t.Logf("%s: %d kills, %d of them in a merge that was left half done; last found: %s", x.fs.name, x.kills, x.cut, strings.Join(x.found, "; "))
	if c := x.k.m.Complaints(); len(c) > 0 {
		x.t.Errorf("the kernel complains: %v", c)
	}
}

// serve starts a server and connects the kernel to it.
func (x *killedFS) serve(round int) {
	x.t.Helper()
	x.server = x.k.spawn(x.k.m.Name("server"), "/run/dmsnap", "serve", "/run/disk.img", "/run/snap.cow", "/run/frozen.cow", "--export-origin",
		"--socket", "/run/nbd.sock", "--control", "/run/control.sock", "--sync", []string{"flush", "always"}[round/2%2])
	// The sockets of the one before it may still be there, with nobody behind them.
	ready := "for i in $(seq 500); do /run/dmsnap status --control /run/control.sock >/dev/null 2>&1 && break; sleep 0.02; done"
	for _, m := range killedMounts {
		ready += fmt.Sprintf(" && nbd-client -unix /run/nbd.sock %s -N %s -timeout 60 >/dev/null", m.device, m.export)
	}
	x.k.sh(ready)
}

// disconnect ends the kernel's connections. What is still mounted fails.
func (x *killedFS) disconnect() {
	x.t.Helper()
	x.k.sh("nbd-client -d /dev/nbd0 >/dev/null; nbd-client -d /dev/nbd1 >/dev/null; true")
}

// stop ends the server in good order.
func (x *killedFS) stop() {
	x.t.Helper()
	x.disconnect()
	x.k.sh(fmt.Sprintf("kill -TERM %d", x.server))
	x.k.reap(x.server)
}

// verify mounts file systems, which replays their journals, asks for every file, and checks them.
func (x *killedFS) verify(mounts []nbdMount) {
	x.t.Helper()
	x.found = nil
	for _, m := range mounts {
		x.k.sh(fmt.Sprintf("mount %s %s %s", x.fs.mount, m.device, m.folder))
		x.found = append(x.found, m.export+" "+strings.TrimSpace(x.k.sh(fmt.Sprintf("/run/files verify %s %s.log", m.folder, m.folder))))
		x.k.sh(fmt.Sprintf("umount %s && %s %s", m.folder, x.fs.check, m.device))
	}
}

// loadAndKill has files written until the server is killed, on the origin and the snapshot, or on a snapshot
// that is being merged: then the origin becomes what the snapshot is, and is nobody else's.
func (x *killedFS) loadAndKill(round int) {
	x.t.Helper()
	x.merging = round%4 == 1
	mounts := killedMounts
	if x.merging {
		mounts = mounts[:1]
	}
	var writers []int64
	for _, m := range mounts {
		x.k.sh(fmt.Sprintf("mount %s %s %s", x.fs.mount, m.device, m.folder))
		writers = append(writers, x.k.spawn(x.k.m.Name("files"), "/run/files", "write", m.folder, m.folder+".log", fmt.Sprint(round), m.device))
	}
	pause := 50 + x.random.Int64N(600)
	if x.merging {
		x.k.must(job.Op{Do: job.Sleep, N: pause})
		x.k.sh("/run/dmsnap merge --control /run/control.sock snap")
		pause = x.random.Int64N(40)
	}
	x.k.do(job.Op{Do: job.Sleep, N: pause}, job.Op{Do: job.Kill, N: x.server})
	x.kills++
	tally.add(func(c *counts) { c.kills++ })
	x.disconnect() // or what is under way waits for its time to run out
	for _, w := range writers {
		x.k.reap(w) // it ends when its file system fails
	}
	for _, m := range mounts {
		x.k.sh("umount " + m.folder)
	}
}

// lookAtStores looks at what the killed server left.
func (x *killedFS) lookAtStores() {
	x.t.Helper()
	x.k.sh("cd /run && ./dmsnap check snap.cow --origin disk.img && ./dmsnap check frozen.cow --origin disk.img")
	if got := x.frozenDigest(); got != x.frozen {
		x.t.Fatalf("after kill %d the snapshot that nobody wrote to has changed", x.kills)
	}
	if x.merging && !strings.Contains(x.k.sh("/run/dmsnap status --json /run/snap.cow"), `"exceptions": 0,`) {
		x.cut++
	}
}

// finishMerge ends a merge that a kill cut short. The origin is then the snapshot's file system, with all
// its files, and gets a new snapshot.
func (x *killedFS) finishMerge() {
	x.t.Helper()
	x.verify(killedMounts[:1]) // while it is half done
	x.k.sh("/run/dmsnap merge --control /run/control.sock snap --wait")
	x.k.sh("cp /run/snap.log /run/origin.log")
	x.verify(killedMounts[1:])
	x.stop()
	x.k.sh("cd /run && ./dmsnap create disk.img snap.cow --force")
	x.merging = false
}
