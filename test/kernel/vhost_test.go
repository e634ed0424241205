package kernel_test

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/test/kernel/job"
	"github.com/dmsnap/dmsnap/test/kernel/machine"
)

// TestVhostUser: a kernel whose disks are exports of dmsnap serve --vhost-user. It makes a file system on a snapshot, writes to
// the origin, which the snapshot preserves, and is killed with the server: what it flushed is there.
func TestVhostUser(t *testing.T) {
	need(t)
	for _, tool := range []string{"mkfs.ext4", "e2fsck"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: no %s here (Debian's package e2fsprogs)", tool)
		}
	}
	dir, err := os.MkdirTemp("", "vh-") // short: it has sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := func(name string) string { return filepath.Join(dir, name) }
	disk := bytes.Repeat([]byte("as it was before"), 4<<20) // 64 MiB
	write(t, path("disk.img"), disk)

	server := serveVhost(t, dir)
	m, err := newMachine(machine.Config{Dir: t.TempDir(), VhostUser: []string{path("vm.sock"), path("origin.sock")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Kill)
	k := newKernelOf(t, m)
	k.must(job.Op{Do: job.Module, Argv: []string{"virtio_blk"}})
	k.must(job.Op{Do: job.Until, Argv: []string{"ls", "/dev"}, Stdin: "vdb", Seconds: 30})
	if got := strings.Fields(k.sh("blockdev --getsize64 /dev/vda && cat /sys/block/vda/serial && echo && cat /sys/block/vda/queue/discard_max_bytes")); len(got) != 3 ||
		got[0] != "67108864" || got[1] != "vm" || got[2] == "0" {
		t.Errorf("size, serial and discard: %q", got)
	}

	// A file system on a snapshot.
	k.sh("mkfs.ext4 -q -F /dev/vda && mkdir -p /run/a && mount /dev/vda /run/a && cp -r /etc /run/a/ && sync -f /run/a && fstrim /run/a && umount /run/a && e2fsck -fn /dev/vda")
	// The origin changes, and the other snapshot shows what was.
	k.sh("dd if=/dev/urandom of=/dev/vdb bs=1M count=8 seek=10 oflag=direct conv=fsync 2>/dev/null")
	// Many requests at once, and files that are made durable one by one until the end comes.
	k.sh("mount /dev/vda /run/a && mkdir /run/a/files")
	// The number is replaced by a rename: a reader sees one or the other, never a file that was truncated and not yet written.
	k.spawn("load.log", "/bin/sh", "-c", "i=0; while :; do echo $i > /run/a/files/$i && sync /run/a/files/$i /run/a/files && echo $i > "+
		"/run/last.new && mv /run/last.new /run/last; i=$((i+1)); done")
	time.Sleep(3 * time.Second)
	k.must(job.Op{Do: job.Until, Argv: []string{"ls", "/run"}, Stdin: "last\n", Seconds: 120})
	last := strings.TrimSpace(k.sh("cat /run/last"))
	server.Process.Signal(syscall.SIGKILL)
	server.Wait()
	m.Kill()

	exported := func(cow string) []byte {
		t.Helper()
		dev, err := block.Open(path(cow), block.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		report, err := check.Run(context.Background(), dev, check.Options{})
		if err := dev.Close(); err != nil {
			t.Fatal(err)
		}
		if err != nil || report.Worst() >= check.Error {
			t.Fatalf("%s: %+v, %v", cow, report, err)
		}
		image := path(cow + ".img")
		if out, err := exec.Command(filepath.Join(binaries, "dmsnap"), "export", path("disk.img"), path(cow), image).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if !bytes.Equal(exported("old.cow"), disk) {
		t.Error("the other snapshot does not show what was")
	}
	exported("vm.cow")
	if bytes.Equal(read(t, path("disk.img"), len(disk)), disk) {
		t.Error("nothing was written to the origin")
	}
	image := path("vm.cow.img")
	if out, err := exec.Command("e2fsck", "-fy", image).CombinedOutput(); err != nil && err.(*exec.ExitError).ExitCode() > 1 {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	got, err := exec.Command("debugfs", "-R", "cat /files/"+last, image).Output()
	if err != nil || strings.TrimSpace(string(got)) != last {
		t.Errorf("file %s, which was made durable, has %q, %v", last, got, err)
	}
	t.Logf("%s files were made durable", last)
}

// serveVhost starts a server of disk.img with two snapshots in dir, and waits until it listens.
func serveVhost(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	path := func(name string) string { return filepath.Join(dir, name) }
	server := exec.Command(filepath.Join(binaries, "dmsnap"), "serve", path("disk.img"), "vm="+path("vm.cow"), "old="+path("old.cow"), "--create",
		"--export-origin", "--socket", path("nbd.sock"), "--vhost-user", dir)
	var log bytes.Buffer
	server.Stderr = &log
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Process.Kill()
		server.Wait()
		if t.Failed() {
			t.Logf("the server's log:\n%s", &log)
		}
	})
	for lines := bufio.NewScanner(out); lines.Scan() && !strings.Contains(lines.Text(), "origin.sock"); {
	}
	return server
}

// TestVhostUserReconnect: qemu connects again to a server that was started again. After one that ended in order the guest
// goes on as if nothing had been; after one that was killed with completed writes that no flush made durable, flushes fail.
func TestVhostUserReconnect(t *testing.T) {
	need(t)
	if judging.name != "qemu" {
		t.Skip("SKIPPED: user-mode Linux does not connect again: make test-kernel-qemu")
	}
	dir, err := os.MkdirTemp("", "vh-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := func(name string) string { return filepath.Join(dir, name) }
	write(t, path("disk.img"), bytes.Repeat([]byte("as it was before"), 4<<20))
	server := serveVhost(t, dir)
	m, err := newMachine(machine.Config{Dir: t.TempDir(), VhostUser: []string{path("vm.sock")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Kill)
	k := newKernelOf(t, m)
	k.must(job.Op{Do: job.Until, Argv: []string{"ls", "/dev"}, Stdin: "vda", Seconds: 60})

	// Numbered blocks, each written past the cache, while servers come and go.
	load := k.spawn("load.log", "/bin/sh", "-c", "i=0; while [ ! -e /run/stop ]; do printf '%4096d' $i | dd of=/dev/vda bs=4k seek=$i oflag=direct conv=notrunc 2>/dev/null "+
		"|| exit 1; i=$((i+1)); echo $i > /run/count.new && mv /run/count.new /run/count; done")
	for range 3 {
		time.Sleep(2 * time.Second)
		if err := server.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := server.Wait(); err != nil {
			t.Fatal("the server did not end in order: ", err)
		}
		time.Sleep(300 * time.Millisecond)
		server = serveVhost(t, dir)
	}
	time.Sleep(2 * time.Second)
	k.sh("touch /run/stop")
	k.reap(load)
	count := strings.TrimSpace(k.sh("cat /run/count"))
	k.sh("blockdev --flushbufs /dev/vda && sync /dev/vda && i=0; while [ $i -lt " + count + " ]; do printf '%4096d' $i; i=$((i+1)); done > /run/want; " +
		"dd if=/dev/vda of=/run/got bs=4k iflag=direct count=" + count + " 2>/dev/null && cmp /run/want /run/got")
	t.Logf("%s blocks over four servers", count)
	if count == "" || len(count) < 2 {
		t.Errorf("only %s blocks", count)
	}

	// One that is killed: what it completed last was not flushed.
	k.sh("dd if=/dev/urandom of=/dev/vda bs=4k count=10 seek=9000 oflag=direct conv=notrunc 2>/dev/null")
	server.Process.Kill()
	server.Wait()
	serveVhost(t, dir)
	time.Sleep(2 * time.Second)
	k.sh("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null")
	if r := k.do(job.Op{Do: job.Exec, Argv: []string{"/bin/sh", "-c", "dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=9100 oflag=direct conv=notrunc,fsync"}, Seconds: 60}); r[0].Code == 0 {
		t.Error("a flush succeeds after writes that may be lost")
	}
	m.Kill()
	dev, err := block.Open(path("vm.cow"), block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if report, err := check.Run(context.Background(), dev, check.Options{}); err != nil || report.Worst() >= check.Error {
		t.Fatalf("%+v, %v", report, err)
	}
}
