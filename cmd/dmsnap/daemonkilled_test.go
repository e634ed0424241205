package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// TestDaemonKilledUnderLoad kills the daemon at random moments while clients write numbers, and forks and checkpoints are
// made. After each start, what was flushed before is there, each operation that was acknowledged too, and no other file.
func TestDaemonKilledUnderLoad(t *testing.T) {
	rounds, operations := 4, 20
	if os.Getenv("DMSNAP_DEEP") != "" {
		rounds, operations = 300, 30
	} else if testing.Short() {
		t.Skip("long")
	}
	d := newDaemonProcess(t)
	const writers = 3
	for i := range writers {
		mustRun(t, "fork", "base", "vm"+strconv.Itoa(i), "--control", d.control)
	}
	var flushed [writers]uint64 // what each writer's disk has at least
	acknowledged := map[string]string{}
	r := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	made := 0
	for round := range rounds {
		var all sync.WaitGroup
		for i := range writers {
			c, err := nbd.Dial(t.Context(), d.uri("vm"+strconv.Itoa(i)))
			if err != nil {
				t.Fatalf("round %d: %v: %s", round, err, &d.stderr)
			}
			all.Go(func() {
				defer c.Close()
				for n := flushed[i] + 1; ; n++ {
					// In two places: both are there, or the second one is older.
					for _, off := range []int64{int64(i) * 4096, 500_000 + int64(i)*4096} {
						if _, err := c.WriteAt(fmt.Appendf(nil, "%020d", n), off); err != nil {
							return
						}
						if err := c.Flush(); err != nil {
							return
						}
					}
					flushed[i] = n
				}
			})
		}
		var names []string
		all.Go(func() {
			ctl := api.NewClient(d.control)
			for range operations { // a round
				node := fmt.Sprintf("vm%d", made%writers)
				name := fmt.Sprintf("n%d", made)
				made++
				if _, err := ctl.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{node}, Name: name}); err != nil {
					return
				}
				names = append(names, node+"@"+name)
				if _, err := ctl.Fork(t.Context(), api.ForkRequest{From: node, Name: name}); err != nil {
					return
				}
				names = append(names, name)
				if made%3 == 0 {
					names = names[:len(names)-1] // whether or not the reply comes
					if err := ctl.DropNode(t.Context(), name); err != nil {
						return
					}
				}
			}
		})
		time.Sleep(time.Duration(50+r.IntN(200)) * time.Millisecond) // a moment is what this test is about
		d.kill(t)
		all.Wait()
		d.start(t)
		for _, name := range names {
			acknowledged[name] = ""
		}
		elements := mustJSON[api.Tree](t, "tree", "--control", d.control).Elements
		for name := range acknowledged {
			if !slices.ContainsFunc(elements, func(e api.Element) bool { return e.Name == name && e.State == api.ElementOK }) {
				t.Errorf("round %d: %s is lost", round, name)
			}
		}
		for i := range writers {
			c := dial(t, d.uri("vm"+strconv.Itoa(i)))
			var got [2]uint64
			for j, off := range []int64{int64(i) * 4096, 500_000 + int64(i)*4096} {
				b := make([]byte, 20)
				if _, err := c.ReadAt(b, off); err != nil {
					t.Fatal(err)
				}
				got[j], _ = strconv.ParseUint(string(b), 10, 64)
			}
			c.Close()
			if got[1] < flushed[i] || got[0] < got[1] || got[0] > got[1]+1 {
				t.Errorf("round %d: vm%d has %d, and %d was flushed", round, i, got, flushed[i])
			}
			flushed[i] = got[1]
		}
		d.wantNoOrphans(t)
		if t.Failed() {
			t.Fatalf("%s", &d.stderr)
		}
		if round%20 == 19 {
			t.Logf("round %d: %d forks and checkpoints, %d writes", round+1, made, flushed)
			d.thin(t, writers)
			clear(acknowledged)
		}
	}
	if made < rounds || flushed[0] == 0 {
		t.Errorf("%d checkpoints, %d writes: nothing was under way", made, flushed)
	}
	d.terminate(t)
	d.wantSound(t)
}

// thin drops all nodes but the writers', and has the policy of the disk remove old checkpoints, so that the tree does not grow
// from round to round.
func (d *daemonProcess) thin(t *testing.T, writers int) {
	t.Helper()
	tree := func() []api.Element { return mustJSON[api.Tree](t, "tree", "--control", d.control).Elements }
	for _, e := range tree() {
		if e.Kind == api.KindNode && e.Name[0] == 'n' {
			mustRun(t, "drop", e.Name, "--control", d.control)
		}
	}
	mustRun(t, "policy", "base", "keep-last=1", "--control", d.control)
	for deadline := time.Now().Add(2 * time.Minute); len(tree()) > 1+4*writers; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d elements are left", len(tree()))
		}
	}
	mustRun(t, "policy", "base", "keep-last=", "--control", d.control)
}
