package interop_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestInteropKillLoop kills the server again and again while fio writes to the snapshot and to the origin,
// and has fio verify afterwards what it had flushed before. The disk is cut in parts:
//
//	0        32 MiB     48 MiB     64 MiB
//	| proven  | load     | kept    |
//
// In each round fio writes a piece of the first part in random order, each block with a checksum and its
// place, and flushes; no round has a piece that another had, so nothing old passes for new. Writers of the
// second part, and of the whole origin, go on till the server is killed. The third part is never written in
// the snapshot and must show what the origin held in the beginning.
func TestInteropKillLoop(t *testing.T) {
	fio := fioWithNBD(t)
	rounds := 6
	if os.Getenv("DMSNAP_DEEP") != "" {
		rounds = 300
	}
	const piece = 64 << 10
	w, disk := standard(t)
	r := rand.New(rand.NewPCG(1, 2))
	fioArgs := func(name, export string, off, size int, more ...string) []string {
		return append([]string{"--name=" + name, "--ioengine=nbd", "--uri=" + w.uris[export], "--bs=4k", "--iodepth=8",
			"--rw=randwrite", fmt.Sprint("--offset=", off), fmt.Sprint("--size=", size)}, more...)
	}
	verified := []string{"--verify=crc32c", "--randseed=7", "--allrandrepeat=1"}
	for round := range rounds {
		began := time.Now()
		var loads []*exec.Cmd
		for export, part := range map[string][2]int{"snap": {32 << 20, 16 << 20}, "origin": {0, 64 << 20}} {
			load := exec.Command(fio, fioArgs("load", export, part[0], part[1], "--time_based", "--runtime=60", fmt.Sprint("--randseed=", round))...)
			load.Dir = w.dir
			if err := load.Start(); err != nil {
				t.Fatal(err)
			}
			loads = append(loads, load)
		}
		w.run(fio, fioArgs("proven", "snap", round*piece, piece, append(verified, "--do_verify=0", "--end_fsync=1")...)...)
		w.awaitWrite("disk.img", began)
		time.Sleep(time.Duration(r.IntN(100)) * time.Millisecond) // when it is killed is up to chance
		w.cmd.Process.Kill()
		w.cmd.Wait()
		for _, load := range loads {
			if err := load.Wait(); err == nil {
				t.Errorf("round %d: a writer ended without an error although its server was killed: %v", round, load.Args)
			}
		}
		w.dmsnap("check", "snap.cow")
		w.serveStandard()
		w.run(fio, fioArgs("proven", "snap", round*piece, piece, append(verified, "--verify_only=1")...)...)
	}
	for round := range rounds {
		w.run(fio, fioArgs("proven", "snap", round*piece, piece, append(verified, "--verify_only=1")...)...)
	}
	// A piece that nobody wrote is not verified: the check can fail.
	never := exec.Command(fio, fioArgs("proven", "snap", rounds*piece, piece, append(verified, "--verify_only=1")...)...)
	never.Dir = w.dir
	if err := never.Run(); err == nil {
		t.Error("fio verifies what was never written")
	}
	w.stop()
	w.dmsnap("export", "disk.img", "snap.cow", "view.img")
	same(t, "what was never written in the snapshot", w.read("view.img")[48<<20:], disk[48<<20:])
	if bytes.Equal(w.read("disk.img")[48<<20:], disk[48<<20:]) {
		t.Error("nothing was written to that part of the origin")
	}
	t.Logf("%d kills under fio, what it had flushed verified after each", rounds)
}

// awaitWrite waits until a file has been written since began. Acknowledged origin writes wait in the server's memory
// for a while, and a writer takes its time to start on a busy machine: a server that is killed earlier leaves the
// origin as it was.
func (w *world) awaitWrite(name string, began time.Time) {
	w.t.Helper()
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		info, err := os.Stat(w.path(name))
		if err != nil {
			w.t.Fatal(err)
		}
		if info.ModTime().After(began) {
			return
		}
		if d := time.Since(start); d > time.Minute {
			w.t.Fatalf("nothing was written to %s for %v; the server's log:\n%s", name, d, w.log)
		}
	}
}

// fioWithNBD finds a fio that speaks NBD, or skips the test with SKIPPED.
func fioWithNBD(t *testing.T) string {
	t.Helper()
	fio := tool(t, "fio", "fio")
	if out, err := exec.Command(fio, "--enghelp").CombinedOutput(); err != nil || !bytes.Contains(out, []byte("nbd")) {
		t.Skip("SKIPPED: this fio has no nbd engine")
	}
	return fio
}
