package fleet

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/model"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/server/api"
)

// copyDirectory copies a fleet's directory as a process that is killed at this moment leaves it. Holes stay holes.
func copyDirectory(t testing.TB, from, to string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(to, layersDir), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"state.*", layersDir + "/*"} {
		files, err := filepath.Glob(filepath.Join(from, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			rel, _ := filepath.Rel(from, name)
			copyFile(t, name, filepath.Join(to, rel))
		}
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if os.IsNotExist(err) {
		return // removed meanwhile
	}
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	st, err := in.Stat()
	if err == nil {
		err = out.Truncate(st.Size())
	}
	for off := int64(0); err == nil; {
		data, seekErr := unix.Seek(int(in.Fd()), off, unix.SEEK_DATA)
		if seekErr != nil {
			break
		}
		end, _ := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE)
		b := make([]byte, end-data)
		if _, err = in.ReadAt(b, data); err == nil || err == io.EOF {
			_, err = out.WriteAt(b, data)
		}
		off = end
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A killing runs random operations on a fleet, keeps a model of it, and looks at what a kill leaves after each line.
type killing struct {
	*testFleet
	t        *testing.T
	r        *rand.Rand
	model    *model.Tree
	blank    string // the file of the first disk
	names    int
	kills    int
	rolled   map[string]uint64 // line of the last rollback of each node
	changing string            // the element that an operation changes, which may be either
	adopts   bool              // stores, whose files copies of the directory would share
}

// TestKill copies the directory after every line of the journal, opens the copy, and compares the tree and the content.
func TestKill(t *testing.T) {
	withoutSettling(t) // every line is one of the test's own goroutine
	k := newKilling(t, 3)
	k.watch()
	steps := 80
	if testing.Short() {
		steps = 24
	}
	if os.Getenv("DMSNAP_DEEP") != "" {
		steps = 2000
	}
	for i := 0; i < steps && !t.Failed(); i++ {
		k.step()
	}
	if k.kills < steps/4 && !t.Failed() {
		t.Errorf("only %d kills", k.kills)
	}
	k.mu.Lock()
	k.appended = nil
	k.mu.Unlock()
}

// withoutSettling keeps the fleets that are made after it from making their state durable on their own.
func withoutSettling(t *testing.T) {
	every := settleEvery
	t.Cleanup(func() { settleEvery = every }) // after the fleet was closed
	settleEvery = time.Hour
}

// newKilling makes a fleet of one disk with zeros.
func newKilling(t *testing.T, seed uint64) *killing {
	k := &killing{t: t, r: rand.New(rand.NewPCG(seed, 4)), model: model.NewTree("blank", testSize/model.Block), rolled: map[string]uint64{}}
	k.testFleet = newFleet(t, Options{})
	if err := k.RemoveDisk(t.Context(), "golden"); err != nil {
		t.Fatal(err)
	}
	k.blank = filepath.Join(filepath.Dir(k.golden), "blank.img")
	if err := os.WriteFile(k.blank, make([]byte, testSize), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := k.AddDisk(t.Context(), api.AddDiskRequest{Name: "blank", Source: k.blank, Raw: true}); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *killing) watch() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.appended = func(c *change) {
		dir := filepath.Join(testhost.ShortDir(k.t), "k")
		copyDirectory(k.t, k.dir, dir)
		for _, d := range k.state.Disks {
			copyFile(k.t, d.Source, filepath.Join(dir, filepath.Base(d.Source)))
		}
		k.kills++
		if k.kills%3 == 0 {
			k.cutPower(dir)
		} else {
			k.look(dir, c)
		}
		os.RemoveAll(dir)
	}
}

// copiedDisks are the options of a copy, which has disks of its own.
func copiedDisks(dir string) Options {
	return Options{Open: func(path string, o cowfile.OriginOptions) (cowfile.Origin, error) {
		return cowfile.OpenRaw(filepath.Join(dir, filepath.Base(path)), o)
	}}
}

// cutPower opens a copy without the lines that are not durable, as the worst loss of power leaves it: files have everything.
// What was flushed is there, and nodes can be written.
func (k *killing) cutPower(dir string) {
	log := filepath.Join(dir, logFile)
	text, err := os.ReadFile(log)
	if err != nil {
		k.t.Error(err)
		return
	}
	synced, size := k.journal.synced.Load(), 0
	for line := range bytes.Lines(text) {
		if c, err := decodeLine(line); err != nil || c.Seq > synced {
			break
		}
		size += len(line)
	}
	if err := os.Truncate(log, int64(size)); err != nil {
		k.t.Error(err)
	}
	f, err := Open(dir, copiedDisks(dir))
	if err != nil {
		k.t.Errorf("after a loss of power at line %d: %v", synced, err)
		return
	}
	f.mu.Lock() // a merge goes on
	nodes := maps.Clone(f.nodes)
	f.mu.Unlock()
	for name, n := range nodes {
		if n.err != nil || k.state.Nodes[name] == nil || !k.model.Has(name) || name == k.changing || k.rolled[name] >= synced {
			continue
		}
		got := make([]byte, n.dev.Size())
		if _, err := n.dev.ReadAt(got, 0); err != nil {
			k.t.Error(err)
		} else if err := k.model.Allows(name, got); err != nil {
			k.t.Errorf("after a loss of power at line %d: node %s: %v", synced, name, err)
		}
		if _, err := n.dev.WriteAt(model.Stamp(1), 0); err != nil {
			k.t.Errorf("after a loss of power at line %d: node %s can't be written: %v", synced, name, err)
		}
	}
	if err := f.Close(); err != nil {
		k.t.Errorf("after a loss of power at line %d: %v", synced, err)
	}
	checkLayers(k.t, dir)
}

// look opens what a kill left. Locks of the killed fleet are held, so that it must not end the goroutine.
func (k *killing) look(dir string, c *change) {
	f, err := Open(dir, copiedDisks(dir))
	if err != nil {
		k.t.Errorf("after line %d (%s): %v", c.Seq, c.Op, err)
		return
	}
	defer func() {
		if err := f.Close(); err != nil {
			k.t.Errorf("after line %d (%s): close: %v", c.Seq, c.Op, err)
		}
		checkLayers(k.t, dir)
		if files, _ := filepath.Glob(filepath.Join(dir, layersDir, "*")); len(files) != len(f.state.Layers) {
			k.t.Errorf("after line %d (%s): %d files of %d layers", c.Seq, c.Op, len(files), len(f.state.Layers))
		}
	}()
	merging := false // then the copy goes on with it
	for _, d := range k.state.Disks {
		merging = merging || d.Merging != ""
	}
	f.mu.Lock() // a merge goes on
	got, nodes := slices.Sorted(maps.Keys(f.state.Layers)), maps.Clone(f.nodes)
	f.mu.Unlock()
	if want := slices.Sorted(maps.Keys(k.state.Layers)); !merging && !slices.Equal(got, want) {
		k.t.Errorf("after line %d (%s): layers %v, want %v", c.Seq, c.Op, got, want)
		return
	}
	for name, n := range nodes {
		if n.err != nil {
			k.t.Errorf("after line %d (%s): node %s: %v", c.Seq, c.Op, name, n.err)
			continue
		}
		if !k.model.Has(name) || name == k.changing {
			continue // it is being made
		}
		got := make([]byte, n.dev.Size())
		if _, err := n.dev.ReadAt(got, 0); err != nil {
			k.t.Error(err)
		}
		if err := k.model.Allows(name, got); err != nil {
			k.t.Errorf("after line %d (%s): node %s: %v", c.Seq, c.Op, name, err)
		}
	}
}

func (k *killing) nodes() []string {
	return slices.DeleteFunc(k.model.Names(), func(n string) bool { return strings.Contains(n, "@") || k.state.Disks[n] != nil })
}

func (k *killing) name() string {
	k.names++
	return fmt.Sprint("n", k.names)
}

// must ends the test after an error.
func (k *killing) must(_ any, err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

// step does one random thing.
func (k *killing) step() {
	nodes := k.nodes()
	if len(nodes) == 0 {
		k.forkRandom()
		return
	}
	ctx := k.t.Context()
	name := nodes[k.r.IntN(len(nodes))]
	dev := k.Fleet.nodes[name].dev
	b := k.r.IntN(k.model.Blocks(name))
	off := int64(b) * model.Block
	switch n := k.r.IntN(42); {
	case n < 10:
		k.must(dev.WriteAt(k.model.Write(name, b), off))
	case n < 12:
		k.model.Zero(name, b)
		k.must(nil, dev.ZeroAt(off, model.Block, 0))
	case n < 16:
		k.must(nil, dev.Flush())
		k.model.Flush(name)
	case n < 20:
		k.checkpointRandom(nodes)
	case n < 24 && len(nodes) < 8:
		k.forkRandom()
	case n < 26 && len(nodes) > 3:
		k.changing = name
		k.must(nil, k.Drop(ctx, name))
		k.changing = ""
		k.model.Drop(name)
	case n == 26:
		k.rollbackRandom(name)
	case n == 27:
		k.must(k.Squash(ctx, api.SquashRequest{Node: name}))
	case n < 30:
		k.checkpointsRandom()
	case n < 32:
		disk := k.Fleet.nodes[name].disk.name
		if k.model.Blocks(name) < k.model.Blocks(disk) {
			if _, err := k.Merge(ctx, name); err == nil {
				k.t.Fatalf("node %s was merged into a longer disk", name)
			}
			return
		}
		k.merge(name)
		k.model.Copy(name, disk)
		k.model.Flush(disk)
	case n == 32 && k.adopts:
		k.adoptNew()
	case n == 33:
		f := k.Fleet
		f.reap()
		for _, err := range f.flushDirty() {
			k.t.Fatal(err)
		}
		for _, name := range nodes {
			k.model.Flush(name)
		}
	case n < 37 && n > 33:
		k.must(nil, dev.Discard(off, model.Block))
		got := make([]byte, model.Block)
		k.must(dev.ReadAt(got, off))
		k.must(nil, k.model.Trim(name, b, got))
	case n == 37:
		k.exportRandom()
	case n == 38:
		k.addDisk()
	case n == 39:
		k.removeDisk()
	}
}

// forkRandom forks something, at times with a larger size.
func (k *killing) forkRandom() {
	from := k.model.Names()
	source, name := from[k.r.IntN(len(from))], k.name()
	q := api.ForkRequest{From: source, Name: name}
	blocks := k.model.Blocks(source)
	if blocks < 2*testSize/model.Block && k.r.IntN(3) == 0 {
		blocks += 1 + k.r.IntN(40)
		q.Size = int64(blocks) * model.Block
	}
	k.must(k.Fork(k.t.Context(), q))
	k.model.Copy(source, name)
	k.model.Extend(name, blocks)
}

// exportRandom reads something as dmsnap export does: over NBD, from a node of its own.
func (k *killing) exportRandom() {
	from := k.model.Names()
	source, name := from[k.r.IntN(len(from))], "export."+k.name()
	k.must(k.Fork(k.t.Context(), api.ForkRequest{From: source, Name: name}))
	c := k.dial(name)
	k.must(nil, k.model.Shows(source, readAll(k.t, c)))
	k.must(nil, c.Close())
	k.must(nil, k.Drop(k.t.Context(), name))
}

// addDisk adds a disk with zeros, unless there are enough.
func (k *killing) addDisk() {
	if len(k.state.Disks) > 3 {
		return
	}
	name, blocks := k.name(), 1+k.r.IntN(testSize/model.Block)
	path := filepath.Join(filepath.Dir(k.blank), name+".img")
	k.must(nil, os.WriteFile(path, make([]byte, blocks*model.Block), 0o600))
	k.must(k.AddDisk(k.t.Context(), api.AddDiskRequest{Name: name, Source: path, Raw: true}))
	k.model.Add(name, blocks)
}

// removeDisk removes a disk, or has that refused when something lies on it.
func (k *killing) removeDisk() {
	for _, r := range sorted(k.state.Disks) {
		if r.Name == "blank" {
			continue
		}
		used := slices.ContainsFunc(k.Tree().Elements, func(e api.Element) bool { return e.Disk == r.Name && e.Kind != api.KindDisk })
		err := k.RemoveDisk(k.t.Context(), r.Name)
		if used != (codeOf(err) == api.CodeHasChildren) || !used && err != nil {
			k.t.Fatalf("remove disk %s, which is used (%v): %v", r.Name, used, err)
		}
		if !used {
			k.model.Drop(r.Name)
			k.must(nil, os.Remove(r.Source))
		}
		return
	}
}

// adoptNew adopts a new store.
func (k *killing) adoptNew() {
	name := k.name()
	cow := filepath.Join(filepath.Dir(k.blank), name)
	k.must(cowfile.Create(k.golden, cow, cowfile.Options{Raw: true}))
	k.must(k.Adopt(k.t.Context(), api.AdoptRequest{Node: name, COW: cow, Disk: "blank"}))
	k.model.Copy("blank", name)
}

// checkpointsRandom squashes checkpoints, or takes their names.
func (k *killing) checkpointsRandom() {
	for _, e := range k.Tree().Elements {
		switch {
		case e.Kind != api.KindCheckpoint || k.r.IntN(3) > 0:
		case !e.Unnamed && k.r.IntN(2) == 0:
			k.must(nil, k.Forget(k.t.Context(), e.Name))
			k.model.Drop(e.Name)
		default:
			if _, err := k.Squash(k.t.Context(), api.SquashRequest{Node: e.Name}); codeOf(err) != api.CodeNoSuchCheckpoint {
				k.must(nil, err)
			}
		}
	}
}

func (k *killing) checkpointRandom(nodes []string) {
	k.r.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	nodes = nodes[:1+k.r.IntN(min(3, len(nodes)))]
	name, durable := k.name(), k.r.IntN(2) == 0
	k.must(k.Checkpoint(k.t.Context(), api.CheckpointRequest{Nodes: nodes, Name: name, Durable: durable}))
	for _, n := range nodes {
		if durable {
			k.model.Flush(n)
		}
		k.model.Copy(n, n+"@"+name)
	}
}

// rollbackRandom rolls back to a checkpoint with a name, if there is one.
func (k *killing) rollbackRandom(name string) {
	for e, err := k.Element(name); err == nil && e.Kind != api.KindDisk; {
		if e, err = k.Element(e.Parent); err != nil || e.Kind == api.KindDisk || !k.model.Has(e.Name) || k.r.IntN(2) == 0 {
			continue
		}
		k.changing = name
		k.must(k.Rollback(k.t.Context(), api.RollbackRequest{Node: name, Checkpoint: e.Name}))
		k.changing = ""
		blocks := k.model.Blocks(name) // the node keeps its size
		k.model.Copy(e.Name, name)
		k.model.Extend(name, blocks)
		k.rolled[name] = k.state.Seq
		return
	}
}

// TestTornLine cuts the journal at every byte of its last line: the tree is that before it, or, with all bytes, after.
func TestTornLine(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "a")
	f.checkpoint("c", "a")
	dir := filepath.Join(testhost.ShortDir(t), "c")
	log := filepath.Join(dir, logFile)
	f.mu.Lock()
	before := f.journal.size
	f.mu.Unlock()
	f.fork("a@c", "b")
	f.mu.Lock()
	after := f.journal.size
	f.mu.Unlock()
	copyDirectory(t, f.dir, dir)
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for cut := before; cut <= after; cut++ {
		if err := os.WriteFile(log, text[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s, _, rest, err := loadState(dir)
		if err != nil {
			t.Fatal(err)
		}
		if has := s.Nodes["b"] != nil; has != (cut == after) || s.Nodes["a"] == nil || int64(len(rest)) != (cut-before)%(after-before) {
			t.Errorf("cut at byte %d of %d: node b: %v, %d bytes left", cut-before, after-before, has, len(rest))
		}
	}
	os.RemoveAll(dir)
	for _, cut := range []int64{before, before + 1, (before + after) / 2, after - 1, after} {
		copyDirectory(t, f.dir, dir)
		if err := os.Truncate(log, cut); err != nil {
			t.Fatal(err)
		}
		g, err := Open(dir, Options{})
		if err != nil {
			t.Fatalf("cut at byte %d of %d: %v", cut-before, after-before, err)
		}
		if has := g.state.Nodes["b"] != nil; has != (cut == after) || g.state.Nodes["a"] == nil {
			t.Errorf("cut at byte %d of %d: node b: %v", cut-before, after-before, has)
		}
		if files, _ := filepath.Glob(filepath.Join(dir, layersDir, "*")); len(files) != len(g.state.Layers) {
			t.Errorf("cut at byte %d: %d files", cut-before, len(files))
		}
		if _, err := g.Fork(t.Context(), api.ForkRequest{From: "a", Name: "z"}); err != nil {
			t.Errorf("cut at byte %d: %v", cut-before, err)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		os.RemoveAll(dir)
	}
}

// TestDamagedState refuses what can't be read, and says where; nothing is changed then.
func TestDamagedState(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "a")
	f.fork("golden", "b")
	f.checkpoint("c", "a")
	dir := filepath.Join(testhost.ShortDir(t), "d")
	copyDirectory(t, f.dir, dir)
	log := filepath.Join(dir, logFile)
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	text[len(text)/3] ^= 1 // whole lines follow
	if err := os.WriteFile(log, text, 0o600); err != nil {
		t.Fatal(err)
	}
	var lines []string
	g, err := Open(dir, Options{Log: func(line string) { lines = append(lines, line) }})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(lines, "\n"), "damaged") {
		t.Errorf("log %q", lines)
	}
	if files, _ := filepath.Glob(filepath.Join(dir, lostDir, "*.cow")); len(files) == 0 {
		t.Error("the files of layers that damaged lines named are gone")
	}

	state := filepath.Join(dir, stateFile)
	for _, bad := range []string{"", "{", `{"version":2}`, `{"version":1,"unknown":1}`,
		`{"version":1,"disks":[],"nodes":[{"name":"x","top":9}]}`,
		`{"version":1,"disks":[{"name":"d"}],"layers":[{"id":1,"disk":"d","parent":2,"sealed":true},{"id":2,"disk":"d","parent":1,"sealed":true}]}`,
		`{"version":1,"disks":[],"layers":[{"id":1,"disk":"d"}]}`} {
		if err := os.WriteFile(state, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), stateFile) {
			t.Errorf("state %s: %v", bad, err)
		}
		if now, _ := os.ReadFile(state); string(now) != bad {
			t.Errorf("state %s was changed", bad)
		}
	}
}

// TestFold replaces state.json while lines are appended.
func TestFold(t *testing.T) {
	f := newFleet(t, Options{})
	done := make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for ctx.Err() == nil {
			if err := f.foldNow(); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for i := range 50 {
		f.fork("golden", fmt.Sprint("n", i))
		if i%3 == 0 {
			if err := f.Drop(t.Context(), fmt.Sprint("n", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	tree := f.names()
	dir := filepath.Join(testhost.ShortDir(t), "d")
	copyDirectory(t, f.dir, dir)
	g, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := (&testFleet{Fleet: g, t: t}).names(); got != tree {
		t.Errorf("tree %s, want %s", got, tree)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}
