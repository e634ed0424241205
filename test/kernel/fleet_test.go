package kernel_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// fleetBytes is the size of the disks of a fleet.
const fleetBytes = 2<<20 + 3*512

// A judgedFleet is a fleet whose tables the kernel gets.
type judgedFleet struct {
	*fleet.Fleet
	t    *testing.T
	r    *rand.Rand
	sock string
}

func newJudgedFleet(t *testing.T, seed uint64) *judgedFleet {
	t.Helper()
	dir, err := os.MkdirTemp("", "fl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f, err := fleet.Open(filepath.Join(dir, "f"), fleet.Options{})
	if err != nil {
		t.Fatal(err)
	}
	j := &judgedFleet{f, t, rand.New(rand.NewPCG(seed, 1)), filepath.Join(dir, "s")}
	l, err := net.Listen("unix", j.sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	wait := f.Start(ctx, l)
	t.Cleanup(func() {
		cancel()
		if err := wait(); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	for i, name := range []string{"golden", "writable"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, blocktest.Pattern(fleetBytes, uint64(i)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: name, Source: path, Raw: true, Writable: i == 1}); err != nil {
			t.Fatal(err)
		}
	}
	return j
}

// open connects to an export and calls do.
func (j *judgedFleet) open(name string, do func(c *nbd.Client) error) {
	j.t.Helper()
	c, err := nbd.Dial(j.t.Context(), nbd.URI{Network: "unix", Address: j.sock, Export: name}.String())
	if err == nil {
		err = do(c)
		c.Close()
	}
	if err != nil {
		j.t.Fatalf("%s: %v", name, err)
	}
}

// write writes to some places of an export, its end among them, and flushes.
func (j *judgedFleet) write(name string) {
	j.t.Helper()
	j.open(name, func(c *nbd.Client) error {
		for i := range 12 {
			n := int64(512 * (1 + j.r.IntN(40)))
			off := j.r.Int64N((c.Size()-n)/512+1) * 512
			if i == 0 {
				off = c.Size() - n
			}
			if _, err := c.WriteAt(blocktest.Pattern(int(n), j.r.Uint64()), off); err != nil {
				return err
			}
		}
		return c.Flush()
	})
}

func (j *judgedFleet) fork(from, name string, size int64) {
	j.t.Helper()
	if _, err := j.Fork(j.t.Context(), api.ForkRequest{From: from, Name: name, Size: size}); err != nil {
		j.t.Fatal(err)
	}
}

func (j *judgedFleet) checkpoint(name string, nodes ...string) {
	j.t.Helper()
	if _, err := j.Checkpoint(j.t.Context(), api.CheckpointRequest{Nodes: nodes, Name: name}); err != nil {
		j.t.Fatal(err)
	}
}

// digest is that of what clients of an export see.
func (j *judgedFleet) digest(name string) (digest string) {
	j.t.Helper()
	j.open(name, func(c *nbd.Client) error {
		b := make([]byte, c.Size())
		_, err := c.ReadAt(b, 0)
		sum := sha256.Sum256(b)
		digest = hex.EncodeToString(sum[:])
		return err
	})
	return digest
}

// TestFleetTables has the kernel stack the tables of a fleet, all at once, as layers share those below them: it shows the same
// disks.
func TestFleetTables(t *testing.T) {
	need(t)
	j := newJudgedFleet(t, 1)
	ctx := t.Context()
	j.fork("golden", "vm", 0)
	j.write("vm")
	j.checkpoint("a", "vm")
	j.write("vm")
	j.fork("vm", "fork", 0) // of a running node
	j.write("vm")
	j.write("fork")
	j.fork("vm@a", "larger", fleetBytes+1<<20+512)
	j.write("larger")
	j.checkpoint("b", "vm", "larger")
	j.write("larger")
	j.fork("larger@b", "unwritten", 0)
	j.checkpoint("c", "vm")
	j.write("vm")
	if _, err := j.Squash(ctx, api.SquashRequest{Node: "fork"}); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Rollback(ctx, api.RollbackRequest{Node: "vm", Checkpoint: "vm@b", Force: true}); err != nil {
		t.Fatal(err)
	}
	j.write("vm")
	for i := range 12 { // deep
		j.checkpoint(fmt.Sprint("deep", i), "fork")
		j.write("fork")
	}
	j.fork("writable", "old", 0)
	j.write("writable") // which old does not show
	j.write("old")
	j.fork("writable", "new", 0)
	j.write("writable")
	j.write("new")
	for _, name := range j.nodes() {
		j.open(name, (*nbd.Client).Flush)
	}

	k := newKernel(t, sharedMachine(t))
	made := map[string]bool{}
	names := j.nodes()
	for _, name := range names {
		j.judge(k, made, name)
	}
	if len(names) != 6 || len(made) < 20 {
		t.Errorf("%d nodes and %d devices were compared", len(names), len(made))
	}
	tally.add(func(c *counts) { c.observations += len(names) })
}

// nodes are the names of the nodes.
func (j *judgedFleet) nodes() (names []string) {
	for _, e := range j.Tree().Elements {
		if e.Kind == api.KindNode {
			names = append(names, e.Name)
		}
	}
	return names
}

// judge makes the devices of a node's tables that are not there yet, and compares the last one with the node.
func (j *judgedFleet) judge(k *kernel, made map[string]bool, name string) {
	j.t.Helper()
	table, err := j.Table(name)
	if err != nil {
		j.t.Fatal(err)
	}
	device := strings.NewReplacer("/dev/mapper/", "dm:", "@", "dm:file-")
	for _, f := range table.Files {
		dev := strings.TrimPrefix(device.Replace(f.Placeholder), "dm:")
		if !made[dev] {
			b := file(j.t, f.File)
			k.disk(dev, int64(len(b)/512))
			k.put(dev, 0, b)
			made[dev] = true
		}
	}
	for _, d := range table.Devices {
		if !made[d.Name] {
			k.create(d.Name, device.Replace(d.Table))
			made[d.Name] = true
		}
	}
	top := table.Devices[len(table.Devices)-1].Name
	if got, want := k.digest(top), j.digest(name); got != want {
		j.t.Errorf("%s: the kernel shows %s, the fleet %s\n%+v", name, got, want, table)
	}
}
