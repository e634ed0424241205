package kernel_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/snapshot"
)

// TestDifferential runs random scripts in the kernel and in dmsnap and wants to see the same after every
// step: outcome, origin, views, status and table lines, and the stores byte for byte.
//
// DMSNAP_SCRIPTS is how many scripts (60), DMSNAP_SEED the seed of the only one to run.
func TestDifferential(t *testing.T) {
	need(t)
	n, first := environment(t, "DMSNAP_SCRIPTS", 60), uint64(1)
	if seed := environment(t, "DMSNAP_SEED", 0); seed != 0 {
		n, first = 1, seed
	}
	for i := range n {
		seed := first + i
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			s := newScript(seed)
			d := runScript(t, s)
			if d == nil {
				return
			}
			small, last := shrink(t, s, d)
			t.Errorf("the two sides part after step %d:\n%s\n%v\nreplay: DMSNAP_SEED=%d make test-kernel RUN=TestDifferential",
				last.step, strings.Join(last.what, "\n"), small, seed)
		})
	}
}

func environment(t *testing.T, name string, otherwise uint64) uint64 {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// A divergence is the first step after which the two sides are not the same.
type divergence struct {
	step int
	what []string
}

// runScript does a script on both sides. Two engines run beside the kernel: one that makes every write
// durable at once, whose stores are compared after every step, and one that waits for flushes, whose
// stores are compared when one came and at the end.
func runScript(t *testing.T, s script) *divergence {
	t.Helper()
	k := newKernel(t, sharedMachine(t))
	defer k.clear()
	s.snaps = slices.Clone(s.snaps) // growth changes them
	th := newTheirs(k, s, nil)
	var engines []*ours
	for _, mode := range []snapshot.SyncMode{snapshot.SyncAlways, snapshot.SyncFlush} {
		own := s
		own.snaps = slices.Clone(s.snaps)
		e, err := newOurs(own, own.before(), mode, k.number)
		if err != nil {
			t.Fatal(err)
		}
		defer e.close()
		engines = append(engines, e)
	}
	compared := 0
	for i, st := range s.steps {
		st, ok := engines[0].fit(st)
		if !ok {
			continue
		}
		want := th.step(st)
		for _, e := range engines {
			outcome, err := e.do(st)
			if err != nil {
				return &divergence{i, []string{fmt.Sprintf("%v: dmsnap: %v", st, err)}}
			}
			flushed := st.kind == doFlush || st.kind == doMerge || i == len(s.steps)-1
			if flushed {
				e.flush()
			}
			got := e.observe(outcome)
			if e.sync == snapshot.SyncFlush {
				got = got.without(got)
			}
			if d := want.differences(got, flushed || e.sync == snapshot.SyncAlways); d != nil {
				return &divergence{i, append(d, fmt.Sprintf("at %v, sync mode %d", st, e.sync))}
			}
		}
		compared++
	}
	tally.add(func(c *counts) { c.scripts++; c.operations += compared; c.observations += 2 * compared })
	return nil
}

// shrink leaves steps and snapshots out of a script as long as the two sides still part.
func shrink(t *testing.T, s script, d *divergence) (script, *divergence) {
	s.steps = s.steps[:d.step+1]
	for size, tries := len(s.steps)/2, 0; size >= 1 && tries < 60; {
		smaller := false
		for at := 0; at+size <= len(s.steps) && tries < 60; tries++ {
			c := s
			c.steps = slices.Concat(s.steps[:at], s.steps[at+size:])
			if e := runScript(t, c); e != nil {
				c.steps = c.steps[:e.step+1]
				s, d, smaller = c, e, true
			} else {
				at += size
			}
		}
		if !smaller {
			size /= 2
		}
	}
	return s, d
}
