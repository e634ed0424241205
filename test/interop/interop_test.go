// Package interop_test runs the built dmsnap against the clients and file systems that people use:
// libnbd's tools and Python, qemu's, fio, e2fsprogs. `make interop` starts it; what a machine lacks is
// reported as SKIPPED.
package interop_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/internal/testhost"
)

var binary string

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		fmt.Println("skipped with -short: the tests with other programs")
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "dmsnap-interop-")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "dmsnap")
	build := exec.Command("go", "build", "-o", binary, "github.com/dmsnap/dmsnap/cmd/dmsnap")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// tool finds a program, also where only root's PATH has it, or skips the test with SKIPPED.
func tool(t *testing.T, name, debianPackage string) string {
	t.Helper()
	for _, p := range []string{name, "/sbin/" + name, "/usr/sbin/" + name} {
		if found, err := exec.LookPath(p); err == nil {
			return found
		}
	}
	t.Skipf("SKIPPED: no %s here (Debian's package %s)", name, debianPackage)
	return ""
}

// world is a directory with an origin, a snapshot and a server.
type world struct {
	t    *testing.T
	dir  string
	cmd  *exec.Cmd
	uris map[string]string
	log  *bytes.Buffer
}

const imageSize = 64 << 20

func newWorld(t *testing.T) *world {
	w := &world{t: t, dir: testhost.ShortDir(t)}
	t.Cleanup(func() {
		if w.cmd != nil {
			w.cmd.Process.Kill()
			w.cmd.Wait()
		}
		if t.Failed() {
			w.keep()
		}
	})
	return w
}

// keep logs what the last server said, and saves the files in the directory DMSNAP_KEEP, if that is set.
func (w *world) keep() {
	if w.log != nil {
		w.t.Logf("the server's log:\n%s", w.log)
	}
	if dir := os.Getenv("DMSNAP_KEEP"); dir != "" {
		to := filepath.Join(dir, fmt.Sprintf("%s-%d", w.t.Name(), os.Getpid()))
		w.t.Logf("the files are kept in %s: %v", to, os.CopyFS(to, os.DirFS(w.dir)))
	}
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// run runs a program in the world's directory and returns what it printed; anything but exit 0 fails the test.
func (w *world) run(name string, args ...string) string {
	w.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = w.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (w *world) dmsnap(args ...string) string {
	w.t.Helper()
	return w.run(binary, args...)
}

// serve starts a server with these arguments and waits for n URIs.
func (w *world) serve(n int, args ...string) {
	w.t.Helper()
	w.uris, w.log = map[string]string{}, new(bytes.Buffer)
	w.cmd = exec.Command(binary, append([]string{"serve"}, args...)...)
	w.cmd.Dir, w.cmd.Stderr = w.dir, w.log
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for len(w.uris) < n && lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) >= 2 && strings.Contains(f[1], "://") {
			w.uris[f[0]] = f[1]
		}
	}
	if len(w.uris) < n {
		w.t.Fatalf("serve gave %d URIs, want %d: %s", len(w.uris), n, w.log)
	}
	go io.Copy(io.Discard, out)
}

// stopBound is for the end of a server that has to make tens of MiB durable on a busy machine; a server that hangs
// takes longer.
const stopBound = 30 * time.Second

// stop ends the server by SIGTERM and wants it to end soon.
func (w *world) stop() {
	w.t.Helper()
	start := time.Now()
	w.cmd.Process.Signal(syscall.SIGTERM)
	err := w.cmd.Wait()
	w.cmd = nil
	if err != nil {
		w.t.Fatalf("serve ended with %v: %s", err, w.log)
	}
	if d := time.Since(start); d > stopBound {
		w.t.Errorf("SIGTERM took %v, the bound is %v: %s", d, stopBound, w.log)
	}
}

// standard makes disk.img with random content, snap.cow, and serves both with a control socket.
func standard(t *testing.T) (*world, []byte) {
	w := newWorld(t)
	disk := randomImage(imageSize, 1)
	w.write("disk.img", disk)
	w.dmsnap("create", "disk.img", "snap.cow")
	w.serveStandard()
	return w, disk
}

func (w *world) serveStandard() {
	w.t.Helper()
	w.serve(2, "disk.img", "snap=snap.cow", "--export-origin", "--socket", w.path("nbd.sock"), "--control", w.path("ctl.sock"))
}

func (w *world) write(name string, b []byte) {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), b, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) read(name string) []byte {
	w.t.Helper()
	b, err := os.ReadFile(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// randomImage has a hole in its second quarter.
func randomImage(size int, seed uint64) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	clear(b[size/4 : size/2])
	return b
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: sha256 %.6x… (%d bytes), want %.6x… (%d bytes)", what, sha256.Sum256(got), len(got), sha256.Sum256(want), len(want))
	}
}

func TestInteropNbdinfo(t *testing.T) {
	nbdinfo := tool(t, "nbdinfo", "libnbd-bin")
	w, _ := standard(t)
	var list struct {
		Exports []struct {
			Name     string   `json:"export-name"`
			Size     int64    `json:"export-size"`
			Contexts []string `json:"contexts"`
			CanFUA   bool     `json:"can_fua"`
			Multi    bool     `json:"can_multi_conn"`
		} `json:"exports"`
	}
	out := w.run(nbdinfo, "--list", "--json", "nbd+unix:///?socket="+w.path("nbd.sock"))
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	found := map[string]bool{}
	for _, e := range list.Exports {
		found[e.Name] = true
		if e.Size != imageSize || !e.CanFUA || !e.Multi {
			t.Errorf("export %+v", e)
		}
	}
	if !found["snap"] || !found["origin"] {
		t.Errorf("exports %v, want snap and origin", found)
	}
	// The default export is the first snapshot.
	if out := w.run(nbdinfo, "--json", "nbd+unix:///?socket="+w.path("nbd.sock")); !strings.Contains(out, "dmsnap:changed") {
		t.Errorf("the default export has no dmsnap:changed: %s", out)
	}
	qemuIO := tool(t, "qemu-io", "qemu-utils")
	w.run(qemuIO, "-f", "raw", "-c", "write -P 7 4k 8k", w.uris["snap"])
	var changed []struct{ Offset, Length, Type int64 }
	out = w.run(nbdinfo, "--map=dmsnap:changed", "--json", w.uris["snap"])
	if err := json.Unmarshal([]byte(out), &changed); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if len(changed) != 3 || changed[1].Offset != 4096 || changed[1].Length != 8192 || changed[1].Type != 1 || changed[0].Type != 0 {
		t.Errorf("dmsnap:changed is %v, want 8 KiB at 4 KiB", changed)
	}
	w.stop()
}

func TestInteropNbdcopyBothWays(t *testing.T) {
	nbdcopy := tool(t, "nbdcopy", "libnbd-bin")
	w, disk := standard(t)
	next := randomImage(imageSize, 2)
	w.write("next.img", next)
	w.run(nbdcopy, "--flush", w.path("next.img"), w.uris["snap"])
	w.run(nbdcopy, w.uris["snap"], w.path("back.img"))
	same(t, "snapshot read back", w.read("back.img"), next)
	w.run(nbdcopy, w.uris["origin"], w.path("origin.img"))
	same(t, "origin beside it", w.read("origin.img"), disk)
	w.stop()
	w.dmsnap("export", "disk.img", "snap.cow", "exported.img")
	same(t, "export", w.read("exported.img"), next)
	w.dmsnap("merge", "disk.img", "snap.cow")
	same(t, "merged origin", w.read("disk.img"), next)
}

func TestInteropQemu(t *testing.T) {
	qemuIO, qemuImg := tool(t, "qemu-io", "qemu-utils"), tool(t, "qemu-img", "qemu-utils")
	w, disk := standard(t)
	// An overlapping write to the origin beneath, forced unit access, zeroes with and without a hole,
	// a discard.
	w.run(qemuIO, "-f", "raw", "-c", "write -P 7 4k 64k", "-c", "write -f -P 8 1001k 5000", "-c", "write -z 40M 3M",
		"-c", "write -z -u 44M 1M", "-c", "discard 8k 8k", "-c", "flush", w.uris["snap"])
	w.run(qemuIO, "-f", "raw", "-c", "write -P 9 0 1M", "-c", "flush", w.uris["origin"])
	want := bytes.Clone(disk)
	fill(want[4<<10:68<<10], 7)
	fill(want[8<<10:16<<10], 0) // what a discarded chunk of the COW device reads as
	fill(want[1001<<10:1001<<10+5000], 8)
	fill(want[40<<20:43<<20], 0)
	fill(want[44<<20:45<<20], 0)
	w.run(qemuImg, "convert", "-f", "raw", "-O", "raw", w.uris["snap"], w.path("converted.img"))
	same(t, "qemu-img convert", w.read("converted.img"), want)
	w.write("want.img", want)
	w.run(qemuImg, "compare", "-f", "raw", "-F", "raw", w.path("want.img"), w.uris["snap"])
	var extents []struct {
		Start, Length int64
		Zero, Data    bool
	}
	out := w.run(qemuImg, "map", "-f", "raw", "--output=json", w.uris["snap"])
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	at := int64(0)
	for _, e := range extents {
		if e.Start != at {
			t.Errorf("map has a gap at %d", at)
		}
		if at += e.Length; e.Zero && len(bytes.Trim(want[e.Start:at], "\x00")) > 0 {
			t.Errorf("map says that %d bytes at %d are zeros", e.Length, e.Start)
		}
	}
	if at != imageSize {
		t.Errorf("map ends at %d", at)
	}
	w.stop()
}

func fill(b []byte, x byte) {
	for i := range b {
		b[i] = x
	}
}

// TestInteropFioLiveMerge has fio write and verify the snapshot while it is merged into the origin.
func TestInteropFioLiveMerge(t *testing.T) {
	fio := fioWithNBD(t)
	w, disk := standard(t)
	job := func(name, uri string, more ...string) []string {
		return append([]string{"--name=" + name, "--ioengine=nbd", "--uri=" + uri, "--rw=randwrite", "--bs=4k", "--iodepth=16",
			"--verify=crc32c", "--verify_fatal=1", "--randseed=7"}, more...)
	}
	// Fill the upper half of the snapshot, then merge while the lower half is written and verified.
	w.run(fio, job("fill", w.uris["snap"], "--offset=32m", "--size=16m")...)
	load := exec.Command(fio, job("load", w.uris["snap"], "--size=16m", "--loops=3")...)
	load.Dir = w.dir
	out := new(bytes.Buffer)
	load.Stdout, load.Stderr = out, out
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	w.dmsnap("merge", "--control", w.path("ctl.sock"), "snap", "--wait")
	if err := load.Wait(); err != nil {
		t.Fatalf("fio beside the merge: %v\n%s", err, out)
	}
	w.run(fio, job("again", w.uris["origin"], "--offset=32m", "--size=16m", "--verify_only")...)
	w.dmsnap("drop", "--control", w.path("ctl.sock"), "snap")
	w.run(fio, job("after", w.uris["origin"], "--offset=48m", "--size=4m", "--end_fsync=1")...)
	w.stop()
	merged := w.read("disk.img")
	same(t, "a part nobody wrote", merged[52<<20:], disk[52<<20:])
	if out := w.dmsnap("status", "snap.cow", "--json"); !strings.Contains(out, `"exceptions": 0`) {
		t.Errorf("the merged store is not empty: %s", out)
	}
}

// TestInteropTwoMerges merges one snapshot, attaches another, and merges that too, with one server.
func TestInteropTwoMerges(t *testing.T) {
	qemuIO := tool(t, "qemu-io", "qemu-utils")
	w, disk := standard(t)
	ctl := w.path("ctl.sock")
	want := bytes.Clone(disk)
	for i, name := range []string{"snap", "second"} {
		if i > 0 {
			w.dmsnap("snapshot", "--control", ctl, name, w.path(name+".cow"), "--create")
		}
		uri := strings.Replace(w.uris["snap"], "snap", name, 1)
		w.run(qemuIO, "-f", "raw", "-c", fmt.Sprintf("write -P %d %dM 300k", i+1, i+1), "-c", "flush", uri)
		fill(want[(i+1)<<20:(i+1)<<20+300<<10], byte(i+1))
		w.dmsnap("merge", "--control", ctl, name, "--wait")
		w.dmsnap("drop", "--control", ctl, name)
	}
	w.run(qemuIO, "-f", "raw", "-c", "write -P 77 5M 4k", "-c", "flush", w.uris["origin"])
	fill(want[5<<20:5<<20+4<<10], 77)
	w.stop()
	same(t, "origin after two merges", w.read("disk.img"), want)
}

// TestInteropKill kills the server with SIGKILL after a flush: what was flushed is there, and the origin
// and the store go on.
func TestInteropKill(t *testing.T) {
	qemuIO := tool(t, "qemu-io", "qemu-utils")
	w, disk := standard(t)
	want := bytes.Clone(disk)
	for i := range 5 {
		w.run(qemuIO, "-f", "raw", "-c", fmt.Sprintf("write -P %d %dk 33k", i+1, 100*i+3), "-c", "flush", w.uris["snap"])
		fill(want[(100*i+3)<<10:(100*i+36)<<10], byte(i+1))
		w.run(qemuIO, "-f", "raw", "-c", fmt.Sprintf("write -P 99 %dk 50k", 5000+100*i), w.uris["origin"])
		w.cmd.Process.Kill()
		w.cmd.Wait()
		w.cmd = nil
		w.serveStandard()
	}
	w.stop()
	w.dmsnap("export", "disk.img", "snap.cow", "view.img")
	same(t, "snapshot after five kills", w.read("view.img"), want)
}

// TestInteropExt4 has real file systems on both: a snapshot that becomes another ext4, made on the served
// export itself where FUSE is there, merged live, and found clean at each stage.
func TestInteropExt4(t *testing.T) {
	mke2fs, e2fsck := tool(t, "mke2fs", "e2fsprogs"), tool(t, "e2fsck", "e2fsprogs")
	nbdcopy := tool(t, "nbdcopy", "libnbd-bin")
	w := newWorld(t)
	makeFS := func(name string, seed uint64) {
		if err := os.MkdirAll(w.path(name+".d"), 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			w.write(fmt.Sprintf("%s.d/file%d", name, i), randomImage(100<<10+i*7777, seed+uint64(i)))
		}
		w.run(mke2fs, "-q", "-t", "ext4", "-d", w.path(name+".d"), w.path(name), fmt.Sprintf("%dk", imageSize>>10))
	}
	makeFS("disk.img", 10)
	makeFS("next.img", 50)
	w.dmsnap("create", "disk.img", "snap.cow", "--chunk-size", "16k")
	w.serveStandard()
	w.run(nbdcopy, "--flush", w.path("next.img"), w.uris["snap"])
	w.stop()
	w.dmsnap("export", "disk.img", "snap.cow", "view.img")
	w.run(e2fsck, "-f", "-n", w.path("view.img"))
	w.run(e2fsck, "-f", "-n", w.path("disk.img"))
	w.serveStandard()
	w.dmsnap("merge", "--control", w.path("ctl.sock"), "snap", "--wait")
	w.stop()
	same(t, "merged origin", w.read("disk.img"), w.read("next.img"))
	w.run(e2fsck, "-f", "-n", w.path("disk.img"))
}

// TestInteropMkfsOnExport runs mkfs.ext4 and e2fsck on a snapshot as it is served, through libnbd's FUSE
// file.
func TestInteropMkfsOnExport(t *testing.T) {
	mkfs, e2fsck := tool(t, "mkfs.ext4", "e2fsprogs"), tool(t, "e2fsck", "e2fsprogs")
	nbdfuse := tool(t, "nbdfuse", "libnbd-bin")
	tool(t, "fusermount3", "fuse3")
	w, disk := standard(t)
	if err := os.Mkdir(w.path("mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	fuse := exec.Command(nbdfuse, w.path("mnt"), w.uris["snap"])
	out := new(bytes.Buffer)
	fuse.Stdout, fuse.Stderr = out, out
	if err := fuse.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- fuse.Wait() }()
	file := w.path("mnt/nbd")
	for i := 0; ; i++ {
		if _, err := os.Stat(file); err == nil {
			break
		}
		select {
		case err := <-ended:
			t.Skipf("SKIPPED: FUSE can't be used here: %v: %s", err, out)
		case <-time.After(50 * time.Millisecond):
			if i > 200 {
				t.Fatal("nbdfuse shows no file")
			}
		}
	}
	w.run(mkfs, "-q", "-F", file)
	w.run(e2fsck, "-f", "-n", file)
	w.run("fusermount3", "-u", w.path("mnt"))
	if err := <-ended; err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
	}
	w.stop()
	same(t, "origin", w.read("disk.img"), disk)
	w.dmsnap("export", "disk.img", "snap.cow", "view.img")
	w.run(e2fsck, "-f", "-n", w.path("view.img"))
}
