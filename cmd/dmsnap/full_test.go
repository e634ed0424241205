package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
)

// servedFull serves a pair whose COW file has space for one chunk, and fills it.
func servedFull(t *testing.T, o serveOptions) (pair, *running) {
	t.Helper()
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow, "--cow-size", "12k")
	o.exportOrigin = true
	r := start(t, p, o, p.cow)
	writeAt(t, dial(t, r.uri("disk")), []byte("fits"), 0)
	return p, r
}

func (r *running) figures(t *testing.T) api.Snapshot {
	t.Helper()
	return mustJSON[api.Status](t, "status", "--control", r.control).Snapshots[0]
}

// By default a COW without space refuses what needs space, and nothing is lost.
func TestServeDefaultProtectsBothSides(t *testing.T) {
	if o := newServe().Flag("on-full"); o.DefValue != "fail" {
		t.Errorf("the default is %s", o.DefValue)
	}
	p, r := servedFull(t, serveOptions{onFull: fullFlag{server.FullFail}})
	c, o := dial(t, r.uri("disk")), dial(t, r.uri(server.OriginName))
	view := readAll(t, c)
	for _, dev := range []interface {
		WriteAt([]byte, int64) (int, error)
	}{c, o} {
		if _, err := dev.WriteAt([]byte("does not fit"), 40_000); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a write without space: %v", err)
		}
	}
	writeAt(t, c, []byte("needs none"), 100)
	copy(view[100:], "needs none")
	if got := readAll(t, c); !bytes.Equal(got, view) {
		t.Error("the snapshot changed")
	}
	if got := readAll(t, o); !bytes.Equal(got, p.content) {
		t.Error("the origin changed")
	}
	if st := r.figures(t); st.State != "ok" || !st.Valid || !st.Full || st.Dmsetup != "24/24 16" {
		t.Errorf("%+v", st)
	}
	mustRun(t, "grow", "--control", r.control, "disk", "20k")
	writeAt(t, c, []byte("fits now"), 40_000)
	if st := r.figures(t); st.Full || st.Dmsetup != "32/40 16" {
		t.Errorf("%+v", st)
	}
	dmsnap("grow", "--control", r.control, "disk", "16k").wantRefused(t, "can't be made shorter")
	dmsnap("grow", "--control", r.control, "else", "1M").wantRefused(t, "else")
	dmsnap("grow", p.cow, "1M").wantRefused(t, p.cow) // in use
	r.stop()
	mustRun(t, "grow", p.cow, "1M")
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Dmsetup != "32/2048 16" || st.Full {
		t.Errorf("%+v", st)
	}
	dmsnap("grow", p.cow, "1000").wantRefused(t, "can't be made shorter")
	dmsnap("grow", p.origin, "1M").wantRefused(t, p.origin)
}

// Writes that wait go on when the COW grows, when the snapshot is dropped and when it is merged; those to a dropped
// snapshot, and all at the end of the server, are answered with ESHUTDOWN.
func TestServePause(t *testing.T) {
	for _, way := range []string{"grow", "drop", "merge", "stop"} {
		t.Run(way, func(t *testing.T) {
			_, r := servedFull(t, serveOptions{onFull: fullFlag{server.FullPause}})
			c, o := dial(t, r.uri("disk")), dial(t, r.uri(server.OriginName))
			var both sync.WaitGroup
			var errC, errO error
			both.Go(func() { _, errC = c.WriteAt([]byte("waits"), 40_000) })
			both.Go(func() { _, errO = o.WriteAt([]byte("waits too"), 80_000) })
			r.awaitWaiting(2)
			began := time.Now()
			var wantC, wantO error
			switch way {
			case "grow":
				mustRun(t, "grow", "--control", r.control, "disk", "1M")
			case "drop":
				mustRun(t, "drop", "--control", r.control, "disk")
				wantC = fs.ErrClosed // ESHUTDOWN, in the words of the client
			case "merge":
				mustRun(t, "merge", "--control", r.control, "disk", "--wait")
			case "stop":
				r.stop()
				wantC, wantO = fs.ErrClosed, fs.ErrClosed
			}
			both.Wait()
			if !errors.Is(errC, wantC) || !errors.Is(errO, wantO) {
				t.Errorf("after it: %v, %v; want %v, %v", errC, errO, wantC, wantO)
			}
			if took := time.Since(began); took > 8*time.Second {
				t.Errorf("took %v", took)
			}
			if way != "merge" {
				return
			}
			if got := readAll(t, o); string(got[40_000:40_005]) != "waits" || string(got[80_000:80_009]) != "waits too" {
				t.Error("the origin does not show the writes that waited")
			}
		})
	}
}

// TestServePauseAfterARefusedMerge: a merge that is refused leaves waiting writes waiting, and the policy as it was.
func TestServePauseAfterARefusedMerge(t *testing.T) {
	_, r := servedFull(t, serveOptions{onFull: fullFlag{server.FullPause}})
	scratch := t.TempDir() + "/scratch"
	if err := os.WriteFile(scratch, make([]byte, 16<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "snapshot", "--control", r.control, "n", scratch, "--store", "N", "--chunk-size", "4k")
	c := dial(t, r.uri("n"))
	for i := range int64(4) {
		writeAt(t, c, []byte("fits"), 4096*i)
	}
	var both sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		both.Go(func() { _, errs[i] = dial(t, r.uri("n")).WriteAt([]byte("waits"), 40_000+8192*int64(i)) })
		r.awaitWaiting(int64(i) + 1)
		if i == 0 { // the second write begins after the refusal
			dmsnap("merge", "--control", r.control, "n").wantRefused(t)
		}
	}
	mustRun(t, "grow", "--control", r.control, "n", "64k")
	both.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

// A COW file that may grow does so by itself.
func TestServeGrows(t *testing.T) {
	p, r := servedFull(t, serveOptions{onFull: fullFlag{server.FullFail}, grow: sizeFlag{16 << 10, true}, growMax: sizeFlag{48 << 10, true}})
	c := dial(t, r.uri("disk"))
	for i := range int64(10) {
		writeAt(t, c, []byte{1}, i*4096)
	}
	if _, err := c.WriteAt([]byte{1}, 80_000*4); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("behind the end of growth: %v", err)
	}
	if st := r.figures(t); st.TotalSectors != 96 || !st.Full {
		t.Errorf("%+v", st)
	}
	r.stop()
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions != 10 {
		t.Errorf("%+v", st)
	}
}
