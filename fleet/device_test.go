package fleet

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/server/api"
)

// TestDevice holds the device of a node, over two sealed layers, against the contract of devices.
func TestDevice(t *testing.T) {
	f := newFleet(t, Options{})
	n := 0
	blocktest.Run(t, func(t *testing.T) block.Device {
		n++
		name := fmt.Sprint("n", n)
		f.fork("golden", name)
		for i := range 2 {
			put(t, f.nodes[name].dev, int64(i)*5000, "sealed")
			f.checkpoint(fmt.Sprint("c", i), name)
		}
		return f.nodes[name].dev
	})
}

// TestFullFileSystem has operations refused, writes fail or be made, nothing lost, and elements dropped.
func TestFullFileSystem(t *testing.T) {
	small := testhost.Mount(t, "tmpfs", "tmpfs", "size=6m")
	f := newFleet(t, Options{})
	f.stop()
	f.dir = filepath.Join(small, "f")
	f.open()
	if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "golden", Source: f.golden, Raw: true}); err != nil {
		t.Fatal(err)
	}
	f.fork("golden", "vm")
	vm := f.nodes["vm"].dev
	model := readAll(t, vm)
	var full error
	for round := 0; full == nil && round < 100; round++ {
		for off := int64(0); off < testSize && full == nil; off += 4096 {
			p := bytes.Repeat([]byte{byte(round)}, 4096)
			if _, full = vm.WriteAt(p, off); full == nil {
				copy(model[off:], p)
			}
		}
		if full == nil {
			_, full = f.Checkpoint(t.Context(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: fmt.Sprint("c", round)})
		}
	}
	if codeOf(full) != api.CodeNoSpace && !errors.Is(full, syscall.ENOSPC) {
		t.Fatalf("full: %v", full)
	}
	filler := filepath.Join(small, "filler")
	os.WriteFile(filler, make([]byte, 6<<20), 0o600) // the rest
	for range 2 {
		if _, err := f.Fork(t.Context(), api.ForkRequest{From: "vm@c0", Name: "x"}); err == nil {
			if err := f.Drop(t.Context(), "x"); err != nil {
				t.Errorf("drop on a full file system: %v", err)
			}
		} else if codeOf(err) != api.CodeNoSpace {
			t.Errorf("fork: %v", err)
		}
	}
	if err := vm.Flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	if !bytes.Equal(readAll(t, vm), model) {
		t.Error("the node shows something else")
	}
	if e := f.Tree().Error; e != "" {
		t.Errorf("changes are refused: %s", e)
	}
	f.restart() // state.json may not be replaced, which is no error
	vm = f.nodes["vm"].dev
	if !bytes.Equal(readAll(t, vm), model) {
		t.Error("the node shows something else after a restart without space")
	}
	if err := errors.Join(os.Remove(filler), syscall.Mount("", small, "", syscall.MS_REMOUNT, "size=16m")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm"}); err != nil {
		t.Error(err)
	}
	f.fork("vm", "y")
	if err := vm.Flush(); err != nil {
		t.Fatal(err)
	}
	f.restart()
	if !bytes.Equal(readAll(t, f.nodes["vm"].dev), model) {
		t.Error("the node shows something else after a restart")
	}
}
