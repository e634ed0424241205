package fleet

import (
	"bytes"
	"context"
	"encoding/binary"
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

const stampBlock = 4096

// A stamped is a model of a disk whose blocks have numbers: the last one written to each, and those that it may have after a
// crash, because they were written since the last flush.
type stamped struct {
	now [testSize / stampBlock]uint64
	may [testSize / stampBlock][]uint64
}

func (s *stamped) write(block int, n uint64) {
	if len(s.may[block]) == 0 {
		s.may[block] = []uint64{s.now[block]}
	}
	s.now[block] = n
	s.may[block] = append(slices.Clip(s.may[block]), n)
}

func (s *stamped) flush() { clear(s.may[:]) }

func (s *stamped) clone() *stamped { c := *s; return &c }

// allows returns an error unless got is what the disk may hold after a crash.
func (s *stamped) allows(got []byte) error {
	for b := range s.now {
		n := binary.LittleEndian.Uint64(got[b*stampBlock:])
		whole := bytes.Equal(got[b*stampBlock:(b+1)*stampBlock], stamp(n))
		if !whole || n != s.now[b] && !slices.Contains(s.may[b], n) {
			return fmt.Errorf("block %d has %d (whole: %v), want %d or one of %v", b, n, whole, s.now[b], s.may[b])
		}
	}
	return nil
}

func stamp(n uint64) []byte {
	p := make([]byte, stampBlock)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n)
	}
	return p
}

// A killing runs random operations on a fleet, keeps models of the nodes, and looks at what a kill leaves after each line.
type killing struct {
	*testFleet
	t      *testing.T
	r      *rand.Rand
	models map[string]*stamped // by node or checkpoint
	next   uint64
	kills  int
	rolled map[string]uint64 // line of the last rollback of each node
}

// TestKill copies the directory after every line of the journal, opens the copy, and compares the tree and the content.
func TestKill(t *testing.T) {
	// Every line is one of the test's own goroutine.
	every := settleEvery
	t.Cleanup(func() { settleEvery = every }) // after the fleet was closed
	settleEvery = time.Hour
	k := &killing{t: t, r: rand.New(rand.NewPCG(3, 4)), models: map[string]*stamped{}, rolled: map[string]uint64{}}
	k.testFleet = newFleet(t, Options{})
	if err := k.RemoveDisk(t.Context(), "golden"); err != nil {
		t.Fatal(err)
	}
	blank := filepath.Join(filepath.Dir(k.golden), "blank.img")
	if err := os.WriteFile(blank, make([]byte, testSize), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := k.AddDisk(t.Context(), api.AddDiskRequest{Name: "blank", Source: blank, Raw: true}); err != nil {
		t.Fatal(err)
	}
	k.models["blank"] = &stamped{}
	k.watch()
	steps := 60
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

func (k *killing) watch() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.appended = func(c *change) {
		dir := filepath.Join(testhost.ShortDir(k.t), "k")
		copyDirectory(k.t, k.dir, dir)
		k.kills++
		if k.kills%3 == 0 {
			k.cutPower(dir)
		} else {
			k.look(dir, c)
		}
		os.RemoveAll(dir)
	}
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
	f, err := Open(dir, Options{})
	if err != nil {
		k.t.Errorf("after a loss of power at line %d: %v", synced, err)
		return
	}
	for name, n := range f.nodes {
		m := k.models[name]
		if n.err != nil || k.state.Nodes[name] == nil || m == nil || k.rolled[name] >= synced {
			continue
		}
		got := make([]byte, testSize)
		if _, err := n.dev.ReadAt(got, 0); err != nil {
			k.t.Error(err)
		} else if err := m.allows(got); err != nil {
			k.t.Errorf("after a loss of power at line %d: node %s: %v", synced, name, err)
		}
		if _, err := n.dev.WriteAt(stamp(1), 0); err != nil {
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
	f, err := Open(dir, Options{})
	if err != nil {
		k.t.Errorf("after line %d (%s): %v", c.Seq, c.Op, err)
		return
	}
	defer func() {
		if err := f.Close(); err != nil {
			k.t.Errorf("after line %d (%s): close: %v", c.Seq, c.Op, err)
		}
		checkLayers(k.t, dir)
		if files, _ := filepath.Glob(filepath.Join(dir, layersDir, "*")); len(files) != len(k.state.Layers) {
			k.t.Errorf("after line %d (%s): %d files of %d layers", c.Seq, c.Op, len(files), len(k.state.Layers))
		}
	}()
	if got, want := slices.Sorted(maps.Keys(f.state.Layers)), slices.Sorted(maps.Keys(k.state.Layers)); !slices.Equal(got, want) {
		k.t.Errorf("after line %d (%s): layers %v, want %v", c.Seq, c.Op, got, want)
		return
	}
	for name, n := range f.nodes {
		if n.err != nil {
			k.t.Errorf("after line %d (%s): node %s: %v", c.Seq, c.Op, name, n.err)
			continue
		}
		if k.models[name] == nil {
			continue // it is being made
		}
		got := make([]byte, testSize)
		if _, err := n.dev.ReadAt(got, 0); err != nil {
			k.t.Error(err)
		}
		if err := k.models[name].allows(got); err != nil {
			k.t.Errorf("after line %d (%s): node %s: %v", c.Seq, c.Op, name, err)
		}
	}
}

func (k *killing) nodes() []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(k.models)), func(n string) bool { return strings.Contains(n, "@") || n == "blank" })
}

// step does one random thing.
func (k *killing) step() {
	nodes := k.nodes()
	if len(nodes) == 0 {
		k.forkRandom()
		return
	}
	name := nodes[k.r.IntN(len(nodes))]
	dev := k.Fleet.nodes[name].dev
	switch n := k.r.IntN(30); {
	case n < 12:
		b := k.r.IntN(len(stamped{}.now))
		k.next++
		k.models[name].write(b, k.next)
		if _, err := dev.WriteAt(stamp(k.next), int64(b)*stampBlock); err != nil {
			k.t.Fatal(err)
		}
	case n < 16:
		if err := dev.Flush(); err != nil {
			k.t.Fatal(err)
		}
		k.models[name].flush()
	case n < 20:
		k.checkpointRandom(nodes)
	case n < 24 && len(nodes) < 8:
		k.forkRandom()
	case n == 24 && len(nodes) > 3:
		m := k.models[name]
		delete(k.models, name)
		if err := k.Drop(k.t.Context(), name); err != nil {
			k.models[name] = m
			k.t.Fatal(err)
		}
	case n == 25:
		k.rollbackRandom(name)
	case n == 26:
		if _, err := k.Squash(k.t.Context(), api.SquashRequest{Node: name}); err != nil {
			k.t.Fatal(err)
		}
	case n == 27:
		f := k.Fleet
		f.reap()
		for _, err := range f.flushDirty() {
			k.t.Fatal(err)
		}
		for _, name := range nodes {
			k.models[name].flush()
		}
	}
}

func (k *killing) forkRandom() {
	from := slices.Sorted(maps.Keys(k.models))
	name := fmt.Sprintf("n%d", k.next)
	k.next++
	source := from[k.r.IntN(len(from))]
	if _, err := k.Fork(k.t.Context(), api.ForkRequest{From: source, Name: name}); err != nil {
		k.t.Fatal(err)
	}
	k.models[name] = k.models[source].clone()
}

func (k *killing) checkpointRandom(nodes []string) {
	k.r.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	nodes = nodes[:1+k.r.IntN(min(3, len(nodes)))]
	name := fmt.Sprintf("c%d", k.next)
	k.next++
	durable := k.r.IntN(2) == 0
	if _, err := k.Checkpoint(k.t.Context(), api.CheckpointRequest{Nodes: nodes, Name: name, Durable: durable}); err != nil {
		k.t.Fatal(err)
	}
	for _, n := range nodes {
		if durable {
			k.models[n].flush()
		}
		k.models[n+"@"+name] = k.models[n].clone()
	}
}

// rollbackRandom rolls back to a checkpoint with a model, if there is one.
func (k *killing) rollbackRandom(name string) {
	e, err := k.Element(name)
	for err == nil && e.Kind != api.KindDisk {
		if e, err = k.Element(e.Parent); err != nil || e.Kind == api.KindDisk {
			return
		}
		if m := k.models[e.Name]; m != nil && k.r.IntN(2) == 0 {
			before := k.models[name]
			k.models[name] = nil // while it changes
			if _, err := k.Rollback(k.t.Context(), api.RollbackRequest{Node: name, Checkpoint: e.Name}); err != nil {
				k.models[name] = before
				k.t.Fatal(err)
			}
			k.models[name] = m.clone()
			k.rolled[name] = k.state.Seq
			return
		}
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
