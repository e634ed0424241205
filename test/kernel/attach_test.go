package kernel_test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// withDmsnap puts the program into the guest and makes a disk with a snapshot.
func withDmsnap(t *testing.T, size string) *kernel {
	t.Helper()
	need(t)
	for _, tool := range []string{"mkfs.ext4", "e2fsck", "sfdisk"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: no %s here (Debian's packages e2fsprogs, fdisk)", tool)
		}
	}
	m := boot(t)
	k := newKernelOf(t, m)
	putProgram(t, m)
	k.sh("truncate -s " + size + " /run/disk.img && cp /mnt/dmsnap /run/dmsnap && mkdir -p /run/a")
	return k
}

const attachedURI = "nbd+unix:///vm1?socket=/run/nbd.sock"

// serveVM starts a server of the snapshot and returns its process when it accepts clients.
func (k *kernel) serveVM(more ...string) (process int64) {
	k.t.Helper()
	log := k.m.Name("server.log")
	process = k.spawn(log, append([]string{"/run/dmsnap", "serve", "/run/disk.img", "vm1=/run/vm.cow", "--create", "--socket", "/run/nbd.sock"}, more...)...)
	k.must(job.Op{Do: job.Until, Argv: []string{"cat", "/mnt/" + log}, Stdin: "nbd+unix", Seconds: 60})
	return process
}

// fails runs a command line that must fail with a text in its output.
func (k *kernel) fails(line, says string) {
	k.t.Helper()
	r := k.do(job.Op{Do: job.Exec, Argv: []string{"/bin/sh", "-c", line}, Seconds: 60})[0]
	if r.Err != "" || r.Code != 2 || !strings.Contains(r.Out, says) {
		k.t.Errorf("%s: status %d, %s%s; want 2 and %q", line, r.Code, r.Out, r.Err, says)
	}
}

// TestAttach attaches a snapshot by the kernel's NBD client: its size, partitions, block size, file system; what is refused; the
// same by nbd-client.
func TestAttach(t *testing.T) {
	k := withDmsnap(t, "64M")
	server := k.serveVM()
	attach := "/run/dmsnap attach '" + attachedURI + "' "
	list := func() (devices []struct {
		Device     string
		SizeBytes  int64 `json:"size_bytes"`
		BlockSize  int   `json:"block_size"`
		ReadOnly   bool  `json:"read_only"`
		Partitions []string
		URI        string
	}) {
		t.Helper()
		if err := json.Unmarshal([]byte(k.sh("/run/dmsnap attach --list --json")), &devices); err != nil {
			t.Fatal(err)
		}
		return devices
	}
	if got := list(); len(got) != 0 {
		t.Errorf("attached before: %+v", got)
	}
	if got := k.sh(attach + "&& blockdev --getsize64 /dev/nbd0"); got != "/dev/nbd0\n67108864\n" {
		t.Errorf("attached as %q", got)
	}
	if got := list(); len(got) != 1 || got[0].Device != "/dev/nbd0" || got[0].SizeBytes != 64<<20 || got[0].BlockSize != 512 || got[0].ReadOnly || got[0].URI != attachedURI {
		t.Errorf("list: %+v", got)
	}
	k.sh("mkfs.ext4 -q -F /dev/nbd0 && mount /dev/nbd0 /run/a && cp -r /etc /run/a/ && sync -f /run/a && fstrim /run/a")
	k.fails("/run/dmsnap detach /dev/nbd0", "in use")
	k.fails(attach+"/dev/nbd0", "in use")
	k.sh("umount /run/a && e2fsck -fn /dev/nbd0 && /run/dmsnap detach /dev/nbd0")
	k.fails("/run/dmsnap detach /dev/nbd0", "not attached")

	// Partitions are known when it returns; several connections; larger blocks.
	k.sh(attach + "/dev/nbd3 && echo 2048,65536 | sfdisk -q /dev/nbd3 && /run/dmsnap detach /dev/nbd3")
	k.sh(attach + "/dev/nbd3 --connections 3 --block-size 4096 --timeout 30s --dead-timeout 5s && test -b /dev/nbd3p1 && mkfs.ext4 -q -F /dev/nbd3p1 && mount /dev/nbd3p1 /run/a && echo x > /run/a/x")
	if got := list(); len(got) != 1 || got[0].Device != "/dev/nbd3" || got[0].BlockSize != 4096 || strings.Join(got[0].Partitions, " ") != "/dev/nbd3p1" {
		t.Errorf("list: %+v", got)
	}
	k.fails("/run/dmsnap detach /dev/nbd3", "in use") // its partition is
	k.sh("umount /run/a && /run/dmsnap detach /dev/nbd3")
	k.sh(attach + "--read-only --json && test $(blockdev --getro /dev/nbd0) = 1 && ! dd if=/dev/zero of=/dev/nbd0 count=1 oflag=direct 2>/dev/null && /run/dmsnap detach /dev/nbd0")

	for args, says := range map[string]string{
		"'nbds+unix:///vm1?socket=/run/nbd.sock'":  "TLS",
		"'nbd+unix:///none?socket=/run/nbd.sock'":  "no such export",
		"'" + attachedURI + "' /dev/loop0":         "/dev/nbdN",
		"'" + attachedURI + "' --block-size 3000":  "power of two",
		"'" + attachedURI + "' --block-size 65536": "power of two",
		"'nbd+unix:///vm1?socket=/run/none.sock'":  "no such file",
	} {
		k.fails("/run/dmsnap attach "+args, says)
	}
	k.fails("setpriv --bounding-set -sys_admin /run/dmsnap "+strings.TrimPrefix(attach, "/run/dmsnap "), "root")
	if got := list(); len(got) != 0 {
		t.Errorf("attached after refusals: %+v", got)
	}

	// The examples of the help, as they stand.
	k.sh("cd /run && PATH=/run:$PATH && { dmsnap help attach; dmsnap help detach; } | grep '^  dmsnap [ad][a-z]* ' | grep -v 'dmsnap .* \\[' > examples && test $(wc -l < examples) = 3 && sh -ex ./examples")

	// nbd-client's devices are the same, both ways.
	if _, err := exec.LookPath("nbd-client"); err == nil {
		k.sh("nbd-client -unix /run/nbd.sock /dev/nbd1 -N vm1")
		if got := list(); len(got) != 1 || got[0].Device != "/dev/nbd1" {
			t.Errorf("list: %+v", got)
		}
		k.sh("/run/dmsnap detach /dev/nbd1")
		k.sh(attach + "/dev/nbd2 && nbd-client -c /dev/nbd2 && nbd-client -d /dev/nbd2")
		k.must(job.Op{Do: job.Until, Argv: []string{"/bin/sh", "-c", "/run/dmsnap attach --list | wc -l"}, Stdin: "0"})
	} else {
		t.Log("SKIPPED: no nbd-client here (Debian's package nbd-client)")
	}
	k.sh(fmt.Sprintf("kill -TERM %d", server))
	k.reap(server)
	k.sh("/run/dmsnap check /run/vm.cow --origin /run/disk.img")
}

// TestAttachForeground kills and starts servers under a mounted file system. What was written, flushed or not, is there, and
// nothing in the kernel has failed.
func TestAttachForeground(t *testing.T) {
	k := withDmsnap(t, "128M")
	server := k.serveVM()
	holder := k.spawn("attach.log", "/run/dmsnap", "attach", "--foreground", "--connections", "2", attachedURI)
	k.must(job.Op{Do: job.Until, Argv: []string{"cat", "/mnt/attach.log"}, Stdin: "/dev/nbd0", Seconds: 60})
	k.sh("mkfs.ext4 -q -F /dev/nbd0 && mount -o errors=remount-ro /dev/nbd0 /run/a && mkdir /run/a/files")
	load := k.spawn("load.log", "/bin/sh", "-c", "set -e; i=0; while [ ! -e /run/stop ]; do head -c 20000 /dev/urandom > /run/a/files/$i; "+
		"[ $((i % 8)) != 0 ] || sync -f /run/a; sha256sum /run/a/files/$i >> /run/sums; i=$((i+1)); done")
	started := time.Now()
	for round := range rounds(t) {
		time.Sleep(700 * time.Millisecond) // of load
		signal := "-KILL"
		if round%3 == 2 {
			signal = "-TERM"
		}
		k.sh(fmt.Sprintf("kill %s %d", signal, server))
		k.do(job.Op{Do: job.Reap, N: server, Seconds: 60})
		server = k.serveVM()
		tally.add(func(c *counts) { c.kills++ })
	}
	k.sh("touch /run/stop")
	k.reap(load)
	t.Logf("%s files over %d servers in %v", strings.TrimSpace(k.sh("wc -l < /run/sums")), rounds(t)+1, time.Since(started).Round(time.Second))
	k.sh("sync -f /run/a && umount /run/a && e2fsck -fn /dev/nbd0 && blockdev --flushbufs /dev/nbd0 && mount /dev/nbd0 /run/a && sha256sum -c --quiet /run/sums && umount /run/a")

	// A signal makes everything durable and detaches.
	k.sh("printf last | dd of=/dev/nbd0 bs=512 seek=2000 conv=notrunc,sync 2>/dev/null")
	k.sh(fmt.Sprintf("kill -TERM %d", holder))
	k.reap(holder)
	if got := k.sh("/run/dmsnap attach --list"); got != "" {
		t.Errorf("still attached: %s", got)
	}
	k.sh(fmt.Sprintf("kill -KILL %d", server))
	k.do(job.Op{Do: job.Reap, N: server})
	k.sh("/run/dmsnap check /run/vm.cow --origin /run/disk.img && /run/dmsnap export /run/disk.img /run/vm.cow - | tail -c +1024001 | head -c 4 | grep -qx last")

	// detach ends a holder, too, in order.
	k.serveVM()
	holder = k.spawn("attach2.log", "/run/dmsnap", "attach", "--foreground", attachedURI, "/dev/nbd5")
	k.must(job.Op{Do: job.Until, Argv: []string{"cat", "/mnt/attach2.log"}, Stdin: "/dev/nbd5", Seconds: 60})
	k.sh("/run/dmsnap detach /dev/nbd5")
	k.reap(holder)
	if c := k.m.Complaints(); len(c) > 0 {
		t.Errorf("the kernel complains: %v", c)
	}
}
