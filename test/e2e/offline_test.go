package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// What a world does between two runs of its server: offline verbs, which must show the same.

// opOffline runs one verb on a snapshot that is valid.
func (w *world) opOffline() {
	var sound []*view
	for _, v := range w.views {
		if !v.invalid {
			sound = append(sound, v)
		}
	}
	if len(sound) == 0 {
		return
	}
	v := sound[w.r.IntN(len(sound))]
	out := filepath.Join(w.cowDir, "out")
	// Content that can't be distinguished may be lost: only the model's present content counts from here.
	switch w.r.IntN(8) {
	case 0:
		w.offline("compact", v)
		args := []string{"compact", v.cow, out}
		if w.chance(50) {
			args = append(args, "--origin", w.originPath, "--drop-unchanged")
		}
		if w.chance(30) {
			args = append(args, "--origin", w.originPath, "--chunk-size", chunkSizes[w.r.IntN(len(chunkSizes))])
		}
		w.want(0, run(args...))
		w.want(0, run("check", out))
		w.shows(out, v.d)
	case 1:
		w.offline("punch", v)
		w.want(0, run("compact", v.cow, "--punch"))
		w.check(v, "DS013", "DS022")
		w.shows(v.cow, v.d)
	case 2:
		w.offline("repair", v)
		w.want(0, run("repair", v.cow, out))
		w.want(0, run("check", out))
		w.shows(out, v.d)
	case 3:
		w.offline("rescue", v)
		w.want(0, run("rescue", w.originPath, v.cow, out))
		got, err := os.ReadFile(out)
		w.must(err, "rescue")
		w.must(v.d.observe(0, got), "rescue")
	case 4:
		w.offline("dump and restore", v)
		text := filepath.Join(w.dir, "text")
		w.want(0, run("dump", v.cow, "--data", "--output", text))
		w.want(0, run("restore", text, out))
		w.must(os.Remove(text), "dump")
		w.shows(out, v.d)
	case 5:
		w.offline("diff", v)
		w.diff(v)
	case 6, 7:
		if len(w.views) == 1 || w.chance(10) {
			w.offlineMerge(v)
		}
	}
	if err := os.Remove(out); err != nil && !errors.Is(err, os.ErrNotExist) {
		w.fail("%w", err)
	}
	w.must(syncDir(w.cowDir), "COW folder")
}

func (w *world) offline(what string, v *view) {
	w.logf("%s %s", what, v.name)
	w.count(what)
}

// shows checks what a store shows over the origin.
func (w *world) shows(cow string, d *device) {
	got := []byte(w.want(0, run("export", w.originPath, cow, "-")).out)
	if len(got) != len(d.now) {
		w.fail("export of %s has %d bytes", cow, len(got))
	}
	w.must(d.observe(0, got), "export of "+cow)
}

// diff checks that diff --verify names the sectors that differ, and no others.
func (w *world) diff(v *view) {
	o := run("diff", w.originPath, v.cow, "--verify", "--format", "ranges")
	differs := make([]bool, w.size/sectorSize)
	for line := range strings.Lines(o.out) {
		f := strings.Fields(line)
		if len(f) != 2 {
			w.fail("%v", o)
		}
		off, err1 := strconv.ParseInt(f[0], 10, 64)
		n, err2 := strconv.ParseInt(f[1], 10, 64)
		if err1 != nil || err2 != nil || off%sectorSize != 0 || off+n > w.size {
			w.fail("%v", o)
		}
		sectors(off, n, func(s, _, _ int64) { differs[s] = true })
	}
	any := 0
	for s, says := range differs {
		if really := !bytes.Equal(v.d.sector(int64(s)), w.origin.sector(int64(s))); really != says {
			w.fail("diff of %s: sector %d differs: %v, it says %v", v.name, s, really, says)
		} else if really {
			any = 1
		}
	}
	w.want(any, o)
}

// offlineMerge merges a snapshot, sometimes interrupted and started again. Afterwards it is removed, and so are the
// others, whose origin has been changed without them.
func (w *world) offlineMerge(v *view) {
	w.offline("offline merge", v)
	args := []string{"merge", w.originPath, v.cow}
	undo := ""
	if w.chance(40) {
		undo = filepath.Join(w.cowDir, "undo")
		args = append(args, "--undo", undo)
	}
	old, cut := w.origin, false
	for range w.r.IntN(3) {
		signal := []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[w.r.IntN(2)]
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(w.r.IntN(25000))*time.Microsecond)
		o := runUntil(ctx, signal, args...)
		cancel()
		w.logf("cut short by %v: status %d", signal, o.status)
		if o.status != 0 && o.status != -1 && !(o.status == 143 && signal == syscall.SIGTERM) {
			w.fail("%v", o)
		}
		w.want(0, run("check", v.cow, "--level", "error"))
		w.shows(v.cow, v.d)
	}
	if w.fs != nil && w.chance(40) {
		// The power fails in the middle. Nothing was acknowledged by the merge, but nothing may be lost.
		done := make(chan outcome)
		go func() { done <- run(args...) }()
		time.Sleep(time.Duration(w.r.IntN(15000)) * time.Microsecond)
		w.must(w.fs.PowerOff(), "faultfs")
		o := <-done
		lost, err := w.fs.PowerOn(w.r.Uint64())
		w.must(err, "faultfs")
		cut = true
		w.logf("power cut: status %d, %d sectors lost", o.status, lost)
		w.count("cut in offline merge")
		w.want(0, run("check", v.cow, "--level", "error"))
		got := []byte(w.want(0, run("export", w.originPath, v.cow, "-")).out)
		if err := v.d.found(got, nil, true); err != nil {
			w.fail("%s after a power cut in an offline merge: %w", v.name, err)
		}
	}
	w.want(0, run(args...))
	got, err := os.ReadFile(w.originPath)
	w.must(err, "origin")
	if err := v.d.found(got, nil, true); err != nil {
		w.fail("the merged origin: %w", err)
	}
	w.want(0, run("check", v.cow))
	if undo != "" {
		if cut { // and what the server had not flushed may be gone
			got := []byte(w.want(0, run("export", w.originPath, undo, "-")).out)
			if err := old.found(got, nil, true); err != nil {
				w.fail("the undo store after a power cut in an offline merge: %w", err)
			}
		}
		w.shows(undo, old)
		if w.chance(50) {
			w.logf("taken back")
			w.want(0, run("merge", w.originPath, undo))
			got, err := os.ReadFile(w.originPath)
			w.must(err, "origin")
			if err := old.observe(0, got); err != nil {
				w.fail("after the merge was taken back: %w", err)
			}
			old.certain()
			v.d = old
		}
		w.must(os.Remove(undo), "undo")
	}
	w.origin = v.d
	w.origin.certain()
	for _, o := range append([]*view(nil), w.views...) {
		w.remove(o)
	}
	w.newView(true)
}

// parts are left by verbs that were killed.
func (w *world) removeParts() {
	list, err := filepath.Glob(filepath.Join(w.cowDir, ".*.part"))
	w.must(err, "left-overs")
	for _, p := range list {
		w.must(os.Remove(p), "left-over")
	}
}
