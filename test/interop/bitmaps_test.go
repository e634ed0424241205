package interop_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

// daemon starts a daemon with the base "disk" and the node vm1.
func (w *world) daemon() {
	w.t.Helper()
	w.log = new(bytes.Buffer)
	w.cmd = exec.Command(binary, "daemon", "--dir", "fleet", "--allow-path", ".")
	w.cmd.Dir, w.cmd.Stderr = w.dir, w.log
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.Contains(line, "://") {
		w.t.Fatalf("the daemon said %q, %v: %s", line, err, w.log)
	}
	w.control("disk", "add", "disk", "disk.img")
	w.control("fork", "disk", "vm1")
}

// control runs a verb on the daemon.
func (w *world) control(args ...string) string {
	w.t.Helper()
	return w.dmsnap(append(args, "--control", "fleet/control.sock")...)
}

// A stretch is a range of a disk.
type stretch struct{ off, length int64 }

// nbdinfoMap returns where nbdinfo finds a bit set in a context.
func (w *world) nbdinfoMap(nbdinfo, context, uri string) (set []stretch) {
	w.t.Helper()
	var list []struct{ Offset, Length, Type int64 }
	out := w.run(nbdinfo, "--map="+context, "--json", uri)
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	for _, e := range list {
		if e.Type&1 != 0 {
			set = append(set, stretch{e.Offset, e.Length})
		}
	}
	return set
}

// qemuMap returns where QEMU finds a dirty bitmap set: it maps that to no data.
func (w *world) qemuMap(qemuImg, bitmap, export, socket string) (set []stretch) {
	w.t.Helper()
	var list []struct {
		Start, Length int64
		Data          bool
	}
	out := w.run(qemuImg, "map", "--output=json", "--image-opts", "driver=nbd,export="+export+",server.type=unix,server.path="+socket+",x-dirty-bitmap="+bitmap)
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	for _, e := range list {
		if k := len(set) - 1; !e.Data && k >= 0 && set[k].off+set[k].length == e.Start {
			set[k].length += e.Length
		} else if !e.Data {
			set = append(set, stretch{e.Start, e.Length})
		}
	}
	return set
}

// pull makes a copy of what changed, as a backup program does that asks for a bitmap, by each client.
func (w *world) pull(clients map[string][]stretch, was, is []byte) {
	w.t.Helper()
	for client, set := range clients {
		copied, bytes := append([]byte(nil), was...), int64(0)
		for _, s := range set {
			copy(copied[s.off:], is[s.off:s.off+s.length])
			bytes += s.length
		}
		same(w.t, "a pull by what "+client+" says", copied, is)
		if bytes == 0 || bytes > 8<<20 {
			w.t.Errorf("%s: %d bytes changed", client, bytes)
		}
	}
}

// TestInteropBitmaps pulls what changed between two checkpoints of a daemon, and two snapshots of a server, while their clients write.
func TestInteropBitmaps(t *testing.T) {
	nbdinfo, nbdcopy := tool(t, "nbdinfo", "libnbd-bin"), tool(t, "nbdcopy", "libnbd-bin")
	qemuIO, qemuImg := tool(t, "qemu-io", "qemu-utils"), tool(t, "qemu-img", "qemu-utils")
	w := newWorld(t)
	w.write("disk.img", randomImage(imageSize, 1))
	w.daemon()
	uri := func(export string) string { return "nbd+unix:///" + export + "?socket=fleet/nbd.sock" }
	write := func(uri, commands string) {
		t.Helper()
		args := []string{"-f", "raw"}
		for c := range strings.SplitSeq(commands, ";") {
			args = append(args, "-c", strings.TrimSpace(c))
		}
		w.run(qemuIO, append(args, "-c", "flush", uri)...)
	}
	image := func(uri, name string) []byte {
		t.Helper()
		w.run(nbdcopy, uri, w.path(name))
		w.run(qemuImg, "compare", "-f", "raw", "-F", "raw", w.path(name), uri)
		return w.read(name)
	}
	write(uri("vm1"), "write -P 1 1M 256k; write -P 2 40M 64k")
	w.control("checkpoint", "vm1", "--name", "monday")
	write(uri("vm1"), "write -P 3 1000k 300k; write -z 41M 512k; write -P 4 63M 1M; write -P 5 5000 10")
	w.control("checkpoint", "vm1", "--name", "tuesday")
	write(uri("vm1"), "write -P 6 8M 4M")
	for _, since := range []string{"vm1@monday", "disk"} {
		was := randomImage(imageSize, 1)
		if since != "disk" {
			was = image(uri(since), "was.img")
		}
		bitmap := "qemu:dirty-bitmap:" + since
		w.pull(map[string][]stretch{"nbdinfo": w.nbdinfoMap(nbdinfo, bitmap, uri("vm1@tuesday")),
			"qemu-img": w.qemuMap(qemuImg, bitmap, "vm1@tuesday", "fleet/nbd.sock")}, was, image(uri("vm1@tuesday"), "is.img"))
	}
	// An incremental as an overlay: QEMU converts what differs from its backing file.
	w.run(qemuImg, "convert", "-f", "raw", "-O", "qcow2", "-B", w.path("was.img"), "-F", "raw", uri("vm1@tuesday"), "overlay.qcow2")
	w.run(qemuImg, "compare", "-F", "raw", "overlay.qcow2", w.path("is.img"))
	w.stop()

	w.write("disk.img", randomImage(imageSize, 1))
	w.dmsnap("create", "disk.img", "monday.cow")
	w.serve(2, "disk.img", "monday=monday.cow", "--export-origin", "--socket", w.path("nbd.sock"), "--control", w.path("ctl.sock"))
	write(w.uris["origin"], "write -P 1 1M 256k; write -P 2 40M 64k")
	w.dmsnap("snapshot", "tuesday", "tuesday.cow", "--create", "--control", "ctl.sock")
	write(w.uris["origin"], "write -P 3 1M 300k; write -z 50M 512k")
	tuesday := strings.Replace(w.uris["origin"], "/origin?", "/tuesday?", 1)
	bitmap := "qemu:dirty-bitmap:monday"
	w.pull(map[string][]stretch{"nbdinfo": w.nbdinfoMap(nbdinfo, bitmap, tuesday), "qemu-img": w.qemuMap(qemuImg, bitmap, "tuesday", "nbd.sock")},
		image(w.uris["monday"], "was.img"), image(tuesday, "is.img"))
	w.stop()
	for _, name := range []string{"monday.cow", "tuesday.cow"} {
		w.dmsnap("check", name, "--origin", "disk.img")
	}
}
