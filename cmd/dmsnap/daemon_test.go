package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/internal/testcerts"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source"
)

// serveFleet starts a daemon within this process for a calling that needs one: a disk base with the node disk and its
// checkpoint disk@before.
func (k *kit) serveFleet(t *testing.T) {
	t.Helper()
	o := daemonOptions{mode: "0600"}
	o.Dir, o.Control, o.AllowPaths = testhost.ShortDir(t), k.path["CONTROL"], []string{k.in}
	ctx, cancel := context.WithCancel(t.Context())
	out, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := o.run(ctx, nil, w, io.Discard)
		w.Close()
		ended <- err
	}()
	k.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the daemon ended with %v", err)
		}
	})
	t.Cleanup(k.stop)
	if _, err := out.Read(make([]byte, 100)); err != nil {
		t.Fatalf("the daemon does not start: %v", err)
	}
	ctl := api.NewClient(o.Control)
	_, err := ctl.AddDisk(ctx, api.AddDiskRequest{Name: "base", Source: k.path["ORIGIN"]})
	if err == nil {
		_, err = ctl.AddDisk(ctx, api.AddDiskRequest{Name: "spare", Source: k.path["OTHER"]})
	}
	if err == nil {
		_, err = ctl.Fork(ctx, api.ForkRequest{From: "base", Name: "disk"})
	}
	if err == nil {
		_, err = ctl.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"disk"}, Name: "before"})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A daemonProcess is a daemon in a process of its own, with a disk of 1 MiB beside its folder.
type daemonProcess struct {
	*process
	dir, disk string
	control   string
	args      []string
}

func newDaemonProcess(t *testing.T, args ...string) *daemonProcess {
	t.Helper()
	dir := testhost.ShortDir(t)
	d := &daemonProcess{dir: filepath.Join(dir, "f"), disk: filepath.Join(dir, "disk.img")}
	d.control = filepath.Join(d.dir, "control.sock")
	d.args = append([]string{"daemon", "--dir", d.dir, "--allow-path", dir}, args...)
	writeFile(t, d.disk, bytes.Repeat([]byte("the base"), 128<<10))
	d.start(t)
	mustRun(t, "disk", "add", "base", d.disk, "--control", d.control)
	return d
}

// start starts the daemon, again.
func (d *daemonProcess) start(t *testing.T) {
	t.Helper()
	d.process = launch(t, d.args...)
	if line, err := d.stdout.ReadString('\n'); err != nil || !strings.Contains(line, "nbd+unix") {
		t.Fatalf("it printed %q, %v: %s", line, err, &d.stderr)
	}
}

// kill ends it as a power failure would end it but for the page cache.
func (d *daemonProcess) kill(t *testing.T) {
	t.Helper()
	d.Process.Kill()
	io.Copy(io.Discard, d.stdout)
	d.Wait()
}

// terminate wants an orderly end.
func (d *daemonProcess) terminate(t *testing.T) {
	t.Helper()
	d.Process.Signal(syscall.SIGTERM)
	if status := d.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, &d.stderr)
	}
}

func (d *daemonProcess) uri(name string) string {
	return (nbd.URI{Network: "unix", Address: filepath.Join(d.dir, "nbd.sock"), Export: name}).String()
}

// tree is what remains of the tree when the process is another: names, kinds, parents, sizes.
func (d *daemonProcess) tree(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, e := range mustJSON[api.Tree](t, "tree", "--control", d.control).Elements {
		fmt.Fprintln(&b, e.Name, e.Kind, e.Parent, e.Disk, e.SizeBytes, e.State, e.URI)
	}
	return b.String()
}

// wantNoOrphans wants the files of the elements in layers/, and no other, as soon as what was dropped is durable.
func (d *daemonProcess) wantNoOrphans(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		wrong := d.orphans(t)
		if len(wrong) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("files without elements, or elements without files: %q", wrong)
			return
		}
	}
}

func (d *daemonProcess) orphans(t *testing.T) (wrong []string) {
	t.Helper()
	known := map[string]bool{}
	for _, e := range mustJSON[api.Tree](t, "tree", "--control", d.control).Elements {
		if e.Kind != api.KindDisk {
			known[e.File] = true
			if _, err := os.Stat(e.File); err != nil {
				wrong = append(wrong, e.Name)
			}
		}
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "layers"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if path := filepath.Join(d.dir, "layers", e.Name()); !known[path] {
			wrong = append(wrong, path)
		}
	}
	return wrong
}

// wantSound checks every layer with the tools for stores. The daemon has ended.
func (d *daemonProcess) wantSound(t *testing.T) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(d.dir, "layers", "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no layers: %v", err)
	}
	for _, path := range files {
		mustRun(t, "check", path)
	}
}

// The daemon in a process of its own: what was acknowledged is there after kill -9, a second one is refused, SIGTERM ends it.
func TestDaemonProcess(t *testing.T) {
	d := newDaemonProcess(t)
	ctl := []string{"--control", d.control}
	call := func(args ...string) string { return mustRun(t, append(args, ctl...)...) }
	if got := call("fork", "base", "vm1"); got != "vm1  "+d.uri("vm1")+"\n" {
		t.Errorf("fork printed %q", got)
	}
	c := dial(t, d.uri("vm1"))
	writeAt(t, c, []byte("first"), 100)
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := call("checkpoint", "vm1", "--name", "one"); got != "vm1@one\n" {
		t.Errorf("checkpoint printed %q", got)
	}
	writeAt(t, c, []byte("second"), 100) // the client stays connected
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	call("fork", "vm1@one", "vm2", "--size", "2MiB")
	call("fork", "vm1", "vm3")
	call("policy", "base", "keep-last=5")
	dmsnap(append([]string{"drop", "vm1@one"}, ctl...)...).wantRefused(t, "vm1@one", "children")
	dmsnap(append([]string{"drop", "base"}, ctl...)...).wantRefused(t, "it is a disk")
	dmsnap(append([]string{"disk", "add", "secret", "/etc/passwd"}, ctl...)...).wantRefused(t, "/etc/passwd", "not below")
	dmsnap(d.args...).wantRefused(t, "another daemon", d.dir)
	before := d.tree(t)
	d.kill(t)
	d.start(t)
	if after := d.tree(t); after != before {
		t.Errorf("after kill -9:\n%s\nbefore:\n%s", after, before)
	}
	for name, want := range map[string]string{"vm1": "second", "vm2": "firsth", "vm3": "second"} {
		got := make([]byte, 6)
		n := dial(t, d.uri(name))
		if _, err := n.ReadAt(got, 100); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, want)
		}
		if name == "vm2" && n.Size() != 2<<20 {
			t.Errorf("vm2 has %d bytes", n.Size())
		}
		n.Close()
	}
	t.Setenv(controlVariable, d.control)
	mustRun(t, "drop", "vm3")
	if st := mustJSON[api.Daemon](t, "status", "--control", d.control); st.Nodes != 2 || st.Disks != 1 || st.Rights != "admin" {
		t.Errorf("status %+v", st)
	}
	out := filepath.Join(filepath.Dir(d.dir), "out.img")
	mustRun(t, "export", "vm1@one", out, "--control", d.control)
	if got := readFile(t, out); string(got[100:105]) != "first" || len(got) != 1<<20 {
		t.Errorf("export: %d bytes, %q", len(got), got[100:105])
	}
	d.wantNoOrphans(t)
	// A client that stays does not delay the end.
	c = dial(t, d.uri("vm1"))
	writeAt(t, c, []byte("third"), 100)
	began := time.Now()
	d.terminate(t)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v to end", took)
	}
	for _, path := range []string{d.control, filepath.Join(d.dir, "nbd.sock")} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	d.start(t)
	got := make([]byte, 5)
	if _, err := dial(t, d.uri("vm1")).ReadAt(got, 100); err != nil || string(got) != "third" {
		t.Errorf("after SIGTERM: %q, %v", got, err)
	}
	d.terminate(t)
	d.wantSound(t)
}

// Clients on TCP have the rights of their certificates; SIGHUP reads the rights, the certificates and the policies again.
func TestDaemonAccess(t *testing.T) {
	dir := t.TempDir()
	a, err := testcerts.NewAuthority("for a test")
	if err == nil {
		err = a.Write(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	rules, policies := filepath.Join(dir, "rules"), filepath.Join(dir, "policies")
	writeFile(t, rules, []byte("client base read\n"))
	writeFile(t, policies, []byte("* max-nodes=1\n"))
	d := newDaemonProcess(t, "--listen", "127.0.0.1:0", "--tls-certificates", dir, "--access", rules, "--policies", policies)
	address, err := d.stdout.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, "fork", "base", "vm1", "--control", d.control)
	dmsnap("fork", "base", "vm2", "--control", d.control).wantRefused(t, "policy allows 1")
	mustRun(t, "export", "vm1", filepath.Join(t.TempDir(), "out"), "--control", d.control) // over the unix socket, which has no TLS
	config, err := source.LoadTLS(dir)
	if err != nil {
		t.Fatal(err)
	}
	uri := strings.TrimSpace(address) + "vm1"
	try := func() (read, write error) {
		c, err := nbd.DialTLS(t.Context(), uri, config)
		if err != nil {
			return err, err
		}
		defer c.Close()
		_, read = c.ReadAt(make([]byte, 512), 0)
		_, write = c.WriteAt(make([]byte, 512), 0)
		return read, write
	}
	if read, write := try(); read != nil || write == nil {
		t.Errorf("with the right to read: read %v, write %v", read, write)
	}
	if _, err := nbd.Dial(t.Context(), strings.Replace(uri, "nbds", "nbd", 1)); err == nil {
		t.Error("a client without TLS was accepted")
	}
	reload := func(rule string, want func(read, write error) bool) {
		t.Helper()
		writeFile(t, rules, []byte(rule))
		d.Process.Signal(syscall.SIGHUP)
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			read, write := try()
			if want(read, write) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%q has no effect: read %v, write %v", rule, read, write)
			}
		}
	}
	writeFile(t, policies, []byte("* max-nodes=2\n"))
	reload("client base write\n", func(read, write error) bool { return read == nil && write == nil })
	mustRun(t, "fork", "base", "vm2", "--control", d.control)
	reload("client other admin\n", func(read, _ error) bool { return read != nil && strings.Contains(read.Error(), "no right") })
	// Another authority: the old client is refused.
	b, err := testcerts.NewAuthority("another")
	if err == nil {
		err = b.Write(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	reload("client base write\n", func(read, _ error) bool { return read != nil && !strings.Contains(read.Error(), "no right") })
	if config, err = source.LoadTLS(dir); err != nil {
		t.Fatal(err)
	}
	reload("client base write\n", func(read, write error) bool { return read == nil && write == nil })
	d.terminate(t)
	if !strings.Contains(d.stderr.String(), "no right") {
		t.Errorf("refusals are not logged: %s", &d.stderr)
	}
}

// Users whom the mode of the sockets lets in do what names no path.
func TestDaemonOfOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: no process of another user")
	}
	d := newDaemonProcess(t, "--socket-mode", "0666", "--socket-group", "0")
	k := &kit{dir: filepath.Join(filepath.Dir(d.dir), "x")}
	for _, dir := range []string{d.dir, filepath.Dir(d.dir)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if o := k.callAs(t, "fork", "base", "vm1", "--control", d.control); o.status != exitDone {
		t.Errorf("fork: %+v", o)
	}
	if o := k.callAs(t, "status", "--control", d.control, "--json"); o.status != exitDone || !strings.Contains(o.out, `"rights": "write"`) {
		t.Errorf("status: %+v", o)
	}
	for _, args := range [][]string{{"disk", "add", "x", d.disk}, {"disk", "remove", "base"}, {"policy", "base", "max-nodes=1"}, {"adopt", "x", d.disk, "--disk", "base"}, {"merge", "vm1"}} {
		k.callAs(t, append(args, "--control", d.control)...).wantRefused(t, "requires the right admin")
	}
	d.terminate(t)
}
