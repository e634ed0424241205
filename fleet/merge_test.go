package fleet

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
)

// newWritable adds a disk "base" that is exported.
func newWritable(t *testing.T, f *testFleet) {
	t.Helper()
	path := filepath.Join(filepath.Dir(f.golden), "base.img")
	if err := os.WriteFile(path, bytes.Repeat([]byte("0123456789abcdef"), testSize/16), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "base", Source: path, Raw: true, Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	if !d.Writable || d.URI == "" {
		t.Errorf("%+v", d)
	}
}

// TestWritableDisk has nodes keep what the disk had when they were forked, each its own.
func TestWritableDisk(t *testing.T) {
	f := newFleet(t, Options{})
	newWritable(t, f)
	base := f.dial("base")
	f.fork("base", "a")
	f.fork("base", "a2")
	put(t, base, 0, "AAAA")
	f.fork("base", "b")
	put(t, base, 0, "BBBB")
	put(t, base, 100_000, "BBBB")
	f.fork("base", "c")
	put(t, base, 0, "CCCC")
	put(t, f.dial("b"), 8, "bbbb")
	f.checkpoint("x", "b")
	check := func() {
		t.Helper()
		want(t, f.dial("base"), 0, "CCCC")
		want(t, f.dial("a"), 0, "0123")
		want(t, f.dial("a2"), 0, "0123")
		want(t, f.dial("b"), 0, "AAAA4567bbbb")
		want(t, f.dial("c"), 0, "BBBB")
		want(t, f.dial("c"), 100_000, "BBBB")
		want(t, f.dial("b"), 100_000, "0123")
	}
	check()
	if err := f.dial("b").Flush(); err != nil {
		t.Fatal(err)
	}
	if err := base.Flush(); err != nil {
		t.Fatal(err)
	}
	f.restart()
	check()
	if d, err := f.Disk("base"); err != nil || d.Children != 4 || d.PreserveBytes == 0 {
		t.Errorf("%+v %v", d, err)
	}
	put(t, f.dial("base"), 0, "DDDD")
	want(t, f.dial("c"), 0, "BBBB")
	for _, name := range []string{"a", "a2", "b", "b@x", "c"} {
		if err := f.Drop(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	f.mu.Lock()
	left := len(f.state.Layers)
	f.mu.Unlock()
	if left != 1 {
		t.Errorf("%d layers are left, want the newest preserve layer", left)
	}
	if err := f.RemoveDisk(t.Context(), "base"); err != nil {
		t.Fatal(err)
	}
	f.stop()
	if files, _ := filepath.Glob(filepath.Join(f.dir, layersDir, "*")); len(files) != 0 {
		t.Errorf("files are left: %v", files)
	}
}

// merge merges a node and waits until that is done.
func (f *testFleet) merge(name string) {
	f.t.Helper()
	m, err := f.Merge(f.t.Context(), name)
	if err != nil {
		f.t.Fatal(err)
	}
	f.waitMerged(m.Disk)
}

func (f *testFleet) waitMerged(disk string) {
	f.t.Helper()
	waitFor(f.t, "merge", func() bool {
		d, err := f.Disk(disk)
		return err == nil && d.Merge.State != api.MergeRunning
	})
	if d, _ := f.Disk(disk); d.Merge.State != api.MergeDone {
		f.t.Fatalf("merge: %+v", d.Merge)
	}
}

// TestMerge merges a node, then another one that lies on what the disk was before.
func TestMerge(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "a")
	f.fork("golden", "b")
	a, b := f.dial("a"), f.dial("b")
	put(t, a, 0, "aaaa")
	f.checkpoint("kept", "a")
	put(t, a, 300_000, "aaaa")
	put(t, b, 100_000, "bbbb")
	f.fork("a@kept", "c")
	before := readAll(t, b)
	c := readAll(t, f.dial("c"))
	merged := readAll(t, a)
	f.merge("a")
	if got, err := os.ReadFile(f.golden); err != nil || !bytes.Equal(got, merged) {
		t.Errorf("the disk differs from what the node showed: %v", err)
	}
	if !bytes.Equal(readAll(t, b), before) || !bytes.Equal(readAll(t, f.dial("c")), c) || !bytes.Equal(readAll(t, a), merged) {
		t.Error("a node shows something else")
	}
	put(t, a, 4, "connected")
	f.fork("golden", "d")
	if !bytes.Equal(readAll(t, f.dial("d")), merged) {
		t.Error("a fork of the disk differs from it")
	}
	f.restart()
	b = f.dial("b")
	if !bytes.Equal(readAll(t, b), before) || !bytes.Equal(readAll(t, f.dial("c")), c) {
		t.Error("a node shows something else after a restart")
	}
	f.merge("b") // reverts what a merged
	if got, err := os.ReadFile(f.golden); err != nil || !bytes.Equal(got, before) {
		t.Errorf("the disk differs from what the second node showed: %v", err)
	}
	want(t, f.dial("a"), 0, "aaaa")
	want(t, f.dial("a"), 300_000, "aaaa")
	if !bytes.Equal(readAll(t, f.dial("d")), merged) {
		t.Error("the fork of the disk shows something else")
	}
}

func readAll(t testing.TB, dev interface {
	ReadAt([]byte, int64) (int, error)
	Size() int64
}) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestMergeUnderLoad has a client write to the node, and others to its siblings, while it is merged again and again.
func TestMergeUnderLoad(t *testing.T) {
	f := newFleet(t, Options{})
	var all sync.WaitGroup
	stop := make(chan struct{})
	models := make([][]byte, 3)
	for i := range models {
		name := fmt.Sprint("n", i)
		f.fork("golden", name)
		dev := f.dial(name)
		models[i] = readAll(t, dev)
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for {
				select {
				case <-stop:
					return
				default:
				}
				p := make([]byte, 1+r.IntN(8192))
				for i := range p {
					p[i] = byte(r.Uint32())
				}
				off := r.Int64N(testSize - int64(len(p)))
				if _, err := dev.WriteAt(p, off); err != nil {
					t.Error(err)
					return
				}
				copy(models[i][off:], p)
			}
		})
	}
	for range 3 {
		f.merge("n0")
	}
	close(stop)
	all.Wait()
	check := func() {
		t.Helper()
		for i, m := range models {
			if got := readAll(t, f.dial(fmt.Sprint("n", i))); !bytes.Equal(got, m) {
				t.Errorf("n%d differs from its model at byte %d", i, firstDifference(got, m))
			}
		}
	}
	check()
	f.restart()
	check()
	f.merge("n0")
	if got, err := os.ReadFile(f.golden); err != nil || !bytes.Equal(got, models[0]) {
		t.Error("the disk differs from the node that was merged")
	}
	check()
}

// TestKilledMerge opens what a kill leaves after each line of a merge: the nodes show what they did, and the merge goes on to
// its end.
func TestKilledMerge(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "a")
	f.fork("golden", "b")
	a := f.dial("a")
	put(t, a, 0, "aaaa")
	f.checkpoint("c", "a")
	put(t, a, 300_000, "aaaa")
	put(t, a, testSize-4, "aaaa")
	f.fork("a@c", "d")
	if err := a.Flush(); err != nil {
		t.Fatal(err)
	}
	shown := map[string][]byte{}
	for _, name := range []string{"a", "b", "d"} {
		shown[name] = readAll(t, f.dial(name))
	}
	type killed struct {
		dir    string
		op     string
		marked bool // the disk, as a mixture
	}
	var kills []killed
	where := testhost.ShortDir(t)
	f.mu.Lock()
	f.appended = func(c *change) {
		k := killed{dir: filepath.Join(where, fmt.Sprint(len(kills))), op: c.Op}
		copyDirectory(t, f.dir, filepath.Join(k.dir, "f"))
		copyFile(t, f.golden, filepath.Join(k.dir, "golden.img"))
		if _, err := os.Stat(f.golden + ".merging"); err == nil {
			copyFile(t, f.golden+".merging", filepath.Join(k.dir, "golden.img.merging"))
			k.marked = true
		}
		kills = append(kills, k)
	}
	f.mu.Unlock()
	f.merge("a")
	f.mu.Lock()
	f.appended = nil
	f.mu.Unlock()
	f.stop()
	ops := ""
	for _, k := range kills {
		ops += k.op + " "
		// The copy has a disk of its own.
		s, _, _, err := loadState(filepath.Join(k.dir, "f"))
		if err != nil {
			t.Fatal(err)
		}
		moveDisk(t, filepath.Join(k.dir, "f"), s, "golden", filepath.Join(k.dir, "golden.img"))
		g, err := Open(filepath.Join(k.dir, "f"), Options{})
		if err != nil {
			t.Fatal(err)
		}
		tg := &testFleet{Fleet: g, t: t}
		if s.Disks["golden"].Merging != "" {
			if !k.marked {
				t.Errorf("killed after %q: the disk is not marked as a mixture", ops)
			}
			tg.waitMerged("golden")
			if got, _ := os.ReadFile(filepath.Join(k.dir, "golden.img")); !bytes.Equal(got, shown["a"]) {
				t.Errorf("killed after %q: the merge is not complete", ops)
			}
		}
		for name, want := range shown {
			if got := readAll(t, g.nodes[name].dev); !bytes.Equal(got, want) {
				t.Errorf("killed after %q: node %s differs at byte %d", ops, name, firstDifference(got, want))
			}
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if err := merge.CheckOrigin(filepath.Join(k.dir, "golden.img")); err != nil {
			t.Errorf("killed after %q, and completed: %v", ops, err)
		}
		checkLayers(t, filepath.Join(k.dir, "f"))
	}
	if !strings.Contains(ops, "preserve ") || !strings.Contains(ops, "merged ") || len(kills) < 4 {
		t.Errorf("lines %q", ops)
	}
}

// moveDisk makes the directory of a fleet that is not open one whose disk is another file.
func moveDisk(t testing.TB, dir string, s *state, disk, file string) {
	t.Helper()
	s.Disks[disk].Source = file
	text, err := s.encode()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, stateFile), text, 0o600)
	}
	if err == nil {
		err = os.Remove(filepath.Join(dir, logFile))
	}
	if err != nil {
		t.Fatal(err)
	}
}
