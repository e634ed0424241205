package kernel_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/internal/testcerts"
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
	k.sh("head -c 16M /dev/urandom > /run/disk.img && truncate -s " + size + " /run/disk.img && cp /mnt/dmsnap /run/dmsnap && mkdir -p /run/a && " + digestOfDisk + " > /run/before")
	return k
}

const digestOfDisk = "sha256sum < /run/disk.img"

// unchanged wants that the other snapshot shows what the disk held at first, and that both stores are sound.
func (k *kernel) unchanged() {
	k.t.Helper()
	k.sh("for c in vm old; do /run/dmsnap check /run/$c.cow --origin /run/disk.img; done && /run/dmsnap export /run/disk.img /run/old.cow - | sha256sum | cmp - /run/before")
	if k.sh(digestOfDisk+" | cmp -s - /run/before && echo same || true") != "" {
		k.t.Error("nothing was written to the origin: the test shows nothing")
	}
}

const (
	attachedURI = "nbd+unix:///vm1?socket=/run/nbd.sock"
	originURI   = "nbd+unix:///origin?socket=/run/nbd.sock"
)

// hold starts an attach in the foreground and returns its process when the device is there.
func (k *kernel) hold(device string, args ...string) (process int64) {
	k.t.Helper()
	log := k.m.Name("attach.log")
	process = k.spawn(log, append([]string{"/run/dmsnap", "attach", "--foreground"}, append(args, device)...)...)
	k.must(job.Op{Do: job.Until, Argv: []string{"cat", "/mnt/" + log}, Stdin: device, Seconds: 60})
	return process
}

// serveVM starts a server of the snapshot and returns its process when it accepts clients.
func (k *kernel) serveVM(more ...string) (process int64) {
	k.t.Helper()
	log := k.m.Name("server.log")
	process = k.spawn(log, append([]string{"/run/dmsnap", "serve", "/run/disk.img", "vm1=/run/vm.cow", "old=/run/old.cow", "--export-origin", "--create", "--socket", "/run/nbd.sock"}, more...)...)
	k.must(job.Op{Do: job.Until, Argv: []string{"cat", "/mnt/" + log}, Stdin: "origin  ", Seconds: 60})
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

// TestAttachKilled kills servers to which the kernel speaks by itself. Requests fail and nothing hangs; what was flushed is there, on
// the device and on the origin's, and the other snapshot is what it was. DMSNAP_DEEP=1 kills a hundred of them.
func TestAttachKilled(t *testing.T) {
	k := withDmsnap(t, "32M")
	write := "set -e; i=$1; while :; do printf %4096d $i > /run/$2.block; dd if=/run/$2.block of=$3 bs=4k seek=$((i % 1000)) oflag=direct conv=fsync 2>/dev/null; " +
		"echo $i > /run/$2.new && mv /run/$2.new /run/$2.last; i=$((i+1)); done"
	last := func(name string) (n int) {
		fmt.Sscan(k.sh("cat /run/"+name+".last 2>/dev/null || echo -1"), &n)
		return n
	}
	servers := max(1, rounds(t)/3) // a request in flight fails after seconds
	if os.Getenv("DMSNAP_DEEP") != "" {
		servers = 100
	}
	for range servers {
		server := k.serveVM()
		k.sh("/run/dmsnap attach --timeout 5s '" + attachedURI + "' /dev/nbd0 && /run/dmsnap attach --timeout 5s '" + originURI + "' /dev/nbd1")
		var load []int64
		for i, name := range []string{"vm", "origin"} {
			load = append(load, k.spawn(k.m.Name("load.log"), "/bin/sh", "-c", write, "write", fmt.Sprint(last(name)+1), name, fmt.Sprintf("/dev/nbd%d", i)))
		}
		k.must(job.Op{Do: job.Until, Argv: []string{"/bin/sh", "-c", "cat /run/vm.last && cat /run/origin.last && echo both"}, Stdin: "both", Seconds: 60})
		time.Sleep(300 * time.Millisecond) // of load
		k.sh(fmt.Sprintf("kill -KILL %d", server))
		k.do(job.Op{Do: job.Reap, N: server, Seconds: 60})
		for _, l := range load {
			k.do(job.Op{Do: job.Reap, N: l, Seconds: 60}) // a failed write ends it
		}
		k.sh("for d in 0 1; do /run/dmsnap detach --force /dev/nbd$d; done")
		k.unchanged()
		// The last block whose fsync returned.
		k.sh("/run/dmsnap export /run/disk.img /run/vm.cow - > /run/vm.img && ln -sf disk.img /run/origin.img")
		for _, name := range []string{"vm", "origin"} {
			k.sh(fmt.Sprintf("dd if=/run/%s.img of=/run/%[1]s.found bs=4k skip=%d count=1 2>/dev/null && printf %%4096d %d | cmp - /run/%[1]s.found", name, last(name)%1000, last(name)))
		}
		tally.add(func(c *counts) { c.kills++ })
	}
	t.Logf("%d and %d blocks over %d servers", last("vm"), last("origin"), servers)
}

// TestAttachForeground kills and starts servers under a mounted file system. What was written, flushed or not, is there, and
// nothing in the kernel has failed.
func TestAttachForeground(t *testing.T) {
	k := withDmsnap(t, "128M")
	server := k.serveVM()
	holder := k.hold("/dev/nbd0", "--connections", "2", attachedURI)
	ofOrigin := k.hold("/dev/nbd4", originURI)
	k.sh("mkfs.ext4 -q -F /dev/nbd0 && mount -o errors=remount-ro /dev/nbd0 /run/a && mkdir /run/a/files")
	load := k.spawn("load.log", "/bin/sh", "-c", "set -e; i=0; while [ ! -e /run/stop ]; do head -c 20000 /dev/urandom > /run/a/files/$i; "+
		"[ $((i % 8)) != 0 ] || sync -f /run/a; sha256sum /run/a/files/$i >> /run/sums; i=$((i+1)); done")
	toOrigin := k.spawn("origin.log", "/bin/sh", "-c", "set -e; i=0; while [ ! -e /run/stop ]; do "+
		"dd if=/dev/urandom of=/dev/nbd4 bs=64k count=1 seek=$((i * 7 % 250)) oflag=direct conv=fsync 2>/dev/null; i=$((i+1)); done")
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
	k.reap(toOrigin)
	k.sh("/run/dmsnap detach /dev/nbd4")
	k.reap(ofOrigin)
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
	k.unchanged()
	k.sh("/run/dmsnap export /run/disk.img /run/vm.cow - | tail -c +1024001 | head -c 4 | grep -qx last")

	// With TLS. detach ends a holder, too, in order.
	authority, err := testcerts.NewAuthority("test")
	if err != nil {
		t.Fatal(err)
	}
	if err := authority.Write(k.m.Share()); err != nil {
		t.Fatal(err)
	}
	k.serveVM("--tls-certificates", "/mnt")
	holder = k.hold("/dev/nbd5", strings.Replace(attachedURI, "nbd", "nbds", 1), "--nbd-certificates", "/mnt")
	k.sh("dd if=/dev/nbd5 bs=512 skip=2000 count=1 2>/dev/null | head -c 4 | grep -qx last && /run/dmsnap detach /dev/nbd5")
	k.reap(holder)
	if c := k.m.Complaints(); len(c) > 0 {
		t.Errorf("the kernel complains: %v", c)
	}
}
