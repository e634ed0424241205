package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// budget is how long the random tests may go on, all together: DMSNAP_E2E_TIME, or a default.
func budget(t *testing.T) time.Duration {
	if text := os.Getenv("DMSNAP_E2E_TIME"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatalf("DMSNAP_E2E_TIME: %v", err)
		}
		return d
	}
	switch {
	case deep:
		return 2 * time.Hour
	case testing.Short() || raceEnabled:
		return 8 * time.Second
	}
	return 40 * time.Second
}

// TestFuzz runs random schedules, each from one seed, until its time is up. DMSNAP_SEED replays one.
func TestFuzz(t *testing.T) {
	program()
	if seed, given := seedOf(t); given {
		if err := runSeed(t, seed, true, map[string]int{}); err != nil {
			t.Fatal(err)
		}
		return
	}
	first := uint64(time.Now().UnixNano())
	counts := map[string]int{}
	end := time.Now().Add(budget(t) * 3 / 4)
	seeds, failures := uint64(0), 0
	for ; time.Now().Before(end); seeds++ {
		seed := first + seeds
		if err := runSeed(t, seed, false, counts); err != nil {
			t.Errorf("seed %d (DMSNAP_SEED=%[1]d go test ./test/e2e -run TestFuzz):\n%v", seed, err)
			if failures++; failures == 5 || !deep {
				break
			}
		}
	}
	t.Logf("%d seeds from %d: %v", seeds, first, counts)
}

// runSeed runs the schedule of a seed and adds up what happened in it.
func runSeed(t *testing.T, seed uint64, talk bool, counts map[string]int) (err error) {
	dir, err := os.MkdirTemp(scratch, "f")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var f *faultfs.FS
	if seed%4 != 0 && os.Getenv("DMSNAP_E2E_PLAIN") == "" {
		if err := os.Mkdir(dir+"/m", 0o700); err != nil {
			t.Fatal(err)
		}
		f, err = faultfs.Start(dir + "/m")
		switch {
		case errors.Is(err, faultfs.ErrUnavailable):
			t.Logf("SKIPPED power cuts and injected errors: %v", err)
			f = nil
		case err != nil:
			t.Fatal(err)
		default:
			defer func() {
				if e := f.Close(); e != nil {
					t.Error(e)
				}
			}()
			for _, name := range []string{"o", "c"} {
				if err := f.Folder(name, 0); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	w := &world{}
	defer func() {
		if w.server != nil {
			w.forgetAll("")
			if f != nil {
				f.PowerOff() // releases what hangs
			}
			w.server.kill()
			if f != nil {
				f.PowerOn(0)
			}
		}
		for name, n := range w.counts {
			counts[name] += n
		}
		switch p := recover().(type) {
		case nil:
			if talk {
				t.Logf("seed %d:\n%s\n%v", seed, strings.Join(w.log, "\n"), w.counts)
			}
		case fault:
			last := w.log[max(0, len(w.log)-300):]
			if talk {
				last = w.log
			}
			err = fmt.Errorf("%s\nFAULT: %w", strings.Join(last, "\n"), p.error)
		default:
			panic(p)
		}
	}()
	w.create(seed, dir, f)
	w.fuzz()
	return nil
}

// fuzz is the run of a world.
func (w *world) fuzz() {
	ops := []struct {
		weight int
		do     func()
	}{
		{30, w.opWrite}, {8, w.opZero}, {5, w.opTrim}, {15, w.opRead}, {6, w.opFlush}, {5, w.opStatus}, {4, w.opBatch},
		{2, w.opVanish}, {2, w.opWrongRequest}, {1, w.opRefusedVerb}, {2, w.opAttach}, {1, w.opDrop}, {1, w.opGrow}, {3, w.opMerge},
	}
	total := 0
	for _, o := range ops {
		total += o.weight
	}
	runs := 2 + int(w.seed%4)
	for run := range runs {
		w.next()
		w.start()
		inject := -1
		steps := 20 + w.r.IntN(100)
		if w.chance(30) {
			inject = steps * (50 + w.r.IntN(50)) / 100
		}
		how := []string{"term", "term", "kill", "cut", "cut"}[w.r.IntN(5)]
		if how == "cut" && w.fs == nil {
			how = "kill"
		}
		for i := range steps {
			w.next()
			if i == inject {
				w.opInject()
			}
			n := w.r.IntN(total)
			for _, o := range ops {
				if n -= o.weight; n < 0 {
					o.do()
					break
				}
			}
		}
		w.next()
		if w.anyLate() {
			w.answered()
		}
		if how != "kill" || w.chance(50) {
			w.readAll()
		}
		if how != "term" && w.chance(50) {
			w.leaveWrites()
		}
		w.stop(how)
		// A snapshot that is lost makes space for another.
		for _, v := range slices.Clone(w.views) {
			if v.invalid && w.chance(60) {
				w.logf("remove %s", v.name)
				w.remove(v)
			}
		}
		if len(w.views) == 0 {
			w.newView(true)
		}
		if run < runs-1 || w.chance(50) {
			for range w.r.IntN(3) {
				w.next()
				w.opOffline()
				w.removeParts()
			}
		}
	}
}

// leaveWrites sends writes and does not wait for their answers: the end comes while they are under way.
func (w *world) leaveWrites() {
	if w.limited && w.policy == "pause" {
		return
	}
	export := w.some()
	c, d := w.conn(export), w.modelOf(export)
	for range 1 + w.r.IntN(30) {
		off, n := w.sectorSpan()
		p := w.content(n)
		if _, err := c.send(cmdWrite, 0, off, n, p); err != nil {
			w.fail("send: %w", err)
		}
		d.attempt(off, p, true)
	}
	w.logf("writes of %s are left under way", export)
}
