package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/nbd"
)

// newServedDisk is a daemon with the node vm1 over a disk of size bytes, with the checkpoints a and b. It returns what those
// show.
func newServedDisk(t *testing.T, size int) (d *daemonProcess, a, b []byte) {
	t.Helper()
	d = newDaemonProcess(t)
	big := filepath.Join(filepath.Dir(d.dir), "big.img")
	content := blocktest.Pattern(size, 1)
	clear(content[size/2:])
	writeFile(t, big, content)
	mustRun(t, "disk", "add", "big", big, "--control", d.control)
	mustRun(t, "fork", "big", "vm1", "--control", d.control)
	c := dial(t, d.uri("vm1"))
	defer c.Close()
	for i, name := range []string{"a", "b"} {
		for off := 0; off < size; off += 256 << 10 {
			if _, err := c.WriteAt(blocktest.Pattern(128<<10, uint64(off+i)), int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		mustRun(t, "checkpoint", "vm1", "--name", name, "--control", d.control)
		out := filepath.Join(filepath.Dir(d.dir), name+".img")
		mustRun(t, "export", "vm1@"+name, out, "--control", d.control)
		if a = b; i == 0 {
			a = nil
		}
		b = readFile(t, out)
	}
	return d, a, b
}

// A sender, a receiver and a daemon that are killed at any moment, while a client writes: repeating completes the copy, and the
// daemon keeps nothing.
func TestSendFromADaemonKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	d, was, is := newServedDisk(t, 32<<20)
	target := filepath.Join(filepath.Dir(d.dir), "copy.img")
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1)) // a moment is what this test is about
	transfer := func(killed int, after time.Duration) (complete bool) {
		pr, pw, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var said bytes.Buffer
		receiver := exec.Command(program(t), "receive", "-", target)
		sender := exec.Command(program(t), "send", "vm1@b", "--since", "a", "--control", d.control)
		receiver.Stdin, sender.Stdout, sender.Stderr = pr, pw, &said
		for _, c := range []*exec.Cmd{receiver, sender} {
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			late := time.AfterFunc(time.Minute, func() { c.Process.Kill() })
			defer late.Stop()
		}
		pr.Close()
		pw.Close()
		time.Sleep(after)
		switch killed {
		case 1:
			sender.Process.Kill()
		case 2:
			receiver.Process.Kill()
		case 3:
			d.kill(t)
		}
		sent, received := sender.Wait(), receiver.Wait()
		if sent != nil && killed == 0 {
			t.Error(&said)
		}
		return sent == nil && received == nil
	}
	writeFile(t, target, was)
	began := time.Now()
	if !transfer(0, 0) {
		t.Fatal("left alone it fails")
	}
	took := time.Since(began)
	rounds, cut := 4, 0
	if os.Getenv("DMSNAP_DEEP") != "" {
		rounds = 200
	}
	for round := range rounds {
		writeFile(t, target, was)
		for killed := 1; killed <= 4; killed++ {
			c, err := nbd.Dial(t.Context(), d.uri("vm1"))
			if err != nil {
				t.Fatal(err)
			}
			var writer sync.WaitGroup
			stop := make(chan struct{})
			writer.Go(func() {
				defer c.Close()
				for n := uint64(0); ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := c.WriteAt(blocktest.Pattern(4096, n), int64(n*4096%(32<<20))); err != nil {
						return
					}
				}
			})
			complete := transfer(killed, time.Duration(r.Int64N(int64(took))))
			close(stop)
			writer.Wait()
			if killed == 3 {
				d.start(t)
			}
			if !complete {
				cut++
			}
			if killed == 4 && !complete {
				t.Fatalf("round %d: left alone it fails: %s", round, &d.stderr)
			}
		}
		if !bytes.Equal(readFile(t, target), is) {
			t.Fatalf("round %d: the copy is not vm1@b", round)
		}
	}
	t.Logf("%d of %d were cut short", cut, 3*rounds)
	if cut == 0 {
		t.Error("none was cut short")
	}
	for _, name := range []string{"vm1", "vm1@b", "vm1@a"} {
		mustRun(t, "drop", name, "--control", d.control)
	}
	mustRun(t, "fork", "big", "vm2", "--control", d.control)
	d.wantNoOrphans(t)
	d.terminate(t)
	d.wantSound(t)
}

// A checkpoint of a daemon is pushed, while the node goes on, and is the origin of verbs.
func TestPushFromADaemon(t *testing.T) {
	d, _, is := newServedDisk(t, 4<<20)
	ref := testremote.Start(t, testremote.NewRegistry()) + "/vms/vm1"
	out := filepath.Join(t.TempDir(), "out.img")
	if got := mustRun(t, "push", "vm1", ref+":b", "--control", d.control, "--json"); !strings.Contains(got, `"layers": 3`) {
		t.Error(got)
	}
	mustRun(t, "export", "oci://"+ref+":b", out, "--cache-dir", t.TempDir())
	if !bytes.Equal(readFile(t, out), is) {
		t.Error("what was pushed is not vm1@b")
	}
	for args, says := range map[string]string{
		"push vm1 more " + ref:             "NODE and REF are required",
		"push vm2 " + ref:                  "no node",
		"send vm1 more":                    "one NODE is required",
		"send vm1 --since c":               "it is made of big, vm1@a, vm1@b",
		"send vm1@c":                       "no disk, node or checkpoint",
		"send vm1 --output " + d.disk:      "exists",
		"send vm1 --resume-from 1TiB -o x": "outside a disk",
	} {
		if o := dmsnap(append(strings.Fields(args), "--control", d.control)...); o.status != exitTrouble || !strings.Contains(o.stderr, says) {
			t.Errorf("%s: status %d, %s", args, o.status, o.stderr)
		}
	}
	d.terminate(t)
	d.wantSound(t)
}
