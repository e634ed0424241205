package fleet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// TestRollback goes back to a checkpoint; later ones stay.
func TestRollback(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	put(t, vm, 0, "one")
	f.checkpoint("a", "vm")
	put(t, vm, 0, "two")
	f.checkpoint("b", "vm")
	put(t, vm, 0, "six")
	f.fork("vm", "other") // an unnamed checkpoint, which other needs
	put(t, vm, 0, "ten")
	back := func(to string, force bool) error {
		_, err := f.Rollback(t.Context(), api.RollbackRequest{Node: "vm", Checkpoint: to, Force: force})
		return err
	}
	if err := back("vm@a", false); codeOf(err) != api.CodeInUse {
		t.Errorf("while a client is connected: %v", err)
	}
	if err := back("vm@c", true); codeOf(err) != api.CodeNoSuchCheckpoint {
		t.Errorf("to nowhere: %v", err)
	}
	if err := back("a", true); err != nil { // NAME of one of its own
		t.Fatal(err)
	}
	if _, err := vm.ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("the client was not disconnected")
	}
	if err := vm.Flush(); err == nil {
		t.Error("the client was not disconnected")
	}
	want(t, f.dial("vm"), 0, "one")
	want(t, f.dial("other"), 0, "six")
	put(t, f.dial("vm"), 0, "new")
	if err := back("vm@b", true); codeOf(err) != api.CodeNotAncestor {
		t.Errorf("to a checkpoint beside it: %v", err)
	}
	tree := ">golden golden>vm@a vm@a>vm@b vm@b>vm@~3 vm@~3>other vm@a>vm"
	if got := f.names(); got != tree {
		t.Errorf("tree %s, want %s", got, tree)
	}
	if err := f.dial("vm").Flush(); err != nil {
		t.Fatal(err)
	}
	f.restart()
	if got := f.names(); got != tree {
		t.Errorf("tree %s, want %s", got, tree)
	}
	want(t, f.dial("vm"), 0, "new")
	if err := f.Drop(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	if got, want := f.names(), ">golden golden>vm@a vm@a>vm@b vm@a>vm"; got != want {
		t.Errorf("tree %s, want %s", got, want)
	}
}

// TestSquash keeps the content, the clients, and the layers that others need.
func TestSquash(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	put(t, vm, 0, "named")
	f.checkpoint("keep", "vm")
	for i := range 6 { // layers of its own: those of forks that are dropped
		put(t, vm, int64(i)*3000, fmt.Sprintf("layer %d", i))
		f.fork("vm", fmt.Sprint("gone", i))
	}
	for i := range 6 {
		if err := f.Drop(t.Context(), fmt.Sprint("gone", i)); err != nil {
			t.Fatal(err)
		}
	}
	put(t, vm, 100, "top")
	e, err := f.Element("vm")
	if err != nil || e.Depth != 7 {
		t.Fatalf("depth %d before, want 7 (%v)", e.Depth, err)
	}
	if e, err = f.Squash(t.Context(), api.SquashRequest{Node: "vm"}); err != nil {
		t.Fatal(err)
	}
	if e.Depth != 2 {
		t.Errorf("depth %d, want 2", e.Depth)
	}
	verify := func() {
		t.Helper()
		vm := f.dial("vm")
		want(t, vm, 100, "top")
		for i := 1; i < 6; i++ {
			want(t, vm, int64(i)*3000, fmt.Sprintf("layer %d", i))
		}
	}
	verify()
	put(t, vm, 200, "still connected")
	if err := vm.Flush(); err != nil {
		t.Fatal(err)
	}
	f.restart()
	verify()
	want(t, f.dial("vm"), 200, "still connected")
	f.fork("vm@keep", "other")
	want(t, f.dial("other"), 0, "named")
	if files, _ := filepath.Glob(filepath.Join(f.dir, layersDir, "*")); len(files) != 4 {
		t.Errorf("%d files, want 4: %v", len(files), files)
	}
	if e, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm@keep"}); err != nil || e.Name != "vm@keep" {
		t.Errorf("of a checkpoint with nothing of its own below: %v", err)
	}
}

// TestSquashIsCancelled has nothing left of it.
func TestSquashIsCancelled(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	for i := range 2 {
		put(t, vm, 0, "xyz"[i:])
		f.fork("vm", "gone")
		if err := f.Drop(t.Context(), "gone"); err != nil {
			t.Fatal(err)
		}
	}
	s, err := f.beginSquash(t.Context(), "vm")
	if err != nil || s == nil {
		t.Fatal(err)
	}
	for _, op := range []func() error{
		func() error { return f.Drop(t.Context(), "vm") },
		func() error { _, err := f.Fork(t.Context(), api.ForkRequest{From: "vm", Name: "x"}); return err },
		func() error {
			_, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: "x"})
			return err
		},
		func() error { _, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm"}); return err },
	} {
		if err := op(); codeOf(err) != api.CodeInUse {
			t.Errorf("during a squash: %v", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.fill(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("fill: %v", err)
	}
	if err := s.abandon(); err != nil {
		t.Error(err)
	}
	if _, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm"}); err != nil {
		t.Errorf("a second squash: %v", err)
	}
	want(t, vm, 0, "yz")
}

// TestAdopt takes a store into the tree, and leaves the file when the node is dropped.
func TestAdopt(t *testing.T) {
	f := newFleet(t, Options{})
	cow := filepath.Join(t.TempDir(), "x.cow")
	if _, err := cowfile.Create(f.golden, cow, cowfile.Options{Raw: true}); err != nil {
		t.Fatal(err)
	}
	adopt := func(cow string) error {
		_, err := f.Adopt(t.Context(), api.AdoptRequest{Node: "vm", COW: cow, Disk: "golden"})
		return err
	}
	if err := adopt("x.cow"); codeOf(err) != api.CodeBadRequest {
		t.Errorf("a relative path: %v", err)
	}
	if err := adopt(f.golden); err == nil {
		t.Error("the disk itself was adopted")
	}
	if err := adopt(cow); err != nil {
		t.Fatal(err)
	}
	put(t, f.dial("vm"), 77, "adopted")
	if err := f.dial("vm").Flush(); err != nil {
		t.Fatal(err)
	}
	f.checkpoint("c", "vm")
	f.restart()
	want(t, f.dial("vm"), 77, "adopted")
	for _, name := range []string{"vm", "vm@c"} {
		if err := f.Drop(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	f.stop()
	if _, err := os.Stat(cow); err != nil {
		t.Error(err)
	}
}

// TestTable shows the layers of a node bottom-up.
func TestTable(t *testing.T) {
	f := newFleet(t, Options{})
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "vm", Size: 2 * testSize}); err != nil {
		t.Fatal(err)
	}
	put(t, f.dial("vm"), 0, "x")
	f.checkpoint("c", "vm")
	got, err := f.Table("vm")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, d := range got.Devices {
		lines = append(lines, fmt.Sprintf("%s %v %s", d.Name, d.ReadOnly, d.Table))
	}
	want := []string{
		"fleet-1-base true 0 2048 linear @golden 0\n2048 2048 zero",
		"fleet-1 true 0 4096 snapshot /dev/mapper/fleet-1-base @1 P 8",
		"fleet-2 false 0 4096 snapshot /dev/mapper/fleet-1 @2 P 8",
	}
	if strings.Join(lines, "\n") != strings.Join(want, "\n") {
		t.Errorf("table\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	if len(got.Files) != 3 || got.Files[0].File != f.golden || got.Files[2].Placeholder != "@2" {
		t.Errorf("files %+v", got.Files)
	}
	if _, err := f.Table("nothing"); codeOf(err) != api.CodeNoSuchElement {
		t.Error(err)
	}
}

// TestSealedLayersStay compares the files of sealed layers before and after everything that is done over them.
func TestSealedLayersStay(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	put(t, vm, 0, "one")
	if _, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: "a", Durable: true}); err != nil {
		t.Fatal(err)
	}
	e, err := f.Element("vm@a")
	if err != nil || !e.Durable || !e.Sealed {
		t.Fatalf("%+v %v", e, err)
	}
	before := digest(t, e.File)
	put(t, vm, 0, "two")
	f.fork("vm@a", "x")
	put(t, f.dial("x"), 4, "three")
	f.fork("vm", "gone")
	if err := f.Drop(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	put(t, vm, 8192, "two")
	if _, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm"}); err != nil {
		t.Fatal(err)
	}
	if err := vm.Flush(); err != nil {
		t.Fatal(err)
	}
	f.restart()
	if _, err := f.Rollback(t.Context(), api.RollbackRequest{Node: "vm", Checkpoint: "vm@a"}); err != nil {
		t.Fatal(err)
	}
	f.restart()
	if digest(t, e.File) != before {
		t.Error("the file of a sealed layer has changed")
	}
	if st, err := os.Stat(e.File); err != nil || st.Mode().Perm() != 0o444 {
		t.Errorf("mode of a sealed layer: %v %v", st.Mode(), err)
	}
	// One that is durable before it is sealed is labelled too.
	if err := f.dial("vm").Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: "b", Durable: true}); err != nil {
		t.Fatal(err)
	}
	idle, err := f.Element("vm@b")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{e.File, idle.File} {
		dev, err := block.Open(file, block.Options{ReadOnly: true, Lock: block.LockNone})
		if err != nil {
			t.Fatal(err)
		}
		if err := store.CheckUnsealed(dev); !errors.Is(err, ondisk.ErrSealed) {
			t.Errorf("%s has no label: %v", file, err)
		}
		dev.Close()
	}
}

func digest(t *testing.T, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// TestNames refuses what is no name.
func TestNames(t *testing.T) {
	f := newFleet(t, Options{})
	for _, name := range []string{"", ".", "..", "a b", "a@b", "ä", "a/b", strings.Repeat("x", 65)} {
		if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: name}); codeOf(err) != api.CodeBadName {
			t.Errorf("%q: %v", name, err)
		}
	}
	f.fork("golden", strings.Repeat("x", 64))
	f.fork("golden", "A-Za-z0-9._-")
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "golden"}); codeOf(err) != api.CodeNameTaken {
		t.Error(err)
	}
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "nothing", Name: "n"}); codeOf(err) != api.CodeNoSuchElement {
		t.Error(err)
	}
	if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "A-Za-z0-9._-", Source: f.golden, Raw: true}); codeOf(err) != api.CodeNameTaken {
		t.Error(err)
	}
}

// TestLabelOfATop refuses to write to a top that has the label of a sealed layer: the node has failed, and the rest is served.
func TestLabelOfATop(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	f.fork("golden", "other")
	put(t, f.dial("vm"), 0, "kept")
	e, err := f.Element("vm")
	if err != nil {
		t.Fatal(err)
	}
	f.stop()
	dev, err := block.Open(e.File, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(dev)
	if err == nil {
		err = st.Seal()
	}
	if err = errors.Join(err, dev.Close()); err != nil {
		t.Fatal(err)
	}
	before := digest(t, e.File)
	for range 2 { // starts
		f.open()
		if got, err := f.Element("vm"); err != nil || got.State != api.ElementFailed || !strings.Contains(got.Error, "label of a sealed layer") || !strings.Contains(got.Error, e.File) {
			t.Errorf("%s %q, %v", got.State, got.Error, err)
		}
		if _, err := nbd.Dial(t.Context(), nbd.URI{Network: "unix", Address: f.socket, Export: "vm"}.String()); err == nil {
			t.Error("it is exported")
		}
		if _, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: "c"}); codeOf(err) != api.CodeDiskFailed {
			t.Errorf("a checkpoint of it: %v", err)
		}
		put(t, f.dial("other"), 0, "served")
		f.stop()
	}
	if digest(t, e.File) != before {
		t.Error("the file has changed")
	}
	f.open()
	if err := f.Drop(t.Context(), "vm"); err != nil {
		t.Error(err)
	}
}

// TestFreeze is called around checkpoints, and refuses them.
func TestFreeze(t *testing.T) {
	var calls []string
	var fail error
	f := newFleet(t, Options{Freeze: func(_ context.Context, thaw bool, nodes []string) error {
		calls = append(calls, fmt.Sprint(thaw, nodes))
		if thaw {
			return nil
		}
		return fail
	}})
	f.fork("golden", "a")
	f.fork("golden", "b")
	f.checkpoint("one", "b", "a")
	fail = errors.New("no")
	if _, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"a"}, Name: "two"}); codeOf(err) != api.CodeFreezeFailed {
		t.Error(err)
	}
	if got, want := strings.Join(calls, " "), "false[b a] true[b a] false[a] true[a]"; strings.ReplaceAll(got, " [", "[") != want {
		t.Errorf("calls %s, want %s", got, want)
	}
	if got, want := f.names(), ">golden golden>a@one golden>b@one a@one>a b@one>b"; got != want {
		t.Errorf("tree %s, want %s", got, want)
	}
}

// TestFreezeHoldsNothing has a freeze that does not return: other operations go on, another checkpoint of the node is refused,
// and the thaw follows whatever happened meanwhile.
func TestFreezeHoldsNothing(t *testing.T) {
	type call struct {
		thaw bool
		err  error // of its context
	}
	calls, goOn := make(chan call, 10), make(chan struct{})
	f := newFleet(t, Options{Freeze: func(ctx context.Context, thaw bool, nodes []string) error {
		calls <- call{thaw, ctx.Err()}
		if thaw {
			return nil
		}
		select {
		case <-goOn:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}})
	for _, name := range []string{"a", "b"} {
		f.fork("golden", name)
	}
	begin := func(ctx context.Context, name string) chan error {
		t.Helper()
		done := make(chan error, 1)
		go func() {
			_, err := f.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"a"}, Name: name})
			done <- err
		}()
		if c := <-calls; c.thaw {
			t.Fatal("it begins with a thaw")
		}
		return done
	}
	thawed := func() {
		t.Helper()
		if c := <-calls; !c.thaw || c.err != nil {
			t.Errorf("after the freeze: %+v", c)
		}
	}
	done := begin(t.Context(), "one")
	f.fork("golden", "c")
	f.fork("a", "d") // of the frozen node
	f.dial("a")
	if _, err := f.Rollback(t.Context(), api.RollbackRequest{Node: "b", Checkpoint: "none"}); codeOf(err) != api.CodeNoSuchCheckpoint {
		t.Error(err)
	}
	if err := f.Drop(t.Context(), "b"); err != nil {
		t.Error(err)
	}
	if len(f.Tree().Elements) < 4 {
		t.Error("no tree")
	}
	if _, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"c", "a"}, Name: "other"}); codeOf(err) != api.CodeInUse {
		t.Errorf("another checkpoint of a frozen node: %v", err)
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Error(err)
	}
	thawed()
	f.checkpoint("two", "a")
	<-calls
	thawed()

	goOn = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	done = begin(ctx, "three")
	cancel()
	if err := <-done; codeOf(err) != api.CodeFreezeFailed {
		t.Errorf("after its client disconnected: %v", err)
	}
	thawed()
	done = begin(t.Context(), "three")
	if err := f.Drop(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	close(goOn)
	if err := <-done; codeOf(err) != api.CodeNoSuchNode {
		t.Errorf("of a node that was dropped: %v", err)
	}
	thawed()
}

// TestVanishedDisk shows the nodes over it as failed, and serves the rest.
func TestVanishedDisk(t *testing.T) {
	f := newFleet(t, Options{})
	second := filepath.Join(filepath.Dir(f.golden), "second.img")
	if err := os.WriteFile(second, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "second", Source: second, Raw: true}); err != nil {
		t.Fatal(err)
	}
	f.fork("golden", "vm")
	f.fork("second", "other")
	put(t, f.dial("other"), 0, "kept")
	f.checkpoint("c", "other")
	f.stop()
	if err := os.Rename(second, second+".x"); err != nil {
		t.Fatal(err)
	}
	f.open()
	for _, e := range f.Tree().Elements {
		failed := e.Disk == "second"
		if (e.State == api.ElementFailed) != failed || failed && !strings.Contains(e.Error, "second.img") {
			t.Errorf("%s: %s %s", e.Name, e.State, e.Error)
		}
	}
	put(t, f.dial("vm"), 0, "served")
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "other@c", Name: "x"}); codeOf(err) != api.CodeDiskFailed {
		t.Error(err)
	}
	f.stop()
	if err := os.Rename(second+".x", second); err != nil {
		t.Fatal(err)
	}
	f.open()
	want(t, f.dial("other"), 0, "kept")
	if err := f.Drop(t.Context(), "other"); err != nil {
		t.Error(err)
	}
}

// TestVersion is another one after each change that alerts depend on, and the same after a read.
func TestVersion(t *testing.T) {
	withoutSettling(t)
	f := newFleet(t, Options{})
	last := f.Version()
	changed := func(want bool, what string) {
		t.Helper()
		if v := f.Version(); (v != last) != want {
			t.Errorf("%s: %+v after %+v", what, v, last)
		} else {
			last = v
		}
	}
	f.fork("golden", "vm")
	changed(true, "fork")
	readAll(t, f.nodes["vm"].dev)
	changed(false, "read")
	put(t, f.nodes["vm"].dev, 0, "written")
	changed(true, "write")
	f.checkpoint("a", "vm")
	changed(true, "checkpoint")
	f.fork("golden", "other")
	put(t, f.nodes["other"].dev, 0, "written")
	changed(true, "another node")
	if err := f.Drop(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	changed(true, "drop")
	errFlush := errors.New("flush failed")
	f.nodes["vm"].dev.failed.Store(&errFlush)
	changed(true, "failed flush")
	f.nodes["vm"].dev.failed.Store(nil)
}
