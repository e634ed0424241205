package fleet

import (
	"fmt"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/dmsnap/dmsnap/server/api"
)

// TestForget takes names of checkpoints in the middle of a chain with forks, and squashes what is left of them: every node and
// checkpoint shows what it did, clients stay connected, and the layers are gone.
func TestForget(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	for i := range 8 {
		put(t, vm, int64(i)*4096, fmt.Sprintf("own of %d", i))
		put(t, vm, 100_000, fmt.Sprintf("state %d", i))
		f.checkpoint(fmt.Sprint("c", i), "vm")
	}
	f.fork("vm@c2", "side")
	f.fork("vm@c7", "late")
	side, late := f.dial("side"), f.dial("late")
	put(t, side, 200_000, "side")
	put(t, vm, 300_000, "top")
	for _, i := range []int{0, 1, 3, 4, 5} {
		if err := f.Forget(t.Context(), fmt.Sprint("vm@c", i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Element("vm@c3"); codeOf(err) != api.CodeNoSuchElement {
		t.Errorf("a forgotten checkpoint: %v", err)
	}
	verify := func() {
		t.Helper()
		for _, c := range []struct {
			name  string
			state int
		}{{"vm", 7}, {"late", 7}, {"side", 2}, {"x6", 6}, {"x2", 2}} {
			dev := f.dial(c.name)
			want(t, dev, 100_000, fmt.Sprintf("state %d", c.state))
			for i := range c.state + 1 {
				want(t, dev, int64(i)*4096, fmt.Sprintf("own of %d", i))
			}
		}
		want(t, f.dial("side"), 200_000, "side")
		want(t, f.dial("vm"), 300_000, "top")
	}
	f.fork("vm@c6", "x6")
	f.fork("vm@c2", "x2")
	verify()
	// What is durable and merged into one index has no index of its own any more.
	for _, err := range f.flushDirty() {
		t.Fatal(err)
	}
	f.compact(t.Context())
	runtime.GC()
	runtime.GC()
	for _, name := range []string{"vm@c2", "vm@c6", "vm@c6", "vm@c7"} {
		e, err := f.Squash(t.Context(), api.SquashRequest{Node: name})
		if err != nil || e.Name != name {
			t.Fatalf("squash %s: %+v, %v", name, e, err)
		}
		verify()
	}
	put(t, vm, 400_000, "still connected")
	want(t, late, 100_000, "state 7")
	if e, err := f.Element("vm"); err != nil || e.Depth != 3 || e.Parent != "vm@c7" {
		t.Errorf("vm lies on %d layers, want 3, and on %s, %v", e.Depth, e.Parent, err)
	}
	f.restart()
	verify()
	want(t, f.dial("vm"), 400_000, "still connected")
	if files, _ := filepath.Glob(filepath.Join(f.dir, layersDir, "*")); len(files) != 8 {
		t.Errorf("%d files, want 3 checkpoints and 5 nodes: %v", len(files), files)
	}
	// Without children it is dropped.
	f.checkpoint("last", "side")
	if err := f.Drop(t.Context(), "side"); err != nil {
		t.Fatal(err)
	}
	if err := f.Forget(t.Context(), "side@last"); err != nil {
		t.Error(err)
	}
	if err := f.Forget(t.Context(), "side@last"); codeOf(err) != api.CodeNoSuchCheckpoint {
		t.Errorf("again: %v", err)
	}
}

// A squash of a checkpoint gives up when what it uses is needed by others meanwhile, or used by another operation.
func TestSquashBelowIsRefused(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	for i := range 3 {
		put(t, vm, 0, fmt.Sprint("state ", i))
		f.checkpoint(fmt.Sprint("c", i), "vm")
	}
	if err := f.Forget(t.Context(), "vm@c0"); err != nil {
		t.Fatal(err)
	}
	s, err := f.beginSquashBelow(t.Context(), "vm@c1")
	if err != nil || s == nil {
		t.Fatal(err)
	}
	if _, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm@c1"}); codeOf(err) != api.CodeInUse {
		t.Errorf("a second squash: %v", err)
	}
	if err := s.fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	unnamed := f.state.Layers[s.own[1]].title()
	if _, err := f.Rollback(t.Context(), api.RollbackRequest{Node: "vm", Checkpoint: unnamed, Force: true}); err != nil {
		t.Fatal(err)
	}
	if err := s.finishBelow(t.Context()); codeOf(err) != api.CodeInUse {
		t.Errorf("after a rollback below it: %v", err)
	}
	if err := s.abandon(); err != nil {
		t.Error(err)
	}
	want(t, f.dial("vm"), 0, "state 0")
	f.fork("vm@c2", "other")
	want(t, f.dial("other"), 0, "state 2")
}
