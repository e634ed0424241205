package fleet

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
)

// TestTablesShowTheSame executes the tables of every element, with views of stores in the place of the kernel, and compares
// what they show with what the fleet did.
func TestTablesShowTheSame(t *testing.T) {
	f := newFleet(t, Options{})
	newWritable(t, f)
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "big", Size: 3 * testSize}); err != nil {
		t.Fatal(err)
	}
	put(t, f.dial("big"), 2*testSize, "behind")
	f.checkpoint("c", "big")
	put(t, f.dial("big"), 100, "top")
	f.fork("base", "a")
	put(t, f.dial("base"), 5000, "written")
	put(t, f.dial("a"), 9000, "node")
	f.fork("base", "b")
	f.fork("a", "a2")
	put(t, f.dial("base"), 6000, "again")
	f.fork("golden", "merged")
	put(t, f.dial("merged"), 0, "merged")
	f.merge("merged")
	tables := map[string]api.Table{}
	shown := map[string][]byte{}
	for _, e := range f.Tree().Elements {
		var err error
		if tables[e.Name], err = f.Table(e.Name); err != nil {
			t.Fatal(err)
		}
		if e.Kind != api.KindDisk {
			name := e.Name
			if e.Kind == api.KindCheckpoint {
				name = strings.NewReplacer("@", "-", "~", "-").Replace("look-" + e.Name)
				f.fork(e.Name, name)
			}
			shown[e.Name] = readAll(t, f.nodes[name].dev)
		}
	}
	f.stop()
	for name, want := range shown {
		if got := executeTable(t, tables[name]); !bytes.Equal(got, want) {
			t.Errorf("%s: the tables show something else from byte %d on:\n%+v", name, firstDifference(got, want), tables[name])
		}
	}
	if len(shown) < 6 {
		t.Errorf("only %d elements", len(shown))
	}
}

// executeTable returns what the last device of a table shows.
func executeTable(t *testing.T, table api.Table) []byte {
	t.Helper()
	devices := map[string]block.Device{}
	for _, file := range table.Files {
		dev, err := block.Open(file.File, block.Options{ReadOnly: true, Lock: block.LockShared})
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		devices[file.Placeholder] = dev
	}
	var last block.Device
	for _, d := range table.Devices {
		lines := strings.Split(d.Table, "\n")
		var start, length, sectors uint64
		var target, origin, cow, kind string
		if _, err := fmt.Sscan(lines[0], &start, &length, &target, &origin); err != nil || devices[origin] == nil {
			t.Fatalf("%s: %q: %v", d.Name, d.Table, err)
		}
		switch target {
		case "linear":
			total := length
			if len(lines) == 2 {
				if _, err := fmt.Sscan(lines[1], &start, &sectors, &kind); err != nil || start != length || kind != "zero" {
					t.Fatalf("%s: %q: %v", d.Name, d.Table, err)
				}
				total += sectors
			}
			last = stack.New(devices[origin], int64(total)*block.SectorSize)
		case "snapshot":
			if _, err := fmt.Sscan(lines[0], &start, &length, &target, &origin, &cow, &kind); err != nil || kind != "P" {
				t.Fatalf("%s: %q: %v", d.Name, d.Table, err)
			}
			st, err := store.OpenToRead(devices[cow])
			if err != nil {
				t.Fatal(err)
			}
			if last, err = store.NewView(devices[origin], st); err != nil {
				t.Fatal(err)
			}
			if last.Size() != int64(length)*block.SectorSize {
				t.Errorf("%s: %d bytes over an origin of %d", d.Name, length*block.SectorSize, last.Size())
			}
		}
		devices[filepath.Join("/dev/mapper", d.Name)] = last
	}
	return readAll(t, last)
}
