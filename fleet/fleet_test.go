package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

const testSize = 1 << 20

// A testFleet is a fleet with a raw disk, served on a socket.
type testFleet struct {
	*Fleet
	t      testing.TB
	dir    string
	golden string // path of the disk
	opts   Options
	socket string
	cancel context.CancelFunc
	wait   func() error
}

// newFleet makes a fleet with one disk, "golden", of random content, and serves it.
func newFleet(t testing.TB, o Options) *testFleet {
	t.Helper()
	dir := testhost.ShortDir(t)
	f := &testFleet{t: t, dir: filepath.Join(dir, "f"), golden: filepath.Join(dir, "golden.img"), opts: o, socket: filepath.Join(dir, "s")}
	content := make([]byte, testSize)
	for i := range content {
		content[i] = byte(i>>12) ^ byte(i)
	}
	if err := os.WriteFile(f.golden, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f.open()
	if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "golden", Source: f.golden, Raw: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.end)
	return f
}

// open opens the fleet in its directory, and serves it.
func (f *testFleet) open() {
	f.t.Helper()
	var err error
	if f.Fleet, err = Open(f.dir, f.opts); err != nil {
		f.t.Fatal(err)
	}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel, f.wait = cancel, f.Start(ctx, l)
}

// stop ends the fleet in good order, and checks every layer.
func (f *testFleet) stop() {
	f.t.Helper()
	f.cancel()
	if err := f.wait(); err != nil {
		f.t.Error(err)
	}
	if err := f.Close(); err != nil {
		f.t.Error(err)
	}
	f.Fleet = nil
	checkLayers(f.t, f.dir)
}

func (f *testFleet) end() {
	if f.Fleet != nil {
		f.stop()
	}
}

// restart stops and opens it.
func (f *testFleet) restart() {
	f.t.Helper()
	f.stop()
	f.open()
}

// checkLayers checks every store in a fleet's directory.
func checkLayers(t testing.TB, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, layersDir, "*.cow"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		dev, err := block.Open(name, block.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		r, err := check.Run(context.Background(), dev, check.Options{})
		if err != nil || len(r.Findings) > 0 {
			t.Errorf("%s: %v %v", name, r.Findings, err)
		}
		dev.Close()
	}
}

// dial connects to a node.
func (f *testFleet) dial(name string) *nbd.Client {
	f.t.Helper()
	c, err := nbd.Dial(context.Background(), nbd.URI{Network: "unix", Address: f.socket, Export: name}.String())
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

func (f *testFleet) fork(from, name string) api.Element {
	f.t.Helper()
	e, err := f.Fork(context.Background(), api.ForkRequest{From: from, Name: name})
	if err != nil {
		f.t.Fatalf("fork %s %s: %v", from, name, err)
	}
	return e
}

func (f *testFleet) checkpoint(name string, nodes ...string) {
	f.t.Helper()
	if _, err := f.Checkpoint(context.Background(), api.CheckpointRequest{Nodes: nodes, Name: name}); err != nil {
		f.t.Fatalf("checkpoint %s of %v: %v", name, nodes, err)
	}
}

func put(t testing.TB, dev block.Device, off int64, text string) {
	t.Helper()
	if _, err := dev.WriteAt([]byte(text), off); err != nil {
		t.Fatal(err)
	}
}

func want(t testing.TB, dev block.Device, off int64, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if _, err := dev.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	if string(b) != text {
		t.Errorf("byte %d: %q, want %q", off, b, text)
	}
}

// names are the elements of the tree as "PARENT>NAME".
func (f *testFleet) names() string {
	var list []string
	for _, e := range f.Tree().Elements {
		if e.State != api.ElementOK {
			f.t.Errorf("%s: %s", e.Name, e.Error)
		}
		list = append(list, e.Parent+">"+e.Name)
	}
	return strings.Join(list, " ")
}

func codeOf(err error) api.Code {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// TestForkAndCheckpoint has clients connected throughout.
func TestForkAndCheckpoint(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm1")
	vm1 := f.dial("vm1")
	put(t, vm1, 5000, "before")
	f.checkpoint("one", "vm1")
	put(t, vm1, 5000, "after!")
	f.fork("vm1@one", "vm2")
	f.fork("vm1", "vm3")
	vm2, vm3 := f.dial("vm2"), f.dial("vm3")
	put(t, vm1, 5000, "later!")
	want(t, vm1, 5000, "later!")
	want(t, vm2, 5000, "before")
	want(t, vm3, 5000, "after!")
	tree := ">golden golden>vm1@one vm1@one>vm1@~2 vm1@~2>vm1 vm1@one>vm2 vm1@~2>vm3"
	if got := f.names(); got != tree {
		t.Errorf("tree %s, want %s", got, tree)
	}
	for _, d := range []block.Device{vm1, vm2, vm3} {
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	f.restart()
	if got := f.names(); got != tree {
		t.Errorf("tree after a restart %s, want %s", got, tree)
	}
	vm1, vm2, vm3 = f.dial("vm1"), f.dial("vm2"), f.dial("vm3")
	want(t, vm1, 5000, "later!")
	want(t, vm2, 5000, "before")
	want(t, vm3, 5000, "after!")

	if err := f.Drop(t.Context(), "vm1@one"); codeOf(err) != api.CodeHasChildren {
		t.Errorf("dropping a checkpoint with children: %v", err)
	}
	for _, name := range []string{"vm1", "vm3", "vm2", "vm1@one"} {
		if err := f.Drop(t.Context(), name); err != nil {
			t.Fatalf("drop %s: %v", name, err)
		}
	}
	if got := f.names(); got != ">golden" {
		t.Errorf("tree %s: everything was dropped", got)
	}
	if err := f.RemoveDisk(t.Context(), "golden"); err != nil {
		t.Fatal(err)
	}
	f.stop()
	if files, err := os.ReadDir(filepath.Join(f.dir, layersDir)); err != nil || len(files) > 0 {
		t.Errorf("files are left: %v %v", files, err)
	}
}

// TestForkOfEmptyNode has forks of a node to which nothing is written not become deeper.
func TestForkOfEmptyNode(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm0")
	for i := range 5 {
		f.fork("vm0", fmt.Sprintf("n%d", i))
	}
	if got, want := f.names(), ">golden golden>n0 golden>n1 golden>n2 golden>n3 golden>n4 golden>vm0"; got != want {
		t.Errorf("tree %s, want %s", got, want)
	}
}

// TestLargerFork has zeros behind the end of the disk, through checkpoints and restarts.
func TestLargerFork(t *testing.T) {
	f := newFleet(t, Options{})
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "big", Size: 4*testSize + 512}); err != nil {
		t.Fatal(err)
	}
	big := f.dial("big")
	if big.Size() != 4*testSize+512 {
		t.Fatalf("size %d", big.Size())
	}
	put(t, big, 4*testSize, "end")
	f.checkpoint("c", "big")
	f.fork("big@c", "second")
	put(t, big, 4*testSize, "END")
	put(t, big, testSize-2, "edge")
	check := func() {
		t.Helper()
		big, second := f.dial("big"), f.dial("second")
		want(t, big, 4*testSize, "END")
		want(t, second, 4*testSize, "end")
		want(t, big, testSize-2, "edge")
		want(t, second, testSize, "\x00\x00\x00")
		want(t, big, 2*testSize, "\x00\x00\x00")
	}
	check()
	f.restart()
	check()
	for _, size := range []int64{testSize, 4*testSize + 1} {
		if _, err := f.Fork(t.Context(), api.ForkRequest{From: "big", Name: "x", Size: size}); codeOf(err) != api.CodeBadRequest {
			t.Errorf("size %d: %v", size, err)
		}
	}
}

// TestRandomTree does what TestKill does, and compares every node with the model, before and after restarts.
func TestRandomTree(t *testing.T) {
	steps := 150
	if testing.Short() {
		steps = 100
	}
	for seed := range uint64(2) {
		k := newKilling(t, seed)
		k.adopts = true
		compare := func() {
			t.Helper()
			for _, name := range k.nodes() {
				if err := k.model.Shows(name, readAll(t, k.Fleet.nodes[name].dev)); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
		}
		for i := range steps {
			k.step()
			if i%40 == 39 {
				compare()
				k.restart()
				compare()
			}
		}
		k.stop()
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestTwoFleetsOfOneDirectory refuses the second.
func TestTwoFleetsOfOneDirectory(t *testing.T) {
	f := newFleet(t, Options{})
	if _, err := Open(f.dir, Options{}); err == nil || !strings.Contains(err.Error(), ErrLocked.Error()) {
		t.Errorf("a second fleet: %v", err)
	}
}

// TestEvents has a subscriber see operations in their order, and one that is too slow get that reported.
// TestOperationsAreLogged: what is done is a line each with operation, disk and node.
func TestOperationsAreLogged(t *testing.T) {
	var records bytes.Buffer
	f := newFleet(t, Options{Logger: slog.New(slog.NewJSONHandler(&records, nil))})
	f.fork("golden", "a")
	f.checkpoint("c", "a")
	if err := f.Drop(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(records.String()) {
		var r struct{ Level, Msg, Disk, Node, Parent, Operation string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if r.Level != "INFO" || r.Disk != "golden" || strings.ReplaceAll(r.Operation, "_", " ") != r.Msg {
			t.Errorf("record %s", line)
		}
		got = append(got, r.Operation+" "+r.Node+" "+r.Parent)
	}
	if want := "disk_added  ; forked a golden; checkpointed a a@c; dropped a "; strings.Join(got, "; ") != want {
		t.Errorf("logged: %q, want %q", strings.Join(got, "; "), want)
	}
}

func TestEvents(t *testing.T) {
	f := newFleet(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	events := f.Subscribe(ctx)
	f.fork("golden", "a")
	f.checkpoint("c", "a")
	for _, kind := range []api.EventKind{api.EventForked, api.EventCheckpointed} {
		if e := <-events; e.Kind != kind || e.Name != "a" || e.Seq == 0 {
			t.Errorf("event %+v, want %s", e, kind)
		}
	}
	for range eventsBehind + 5 {
		f.mu.Lock()
		f.publish(api.Event{Kind: api.EventSnapshot})
		f.mu.Unlock()
	}
	cancel()
	last := api.Event{}
	for e := range events {
		last = e
	}
	if last.Kind != api.EventMissed {
		t.Errorf("the last event of a slow subscriber: %+v", last)
	}
}

// waitFor waits until ok, for things in the background.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: it took longer than 30 s", what)
		}
	}
}

// TestAddDiskOfAMixture: a disk into which a merge is not complete is refused as a base, and taken when it is.
func TestAddDiskOfAMixture(t *testing.T) {
	f := newFleet(t, Options{})
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cow := block.NewMemory(1 << 20)
	if _, err := store.Create(cow, ondisk.Layout{ChunkSectors: 8}, false); err != nil {
		t.Fatal(err)
	}
	side, err := merge.Begin(path, "disk.cow", cow, nil, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	q := api.AddDiskRequest{Name: "mixture", Source: path, Raw: true}
	if _, err := f.AddDisk(t.Context(), q); !errors.Is(err, merge.ErrMixture) {
		t.Errorf("while the merge is not complete: %v", err)
	}
	if err := side.End(path); err != nil {
		t.Fatal(err)
	}
	if _, err := f.AddDisk(t.Context(), q); err != nil {
		t.Error(err)
	}
}
