package kernel_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/test/kernel/job"
	"github.com/dmsnap/dmsnap/test/kernel/machine"
)

// busy is a load for a file system: trees unpacked and deleted, and small writes that each are made
// durable, until /run/stop is there. What it unpacks last stays.
const busy = `
set -e
cd $1
i=0
while [ ! -e /run/stop ]; do
	rm -rf tree; mkdir tree
	tar xf /run/tree.tar -C tree
	dd if=/dev/urandom of=log bs=4k count=20 oflag=dsync conv=notrunc 2>/dev/null
	rm -rf old
	mv tree old
	i=$((i+1)); echo $i > rounds
done
sync -f .
`

// fileSystem is how one is made and checked. A check is read-only and fails for anything that is not
// right: the journal was replayed by a mount before.
type fileSystem struct{ name, make, check, mount string }

// TestKernelNBD runs dmsnap inside the guest with the kernel's own nbd client: a file system on the
// origin, a snapshot taken while it is busy, which must be sound, and a live merge while the snapshot's
// file system is busy.
func TestKernelNBD(t *testing.T) {
	for _, fs := range []fileSystem{
		{"ext4", "mkfs.ext4 -q -F", "e2fsck -fn", "-t ext4"},
		{"xfs", "mkfs.xfs -q -f", "xfs_repair -n", "-t xfs -o nouuid"},
	} {
		t.Run(fs.name, func(t *testing.T) {
			need(t)
			for _, tool := range []string{"nbd-client", strings.Fields(fs.make)[0]} {
				if _, err := exec.LookPath(tool); err != nil {
					t.Skipf("SKIPPED: no %s here (Debian's packages nbd-client, e2fsprogs, xfsprogs)", tool)
				}
			}
			kernelNBD(t, fs)
		})
	}
}

func kernelNBD(t *testing.T, fs fileSystem) {
	m := boot(t)
	k := newKernelOf(t, m)
	putProgram(t, m)
	k.sh("truncate -s 320M /run/disk.img && mkdir -p /run/a /run/b && tar cf /run/tree.tar -C /usr/share zoneinfo/Europe zoneinfo/Asia 2>/dev/null || tar cf /run/tree.tar -C /etc .")
	server := k.spawn("server.log", "/mnt/dmsnap", "serve", "/run/disk.img", "first=/run/first.cow", "--create", "--export-origin",
		"--socket", "/run/nbd.sock", "--control", "/run/control.sock")
	k.must(job.Op{Do: job.Until, Argv: []string{"ls", "/run"}, Stdin: "nbd.sock"})
	connect := func(device, export string) {
		t.Helper()
		k.sh(fmt.Sprintf("nbd-client -unix /run/nbd.sock %s -N %s -timeout 60", device, export))
	}

	// A busy file system on the origin.
	connect("/dev/nbd0", "origin")
	k.sh(fmt.Sprintf("%s /dev/nbd0 && mount %s /dev/nbd0 /run/a && echo kept > /run/a/marker && sync -f /run/a", fs.make, fs.mount))
	load := k.spawn("load-a.log", "/bin/sh", "-c", busy, "busy", "/run/a")
	k.must(job.Op{Do: job.Until, Argv: []string{"/bin/sh", "-c", "cat /run/a/rounds 2>/dev/null || true"}, Stdin: "\n", Seconds: 120})

	// A snapshot of it as it is.
	k.sh("/mnt/dmsnap snapshot --control /run/control.sock second /run/second.cow --create")
	connect("/dev/nbd1", "second")
	k.sh(fmt.Sprintf("mount %s /dev/nbd1 /run/b && cat /run/b/marker && umount /run/b", fs.mount))
	k.sh(fs.check + " /dev/nbd1")
	k.sh("touch /run/stop")
	k.reap(load)
	k.sh("umount /run/a")
	k.sh(fs.check + " /dev/nbd0")
	k.sh("nbd-client -d /dev/nbd0")

	// The snapshot is merged back while its file system is busy.
	k.sh("rm /run/stop && mount " + fs.mount + " /dev/nbd1 /run/b")
	load = k.spawn("load-b.log", "/bin/sh", "-c", busy, "busy", "/run/b")
	k.sh("/mnt/dmsnap merge --control /run/control.sock second --wait")
	k.sh("touch /run/stop")
	k.reap(load)
	tree := k.sh("cat /run/b/marker && cd /run/b/old && find . -type f | sort | xargs sha256sum | sha256sum")
	k.sh("umount /run/b")
	k.sh(fs.check + " /dev/nbd1")

	// Gone and back, under the origin's name.
	k.sh("nbd-client -d /dev/nbd1")
	connect("/dev/nbd2", "origin")
	k.sh("mount " + fs.mount + " /dev/nbd2 /run/a")
	if again := k.sh("cat /run/a/marker && cd /run/a/old && find . -type f | sort | xargs sha256sum | sha256sum"); again != tree {
		t.Errorf("the merged file system has another content: %s, want %s", again, tree)
	}
	k.sh("umount /run/a && nbd-client -d /dev/nbd2")

	// And without the server: the image alone is the file system, the older snapshot is still sound.
	k.sh(fmt.Sprintf("kill -TERM %d", server))
	k.reap(server)
	k.sh("losetup /dev/loop3 /run/disk.img && " + fs.check + " /dev/loop3 && losetup -d /dev/loop3")
	if got := k.sh("/mnt/dmsnap status /run/first.cow"); strings.Contains(got, "invalid") {
		t.Errorf("the older snapshot: %s", got)
	}
	if c := m.Complaints(); len(c) > 0 {
		t.Errorf("the kernel complains: %v", c)
	}
}

// putProgram puts dmsnap into the directory that the guest shares, its /mnt.
func putProgram(t *testing.T, m *machine.Machine) {
	t.Helper()
	program, err := os.ReadFile(filepath.Join(binaries, "dmsnap"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.Share(), "dmsnap"), program, 0o755); err != nil {
		t.Fatal(err)
	}
}

// spawn starts a program in the guest; what it prints goes to a file of the share.
func (k *kernel) spawn(log string, argv ...string) (process int64) {
	k.t.Helper()
	r := k.must(job.Op{Do: job.Spawn, Argv: argv, Path: log})
	k.t.Cleanup(func() {
		if k.t.Failed() {
			b, _ := os.ReadFile(filepath.Join(k.m.Share(), log))
			k.t.Logf("%s:\n%s", log, b[max(0, len(b)-2000):])
		}
	})
	return r[0].N
}

// reap waits for a program that must end well.
func (k *kernel) reap(process int64) {
	k.t.Helper()
	k.must(job.Op{Do: job.Reap, N: process, Seconds: 120})
}
