package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// A fleet of dmsnap daemon on a file system that loses power. What is right is said by lists of the values that each block
// may have, and of the trees that there may be: the one after any command since the last that is durable.

const (
	fleetBlock  = 512 // a power cut tears nothing smaller
	fleetStride = 2048
	fleetBlocks = 24
)

// A numbered is a disk whose blocks have numbers: those that each may have after a power cut, the last one being what it has
// without.
type numbered [fleetBlocks][]uint64

func (d *numbered) clone() *numbered {
	var c numbered
	for i := range d {
		c[i] = slices.Clone(d[i])
	}
	return &c
}

// last is what the disk has now, durably.
func (d *numbered) last() *numbered {
	var c numbered
	for i := range d {
		c[i] = []uint64{d[i][len(d[i])-1]}
	}
	return &c
}

// or adds what the disk may be instead, now.
func (d *numbered) or(other *numbered) *numbered {
	c := d.clone()
	for i := range c {
		c[i] = append(c[i], other[i]...)
	}
	return c
}

func numberedBlock(n uint64) []byte {
	p := fill(byte(n), fleetBlock)
	copy(p, fmt.Sprintf("%020d", n))
	return p
}

type fleetWorld struct {
	t       *testing.T
	r       *rand.Rand
	dir     string
	rig     *rig
	numbers uint64
	nodes   map[string]*numbered
	saved   map[string]*numbered // checkpoints, by NODE@NAME
	trees   []string             // that there may be after a power cut, the newest last
	made    int                  // names
}

// TestFleetPowerCuts cuts the power of a daemon in the middle of forks, checkpoints, rollbacks, drops and writes: the tree is one
// that there was since the last durable command, every node and checkpoint in it has every byte that was flushed, and every
// layer passes a check.
func TestFleetPowerCuts(t *testing.T) {
	rounds := uint64(2)
	if os.Getenv("DMSNAP_DEEP") != "" {
		rounds = 60
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := newFleetWorld(t, seed)
			for range 4 {
				w.start()
				w.look()
				cut := time.Duration(w.r.IntN(400)) * time.Millisecond
				time.AfterFunc(cut, func() { w.rig.fs.PowerOff() }) // when it happens is up to chance
				for w.step() {
				}
				w.rig.kill()
				if _, err := w.rig.fs.PowerOn(w.r.Uint64()); err != nil {
					t.Fatal(err)
				}
			}
			w.start()
			w.look()
			w.rig.terminate(0)
			w.checkLayers()
		})
	}
}

func newFleetWorld(t *testing.T, seed uint64) *fleetWorld {
	w := &fleetWorld{t: t, r: rand.New(rand.NewPCG(seed, 13)), dir: newFolder(t), rig: &rig{t: t, fs: newFS(t)},
		nodes: map[string]*numbered{}, saved: map[string]*numbered{}, trees: []string{""}}
	for _, name := range []string{"f", "f/layers"} {
		if err := w.rig.fs.Folder(name, 0); err != nil {
			t.Fatal(err)
		}
	}
	var base []byte
	for range fleetBlocks {
		base = append(append(base, numberedBlock(0)...), make([]byte, fleetStride-fleetBlock)...)
	}
	if err := os.WriteFile(w.dir+"/base", base, 0o600); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.want("disk", "add", "base", w.dir+"/base", "--raw")
	w.want("fork", "base", "vm", "--durable")
	w.nodes["vm"] = w.base()
	w.trees = []string{w.names()}
	return w
}

// base is what the disk has.
func (w *fleetWorld) base() *numbered {
	var d numbered
	for i := range d {
		d[i] = []uint64{0}
	}
	return &d
}

// start starts the daemon on what the disks have.
func (w *fleetWorld) start() {
	w.t.Helper()
	if w.rig.s != nil {
		return
	}
	s, err := launch(w.dir, "daemon", "--dir", w.rig.fs.Dir()+"/f", "--allow-path", w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	w.rig.s = s
}

// command runs a command of the daemon, and reports whether it succeeded.
func (w *fleetWorld) command(args ...string) outcome {
	return run(append(args, "--control", w.rig.s.control)...)
}

func (w *fleetWorld) want(args ...string) {
	w.t.Helper()
	if o := w.command(args...); o.status != 0 {
		w.t.Fatalf("%v", o)
	}
}

// names are those of the nodes and checkpoints of the model, in one text.
func (w *fleetWorld) names() string {
	return strings.Join(slices.Sorted(maps.Keys(w.nodes)), " ") + " | " + strings.Join(slices.Sorted(maps.Keys(w.saved)), " ")
}

// step does one thing, and returns false when the power was cut. A tree that the command leads to is one that there may be
// before the command begins.
func (w *fleetWorld) step() bool {
	node := w.pick(w.nodes)
	switch k := w.r.IntN(10); {
	case k < 4:
		return w.write(node, w.r.IntN(3) > 0)
	case k < 6 || len(w.saved) == 0:
		w.made++
		name, durable := fmt.Sprint("c", w.made), w.r.IntN(3) == 0
		w.saved[node+"@"+name] = w.nodes[node].clone()
		return w.record(durable, "checkpoint", node, "--name", name)
	case k < 8:
		from := w.pick(w.saved)
		if w.r.IntN(2) == 0 {
			from = node
		}
		w.made++
		name, durable := fmt.Sprint("n", w.made), w.r.IntN(3) == 0
		if d := w.nodes[from]; d != nil {
			w.nodes[name] = d.clone()
		} else {
			w.nodes[name] = w.saved[from].clone()
		}
		return w.record(durable, "fork", from, name)
	case k < 9 && len(w.nodes) > 1:
		return w.rollback(node)
	default:
		return w.write(node, true)
	}
}

func (w *fleetWorld) pick(from map[string]*numbered) string {
	names := slices.Sorted(maps.Keys(from))
	return names[w.r.IntN(len(names))]
}

// record runs a command after which the tree is that of the model.
func (w *fleetWorld) record(durable bool, args ...string) bool {
	w.trees = append(w.trees, w.names())
	if durable {
		args = append(args, "--durable")
	}
	if o := w.command(args...); o.status != 0 {
		if !w.off() {
			w.t.Fatalf("%v", o)
		}
		return false
	}
	if durable {
		w.trees = w.trees[len(w.trees)-1:]
	}
	return true
}

// off reports whether the power is off.
func (w *fleetWorld) off() bool {
	_, err := os.Stat(w.rig.fs.Dir() + "/f/state.json")
	if errors.Is(err, os.ErrNotExist) {
		_, err = os.ReadDir(w.rig.fs.Dir() + "/f/layers")
	}
	if err != nil {
		return true
	}
	time.Sleep(50 * time.Millisecond) // a command that failed because of it may be noticed before
	probe, err := os.Create(w.rig.fs.Dir() + "/f/probe")
	if err != nil {
		return true
	}
	probe.Close()
	os.Remove(probe.Name())
	return false
}

// rollback takes the node back to a checkpoint of its own: until it is flushed it may be either.
func (w *fleetWorld) rollback(node string) bool {
	var own []string
	for name := range w.saved {
		if strings.HasPrefix(name, node+"@") {
			own = append(own, name)
		}
	}
	if len(own) == 0 {
		return true
	}
	slices.Sort(own)
	to := own[w.r.IntN(len(own))]
	before := w.nodes[node]
	w.nodes[node] = before.or(w.saved[to])
	w.trees = append(w.trees, w.names())
	switch o := w.command("rollback", node, to); {
	case o.status == 0 || w.off():
		return o.status == 0
	case strings.Contains(o.stderr, "is not a checkpoint that node"): // it was rolled back to an earlier one
		w.nodes[node] = before
		return true
	default:
		w.t.Fatalf("%v", o)
		return false
	}
}

// write writes to a node, and flushes it if flush is set.
func (w *fleetWorld) write(node string, flush bool) bool {
	c, err := dial(w.rig.s.socket, node, nil)
	if err != nil {
		return w.failed(err)
	}
	defer c.kill()
	d := w.nodes[node]
	for range 1 + w.r.IntN(4) {
		w.numbers++
		b := w.r.IntN(fleetBlocks)
		d[b] = append(d[b], w.numbers)
		if err := c.write(int64(b)*fleetStride, numberedBlock(w.numbers), 0); err != nil {
			return w.failed(err)
		}
	}
	if !flush {
		return true
	}
	if err := c.flush(); err != nil {
		return w.failed(err)
	}
	w.nodes[node] = d.last()
	return true
}

// failed reports an error unless the power is off, and returns false.
func (w *fleetWorld) failed(err error) bool {
	w.t.Helper()
	if !w.off() {
		w.t.Fatalf("%v\n%s", err, w.rig.s.log())
	}
	return false
}

// look compares the daemon's tree and disks with what they may be, and goes on from what is there.
func (w *fleetWorld) look() {
	w.t.Helper()
	var tree struct {
		Elements []struct{ Name, Kind string }
	}
	o := w.command("tree", "--json")
	if o.status != 0 {
		w.t.Fatalf("%v", o)
	}
	if err := json.Unmarshal([]byte(o.out), &tree); err != nil {
		w.t.Fatal(err)
	}
	nodes, saved := map[string]*numbered{}, map[string]*numbered{}
	for _, e := range tree.Elements {
		switch {
		case e.Name == "look": // its drop was lost
			w.want("drop", "look")
		case e.Kind == "node":
			nodes[e.Name] = w.nodes[e.Name]
		case e.Kind == "checkpoint" && !strings.Contains(e.Name, "@~"):
			saved[e.Name] = w.saved[e.Name]
		}
	}
	w.nodes, w.saved = nodes, saved
	if !slices.Contains(w.trees, w.names()) {
		w.t.Fatalf("the tree is %s\nit may be one of\n%s\n%s", w.names(), strings.Join(w.trees, "\n"), w.rig.s.log())
	}
	for name, d := range nodes {
		nodes[name] = w.read(name, d)
	}
	// What checkpoints have shows in a fork.
	for name, d := range saved {
		w.want("fork", name, "look")
		saved[name] = w.read("look", d)
		w.want("drop", "look")
	}
	// All of it is durable from here on.
	w.want("fork", "base", "look", "--durable")
	w.want("drop", "look")
	w.trees = []string{w.names()}
}

// read returns what an export has, which must be something that it may have.
func (w *fleetWorld) read(export string, may *numbered) *numbered {
	w.t.Helper()
	c, err := dial(w.rig.s.socket, export, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.kill()
	got, err := c.read(0, fleetBlocks*fleetStride)
	if err != nil {
		w.t.Fatalf("%s: %v\n%s", export, err, w.rig.s.log())
	}
	if err := c.flush(); err != nil {
		w.t.Fatal(err)
	}
	var now numbered
	for b := range now {
		var n uint64
		p := got[b*fleetStride:][:fleetBlock]
		fmt.Sscanf(string(p[:20]), "%d", &n)
		if may == nil || !slices.Contains(may[b], n) || string(numberedBlock(n)) != string(p) || len(bytes.Trim(got[b*fleetStride+fleetBlock:(b+1)*fleetStride], "\x00")) > 0 {
			w.t.Fatalf("%s: block %d has %d, and may have %v\n%s", export, b, n, may, w.rig.s.log())
		}
		now[b] = []uint64{n}
	}
	return &now
}

// checkLayers checks the store of every layer.
func (w *fleetWorld) checkLayers() {
	w.t.Helper()
	files, err := os.ReadDir(w.rig.fs.Dir() + "/f/layers")
	if err != nil || len(files) == 0 {
		w.t.Fatalf("%d layers, %v", len(files), err)
	}
	for _, f := range files {
		if o := run("check", w.rig.fs.Dir()+"/f/layers/"+f.Name()); o.status != 0 {
			w.t.Errorf("%v", o)
		}
	}
}
