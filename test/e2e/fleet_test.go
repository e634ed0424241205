package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
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
	off     atomic.Bool // the power
	numbers uint64
	disk    *numbered
	nodes   map[string]*numbered
	saved   map[string]*numbered // checkpoints, by NODE@NAME
	dropped map[string]*numbered // nodes and checkpoints that there may be again after a power cut
	trees   []string             // that there may be after a power cut, the newest last
	made    int                  // names
	adopted int                  // of the stores that were made to be adopted
}

// adoptable is how many stores there are to be adopted.
const adoptable = 2

// TestFleetPowerCuts cuts the power of a daemon in the middle of forks, checkpoints, rollbacks, squashes, merges, adoptions, drops
// and writes: the tree is one that there was since the last durable command, every node and checkpoint in it, and the disk, has
// every byte that was flushed, and every layer passes a check.
func TestFleetPowerCuts(t *testing.T) {
	seeds := uint64(7)
	if deep {
		seeds = 60
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			w := newFleetWorld(t, seed)
			for range 3 {
				w.start()
				w.look()
				cut := time.Duration(w.r.IntN(150)) * time.Millisecond
				time.AfterFunc(cut, w.powerOff) // when it happens is up to chance
				for w.step(w.r.IntN(16)) {
				}
				w.powerOn()
			}
			w.end()
		})
	}
}

// TestFleetPowerCutAtEachCall cuts the power at calls of each operation that change a file or make it durable: all of them
// with DMSNAP_DEEP, else a sample.
func TestFleetPowerCutAtEachCall(t *testing.T) {
	for kind, name := range map[int]string{4: "checkpoint", 6: "fork", 8: "rollback", 9: "squash of a node", 10: "squash of a checkpoint",
		11: "drop", 12: "adopt", 13: "merge"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := 0; deep || n < 2; n++ {
				w := newFleetWorld(t, uint64(n))
				for _, before := range []int{1, 4, 6, 1, 4, 6, 0, 6} { // layers that are a node's own among them
					w.step(before)
				}
				skip := n
				if !deep {
					skip = w.r.IntN(25)
				}
				w.rig.must(w.rig.fs.Add(faultfs.Rule{Op: faultfs.Change, File: "*", Skip: skip, Count: 1, Hang: true}))
				ended := make(chan bool, 1)
				go func() { ended <- w.step(kind) && w.write(w.pick(w.nodes), true) }()
				hung := false
				for waiting := true; waiting && !hung; {
					select {
					case <-ended:
						waiting = false
					case <-time.After(time.Millisecond):
						calls, err := w.rig.fs.Hanging()
						w.rig.must(err)
						hung = calls > 0
					}
				}
				w.powerOff()
				if hung {
					<-ended
				}
				w.powerOn()
				w.end()
				if t.Failed() || deep && !hung {
					t.Logf("%d calls", n)
					return
				}
			}
		})
	}
}

func newFleetWorld(t *testing.T, seed uint64) *fleetWorld {
	w := &fleetWorld{t: t, r: rand.New(rand.NewPCG(seed, 13)), dir: newFolder(t), rig: &rig{t: t, fs: newFS(t)}, disk: new(numbered),
		nodes: map[string]*numbered{}, saved: map[string]*numbered{}, dropped: map[string]*numbered{}}
	for _, name := range []string{"f", "f/layers"} {
		w.rig.must(w.rig.fs.Folder(name, 0))
	}
	var base []byte
	for i := range w.disk {
		w.disk[i] = []uint64{0}
		base = append(append(base, numberedBlock(0)...), make([]byte, fleetStride-fleetBlock)...)
	}
	f, err := os.Create(w.base())
	w.rig.must(err)
	_, err = f.Write(base)
	w.rig.must(errors.Join(err, f.Sync(), f.Close(), syncDir(w.rig.fs.Dir()+"/o")))
	for i := range adoptable {
		w.rig.run(0, "create", w.base(), w.cow(i), "--raw")
	}
	w.start()
	w.want("POST", "disks", args{"name": "base", "source": w.base(), "raw": true})
	w.want("POST", "fork", args{"from": "base", "name": "vm", "durable": true})
	w.nodes["vm"] = w.disk.clone()
	w.trees = []string{w.names()}
	return w
}

func (w *fleetWorld) base() string     { return w.rig.fs.Dir() + "/o/base" }
func (w *fleetWorld) cow(i int) string { return fmt.Sprintf("%s/c/%d.cow", w.rig.fs.Dir(), i) }

// args are the body of a request.
type args map[string]any

// start starts the daemon on what the disks have.
func (w *fleetWorld) start() {
	w.t.Helper()
	if w.rig.s != nil {
		return
	}
	s, err := launch(w.dir, "daemon", "--dir", w.rig.fs.Dir()+"/f", "--allow-path", w.rig.fs.Dir())
	if err != nil {
		w.t.Fatal(err)
	}
	w.rig.s = s
}

// powerOff is called at any moment: from then on requests may fail.
func (w *fleetWorld) powerOff() {
	w.off.Store(true)
	w.rig.fs.PowerOff()
}

func (w *fleetWorld) powerOn() {
	w.t.Helper()
	w.rig.kill()
	_, err := w.rig.fs.PowerOn(w.r.Uint64())
	w.rig.must(err)
	w.off.Store(false)
}

// end looks at what there is, and ends the daemon in good order.
func (w *fleetWorld) end() {
	w.t.Helper()
	w.start()
	w.look()
	w.rig.terminate(0)
	w.checkLayers()
}

func (w *fleetWorld) want(method, path string, body args) {
	w.t.Helper()
	if err := w.rig.s.api(method, path, body, nil); err != nil {
		w.t.Fatalf("%s %s %v: %v\n%s", method, path, body, err, w.rig.s.log())
	}
}

// names are those of the nodes and checkpoints of the model, in one text.
func (w *fleetWorld) names() string {
	return strings.Join(slices.Sorted(maps.Keys(w.nodes)), " ") + " | " + strings.Join(slices.Sorted(maps.Keys(w.saved)), " ")
}

// step does one thing, and returns false when the power was cut. A tree that the command leads to is one that there may be
// before the command begins.
func (w *fleetWorld) step(kind int) bool {
	node := w.pick(w.nodes)
	durable := w.r.IntN(3) == 0
	w.made++
	name := fmt.Sprint("n", w.made)
	switch {
	case kind < 4 || kind > 13:
		return w.write(node, w.r.IntN(3) > 0)
	case kind < 6 || len(w.saved) == 0:
		w.saved[node+"@"+name] = w.nodes[node].clone()
		return w.record(durable, "POST", "checkpoint", args{"nodes": []string{node}, "name": name, "durable": durable})
	case kind < 8:
		from, content := "base", w.disk
		switch w.r.IntN(5) {
		case 0, 1:
			from, content = node, w.nodes[node]
		case 2, 3:
			from = w.pick(w.saved)
			content = w.saved[from]
		}
		w.nodes[name] = content.clone()
		return w.record(durable, "POST", "fork", args{"from": from, "name": name, "durable": durable})
	case kind == 8:
		return w.rollback(node)
	case kind == 9:
		return w.record(false, "POST", "nodes/"+node+"/squash", nil)
	case kind == 10:
		return w.record(false, "POST", "nodes/"+w.pick(w.saved)+"/squash", nil)
	case kind == 11:
		return w.drop(node)
	case kind == 12 && w.adopted < adoptable:
		w.adopted++
		w.nodes[name] = w.disk.clone()
		return w.record(false, "POST", "adopt", args{"node": name, "cow": w.cow(w.adopted - 1), "disk": "base"})
	case kind == 13:
		return w.merge(node)
	}
	return true
}

func (w *fleetWorld) pick(from map[string]*numbered) string {
	names := slices.Sorted(maps.Keys(from))
	return names[w.r.IntN(len(names))]
}

// record makes a request after which the tree is that of the model.
func (w *fleetWorld) record(durable bool, method, path string, body args) bool {
	w.t.Helper()
	w.trees = append(w.trees, w.names())
	if err := w.rig.s.api(method, path, body, nil); err != nil {
		return w.failed(fmt.Errorf("%s %s %v: %w", method, path, body, err))
	}
	if durable {
		w.trees = w.trees[len(w.trees)-1:]
	}
	return true
}

// refused reports whether an error is a refusal with a code.
func refused(err error, code string) bool {
	var e *apiError
	return errors.As(err, &e) && e.Code == code
}

// rollback takes the node back to a checkpoint of its own: until it is flushed it may be either.
func (w *fleetWorld) rollback(node string) bool {
	own := slices.DeleteFunc(slices.Sorted(maps.Keys(w.saved)), func(name string) bool { return !strings.HasPrefix(name, node+"@") })
	if len(own) == 0 {
		return true
	}
	to := own[w.r.IntN(len(own))]
	before := w.nodes[node]
	w.nodes[node] = before.or(w.saved[to])
	w.trees = append(w.trees, w.names())
	err := w.rig.s.api("POST", "nodes/"+node+"/rollback", args{"checkpoint": to, "force": true}, nil)
	if refused(err, "not_ancestor") { // it was rolled back to an earlier one
		w.nodes[node] = before
		return true
	}
	return err == nil || w.failed(err)
}

// drop drops a node, or a checkpoint; until the next durable command there may be either tree.
func (w *fleetWorld) drop(node string) bool {
	name, from, path := node, w.nodes, "nodes/"
	if len(w.nodes) == 1 || w.r.IntN(2) == 0 {
		name, from, path = w.pick(w.saved), w.saved, "checkpoints/"
	}
	content := from[name]
	delete(from, name)
	w.dropped[name] = content
	w.trees = append(w.trees, w.names())
	err := w.rig.s.api("DELETE", path+name, nil, nil)
	if refused(err, "has_children") {
		from[name] = content
		return true
	}
	return err == nil || w.failed(err)
}

// merge writes a node into the disk. After a power cut the daemon goes on with it, or has not begun.
func (w *fleetWorld) merge(node string) bool {
	merged := w.nodes[node].clone()
	w.disk = w.disk.or(merged)
	if err := w.rig.s.api("POST", "nodes/"+node+"/merge", nil, nil); err != nil {
		return w.failed(err)
	}
	if !w.merged() {
		return false
	}
	w.disk = merged
	return true
}

// merged waits for the end of a merge, and returns false when the power was cut.
func (w *fleetWorld) merged() bool {
	w.t.Helper()
	for {
		var d struct{ Merge *mergeStatus }
		if err := w.rig.s.api("GET", "disks/base", nil, &d); err != nil {
			return w.failed(err)
		}
		switch {
		case d.Merge == nil || d.Merge.State == "done":
			return true
		case d.Merge.State != "running":
			return w.failed(fmt.Errorf("merge: %+v", d.Merge))
		}
		time.Sleep(time.Millisecond)
	}
}

// write writes to a node, and flushes it if flush is set.
func (w *fleetWorld) write(node string, flush bool) bool {
	w.t.Helper()
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
	if !w.off.Load() {
		w.t.Errorf("%v\n%s", err, w.rig.s.log())
	}
	return false
}

// look compares the daemon's tree and disks with what they may be, and goes on from what is there.
func (w *fleetWorld) look() {
	w.t.Helper()
	var tree struct {
		Elements []struct{ Name, Kind, State, Error string }
	}
	w.rig.must(w.rig.s.api("GET", "tree", nil, &tree))
	nodes, saved := map[string]*numbered{}, map[string]*numbered{}
	known := maps.Clone(w.dropped)
	maps.Copy(known, w.nodes)
	maps.Copy(known, w.saved)
	for _, e := range tree.Elements {
		switch {
		case e.State != "ok":
			w.t.Fatalf("%s: %s\n%s", e.Name, e.Error, w.rig.s.log())
		case e.Name == "look": // its drop was lost
			w.want("DELETE", "nodes/look", nil)
		case e.Kind == "node":
			nodes[e.Name] = known[e.Name]
		case e.Kind == "checkpoint" && !strings.Contains(e.Name, "@~"):
			saved[e.Name] = known[e.Name]
		}
	}
	w.nodes, w.saved = nodes, saved
	clear(w.dropped)
	if !slices.Contains(w.trees, w.names()) {
		w.t.Fatalf("the tree is %s\nit may be one of\n%s\n%s", w.names(), strings.Join(w.trees, "\n"), w.rig.s.log())
	}
	for name, d := range nodes {
		nodes[name] = w.read(name, d)
	}
	// What checkpoints and the disk have shows in a fork.
	for name, d := range saved {
		saved[name] = w.readFork(name, d)
	}
	if !w.merged() {
		w.t.Fatal("the merge does not go on")
	}
	w.disk = w.readFork("base", w.disk)
	// All of it is durable from here on.
	w.want("POST", "fork", args{"from": "base", "name": "look", "durable": true})
	w.want("DELETE", "nodes/look", nil)
	w.trees = []string{w.names()}
}

// readFork is read of a fork.
func (w *fleetWorld) readFork(of string, may *numbered) *numbered {
	w.t.Helper()
	w.want("POST", "fork", args{"from": of, "name": "look"})
	d := w.read("look", may)
	w.want("DELETE", "nodes/look", nil)
	return d
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
