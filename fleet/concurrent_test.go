package fleet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
)

// TestFiftyCallers has 50 goroutines call everything, while clients write: no operation fails but by a rule, and the tree
// can be read after it.
func TestFiftyCallers(t *testing.T) {
	f := newFleet(t, Options{})
	for i := range 5 {
		f.fork("golden", fmt.Sprint("base", i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events := f.Subscribe(ctx)
	go func() {
		for range events {
		}
	}()
	var writers, callers sync.WaitGroup
	stop := make(chan struct{})
	for i := range 3 {
		dev := f.dial(fmt.Sprint("base", i))
		writers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 7))
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := dev.WriteAt(make([]byte, 4096), r.Int64N(testSize/4096)*4096); err != nil {
					t.Error(err)
					return
				}
				if n%20 == 0 {
					if err := dev.Flush(); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	calls := 200
	if testing.Short() {
		calls = 100
	}
	var left atomic.Int64
	left.Store(int64(calls))
	for i := range 50 {
		callers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 9))
			for n := 0; left.Add(-1) >= 0; n++ {
				if err := f.randomCall(r, fmt.Sprintf("x%d-%d", i, n)); err != nil && !expected(err) {
					t.Error(err)
					return
				}
			}
		})
	}
	callers.Wait()
	close(stop)
	writers.Wait()
	if d, err := f.Disk("golden"); err == nil && d.Merge != nil {
		f.waitMerged("golden") // its end changes the tree
	}
	tree := f.names()
	f.restart()
	if got := f.names(); got != tree {
		t.Errorf("tree %s\nafter a restart, before %s", got, tree)
	}
}

// expected reports whether an error is one of a rule: what another caller did meanwhile.
func expected(err error) bool {
	switch codeOf(err) {
	case api.CodeNoSuchElement, api.CodeNoSuchNode, api.CodeNoSuchCheckpoint, api.CodeHasChildren, api.CodeInUse, api.CodeNotAncestor,
		api.CodeNameTaken, api.CodeMerging, api.CodeAlreadyMerging:
		return true
	}
	return false
}

// randomCall makes one call. The nodes base0 to base2 have clients.
func (f *testFleet) randomCall(r *rand.Rand, name string) (err error) {
	elements := f.Tree().Elements
	e := elements[r.IntN(len(elements))]
	ctx := context.Background()
	switch r.IntN(10) {
	case 0, 1, 2:
		_, err = f.Fork(ctx, api.ForkRequest{From: e.Name, Name: name, Durable: r.IntN(4) == 0})
	case 3, 4:
		if e.Kind == api.KindNode {
			_, err = f.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{e.Name}, Name: name})
		} else {
			_, err = f.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"base3", "base4"}, Name: name})
		}
	case 5, 6:
		if e.Kind != api.KindDisk && e.Name[0] == 'x' {
			err = f.Drop(ctx, e.Name)
		}
	case 7:
		if e.Kind == api.KindNode {
			_, err = f.Squash(ctx, api.SquashRequest{Node: e.Name})
		}
	case 8:
		if e.Kind == api.KindNode && e.Name[0] == 'x' {
			_, err = f.Rollback(ctx, api.RollbackRequest{Node: e.Name, Checkpoint: e.Parent, Force: true})
		}
		if codeOf(err) == api.CodeNoSuchCheckpoint {
			err = nil // the parent is the disk
		}
	default:
		if r.IntN(4) == 0 && e.Name == "base4" {
			_, err = f.Merge(ctx, e.Name)
		} else {
			_, err = f.Table(e.Name)
		}
	}
	return err
}

// TestGroupCheckpoint has a writer number its writes over three nodes, one after the other: a checkpoint of all three has no
// write without those before it.
func TestGroupCheckpoint(t *testing.T) {
	f := newFleet(t, Options{})
	const disks = 8
	names := make([]string, disks)
	devs := make([]block.Device, disks) // without a connection: many writes while the nodes are sealed
	for i := range disks {
		names[i] = fmt.Sprint("n", i)
		f.fork("golden", names[i])
		devs[i] = f.nodes[names[i]].dev
		put(t, devs[i], 0, strings.Repeat("\x00", 8))
	}
	stop := make(chan struct{})
	var writer sync.WaitGroup
	var written atomic.Uint64
	writer.Go(func() {
		for n := uint64(1); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := devs[n%disks].WriteAt(binary.LittleEndian.AppendUint64(nil, n), 0); err != nil {
				t.Error(err)
				return
			}
			written.Store(n)
		}
	})
	for i := range 50 {
		from := written.Load()
		waitFor(t, "writes", func() bool { return written.Load() > from+10 || t.Failed() })
		name := fmt.Sprint("c", i)
		f.checkpoint(name, slices.Concat(names[i%disks:], names[:i%disks])...) // the order does not matter
		after := written.Load()
		var last [disks]uint64
		highest := uint64(0)
		for k, n := range names {
			f.mu.Lock()
			chain := f.layers[f.state.checkpoint(n+"@"+name).ID].chain
			f.mu.Unlock()
			p := make([]byte, 8)
			if _, err := chain.ReadAt(p, 0); err != nil {
				t.Fatal(err)
			}
			last[k] = binary.LittleEndian.Uint64(p)
			highest = max(highest, last[k])
		}
		for n := max(highest, disks) - disks + 1; n <= highest; n++ {
			if last[n%disks] != n {
				t.Errorf("checkpoint %s has write %d, and not write %d: %v", name, highest, n, last)
			}
		}
		if highest < from || highest > after+1 {
			t.Errorf("checkpoint %s has write %d, and was made between %d and %d", name, highest, from, after)
		}
	}
	close(stop)
	writer.Wait()
}

// TestJournalFails has changes refused, and I/O go on.
func TestJournalFails(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	put(t, vm, 0, "flushed")
	if err := vm.Flush(); err != nil {
		t.Fatal(err)
	}
	tree := f.names()
	f.mu.Lock()
	f.journal.f.Close()
	f.mu.Unlock()
	ops := []func() error{
		func() error { _, err := f.Fork(t.Context(), api.ForkRequest{From: "vm", Name: "x"}); return err },
		func() error {
			_, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: "x"})
			return err
		},
		func() error { return f.Drop(t.Context(), "vm") },
		func() error { _, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm"}); return err },
		func() error { _, err := f.Merge(t.Context(), "vm"); return err },
		func() error {
			_, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "y", Source: f.golden, Raw: true})
			return err
		},
	}
	for i, op := range ops {
		if err := op(); codeOf(err) != api.CodeStateFailed {
			t.Errorf("operation %d: %v", i, err)
		}
	}
	if f.Tree().Error == "" {
		t.Error("the tree does not say so")
	}
	put(t, vm, 0, "goes on")
	want(t, vm, 0, "goes on")
	if err := vm.Flush(); err != nil { // its layers and their records are durable
		t.Error(err)
	}
	f.cancel()
	f.wait()
	if err := f.Close(); err == nil {
		t.Error("Close has no error")
	}
	f.open()
	if got := f.names(); got != tree {
		t.Errorf("tree %s, want %s", got, tree)
	}
	want(t, f.dial("vm"), 0, "goes on")
	if files, _ := filepath.Glob(filepath.Join(f.dir, layersDir, "*")); len(files) != 1 {
		t.Errorf("files %v", files)
	}
}

// TestFileFails has an operation that can't make its file change nothing.
func TestFileFails(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	vm := f.dial("vm")
	put(t, vm, 0, "before")
	tree := f.names()
	layers := filepath.Join(f.dir, layersDir)
	if err := os.Rename(layers, layers+".x"); err != nil {
		t.Fatal(err)
	}
	for i, op := range []func() error{
		func() error { _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "x"}); return err },
		func() error { _, err := f.Fork(t.Context(), api.ForkRequest{From: "vm", Name: "x"}); return err },
		func() error {
			_, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: "x"})
			return err
		},
		func() error { _, err := f.Merge(t.Context(), "vm"); return err },
	} {
		if err := op(); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("operation %d: %v", i, err)
		}
	}
	if err := os.Rename(layers+".x", layers); err != nil {
		t.Fatal(err)
	}
	put(t, vm, 0, "after!")
	if got := f.names(); got != tree {
		t.Errorf("tree %s, want %s", got, tree)
	}
	f.fork("vm", "x")
	want(t, f.dial("x"), 0, "after!")
}

// TestCheckpointPause measures how long changes to a node wait for a checkpoint, under load. On an idle machine that is
// below a millisecond; here it is only bounded.
func TestCheckpointPause(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm")
	dev := f.dial("vm")
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		r := rand.New(rand.NewPCG(1, 1))
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := dev.WriteAt(make([]byte, 4096), r.Int64N(testSize/4096)*4096); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	worst := time.Duration(0)
	for i := range 20 {
		c, err := f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: fmt.Sprint("c", i)})
		if err != nil {
			t.Fatal(err)
		}
		worst = max(worst, time.Duration(c.PauseSeconds*float64(time.Second)))
	}
	close(stop)
	writer.Wait()
	if t.Logf("longest pause %v", worst); worst <= 0 || worst > 30*time.Second {
		t.Errorf("longest pause %v", worst)
	}
}
