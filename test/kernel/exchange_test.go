package kernel_test

import (
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/snapshot"
)

// A stage is a state of a store in which it changes hands: steps that lead there, and how many steps of
// a merge come behind them.
type stage struct {
	name string
	s    script
	half bool // merge about half of it
}

// stages returns the states of a life: nothing yet, around the edges of areas, full, overflowed, given
// up, and half merged, for chunk sizes from the smallest to the largest that LVM makes.
func stages() []stage {
	var all []stage
	add := func(name, store string, chunk, exceptions, cowChunks int64, more int64, half bool) {
		s := script{originSectors: chunk*(exceptions+more+9) + chunk/2,
			snaps: []snapConf{{store: store, chunk: chunk, cowSectors: cowChunks * chunk}}}
		s.snaps[0].length = s.originSectors
		s.steps = fill(chunk, exceptions+more)
		all = append(all, stage{fmt.Sprintf("c=%d/%s", chunk, name), s, half})
	}
	needed := func(chunk, exceptions int64) int64 { return exceptions + 2 + exceptions/(32*chunk) }
	for _, c := range []int64{1, 2, 8} {
		e := 32 * c
		for _, d := range []int64{e - 1, e, e + 1, 2 * e} {
			add(fmt.Sprintf("%d exceptions", d), "P", c, d, needed(c, d)+20, 0, false)
		}
	}
	for _, c := range []int64{1, 8, 32, 128, 1024} {
		d := min(45*c, 50, 8192/c)
		add("fresh", "P", c, 0, 20, 0, false)
		add("some", "PO", c, 7, 30, 0, false)
		add("full", "P", c, d, needed(c, d), 0, false)
		add("overflowed", "PO", c, d, needed(c, d), 1, false)
		add("invalid", "P", c, d, needed(c, d), 1, false)
		add("half merged", "P", c, d, needed(c, d)+5, 0, true)
	}
	return all
}

// fill makes steps for the given number of exceptions: one chunk in four by a write to the origin, the others in pairs
// by writes to the snapshot, in an order that leaves short runs.
func fill(chunk, exceptions int64) []step {
	var steps []step
	bytes := chunk * 512
	for i := int64(0); i < exceptions; {
		target, n := 0, int64(1)
		switch i % 4 {
		case 0:
			target = origin
		case 1:
			n = min(2, exceptions-i)
		}
		// Blocks of four chunks change places in pairs.
		at := i ^ 4
		if at/8*8+8 > exceptions {
			at = i
		}
		steps = append(steps, step{kind: doWrite, target: target, off: at * bytes, n: n * bytes, seed: uint64(1000 + i)})
		i += n
	}
	return steps
}

// afterwards is what is done to a store that changed hands: writes to both sides, of all alignments,
// removal and set-up, and the merge into the origin.
func afterwards(s script) []step {
	c, end := s.snaps[0].chunk*512, s.originSectors*512
	return []step{
		{kind: doWrite, target: 0, off: 512, n: c, seed: 1},
		{kind: doWrite, target: origin, off: end - c, n: c, seed: 2},
		{kind: doFlush, target: 0},
		{kind: doDetach, target: 0},
		{kind: doAttach, target: 0},
		{kind: doWrite, target: 0, off: end - 512, n: 512, seed: 3},
		{kind: doWrite, target: origin, off: 2*c + c/2/512*512, n: 512, seed: 4},
		{kind: doFlush, target: 0},
		{kind: doMerge, target: 0},
	}
}

// TestExchange hands stores over in both directions at all stages: the other side shows
// the same content and status, takes further writes the same way, and merges to the same origin.
func TestExchange(t *testing.T) {
	need(t)
	for _, st := range stages() {
		t.Run(st.name, func(t *testing.T) {
			t.Run("theirs", func(t *testing.T) { exchange(t, st, false) })
			t.Run("ours", func(t *testing.T) { exchange(t, st, true) })
		})
	}
}

func exchange(t *testing.T, st stage, oursFirst bool) {
	k := newKernel(t, sharedMachine(t))
	number := func(string) string { return "" }
	var b images
	if oursFirst {
		o, err := newOurs(st.s, st.s.before(), snapshot.SyncFlush, number)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range st.s.steps {
			if _, err := o.do(s); err != nil {
				t.Fatal(err)
			}
		}
		o.close()
		if st.half {
			mergeSome(t, o, len(st.s.steps)/3)
		}
		b = o.images()
	} else {
		th := newTheirs(k, st.s, nil)
		th.write(st.s.steps)
		b = th.images()
		if st.half {
			k.mergeFor(60, st.s.originSectors, st.s.snaps[0])
			b = th.images()
		}
		k.clear()
	}
	handedOver(t, k, st.s, b)
}

// handedOver gets what both sides have before they load a store: they must agree on it, and on all that is done to it
// afterwards.
func handedOver(t *testing.T, k *kernel, s script, b images) {
	t.Helper()
	th := newTheirs(k, s, &b)
	o, err := newOurs(s, b, snapshot.SyncAlways, k.number)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	check := func(what string, want observation, outcome string) {
		t.Helper()
		if d := want.differences(o.observe(outcome), true); d != nil {
			t.Fatalf("%s: %v", what, d)
		}
	}
	check("loaded", th.look("ok"), "ok")
	done := 0
	for _, next := range afterwards(s) {
		next, ok := o.fit(next)
		if !ok {
			continue
		}
		want := th.step(next)
		outcome, err := o.do(next)
		if err != nil {
			t.Fatal(err)
		}
		check(next.String(), want, outcome)
		done++
	}
	tally.add(func(c *counts) { c.exchanged++; c.operations += done + len(s.steps); c.observations += done + 1 })
}

// mergeSome merges so many runs and leaves the rest.
func mergeSome(t *testing.T, o *ours, steps int) {
	t.Helper()
	m, err := snapshot.NewOrigin(o.disk).LoadMerge(o.cows[0], snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	for range steps {
		if _, err := m.Step(0); err != nil {
			t.Fatal(err)
		}
	}
}
