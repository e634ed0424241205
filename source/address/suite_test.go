package address

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/store"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// fixture returns a disk that a real lvm2 made.
func fixture(t *testing.T, name string) *block.Memory {
	t.Helper()
	content := testhost.Unpack(t, "../lvm/testdata/"+name+"/disk0.gz")
	return block.MemoryFrom(content)
}

// openText opens an address on a disk.
func openText(t *testing.T, text string, disk block.Device) block.Device {
	t.Helper()
	a, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := Open(a, disk)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// TestSuite: what an address names is a device like any other; what can't be written refuses it. Bytes of other parts stay.
func TestSuite(t *testing.T) {
	disk := fixture(t, "gpt")
	before := disk.Bytes()
	for _, text := range []string{"d#vg0/root", "d#vg0/later", "d#vg0/before"} {
		t.Run(text, func(t *testing.T) {
			blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return openText(t, text, disk) })
		})
	}
	if !bytes.Equal(disk.Bytes(), before) {
		t.Error("the disk was changed")
	}
	other := readAll(t, openText(t, "d#vg0/before:cow", disk))
	for _, text := range []string{"d#vg0/root:real", "d#vg0/later:cow", "d#p1"} {
		t.Run(text, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device { return openText(t, text, disk) })
		})
		if !bytes.Equal(readAll(t, openText(t, "d#vg0/before:cow", disk)), other) {
			t.Errorf("%s: another volume was changed", text)
		}
	}
}

func readAll(t *testing.T, dev block.Device) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestOpenBeneath: a store over the part of the origin is what the snapshot shows.
func TestOpenBeneath(t *testing.T) {
	for name, texts := range map[string][]string{"gpt": {"d#vg0/later", "d#vg0/before"}, "merge-grown": {"d#vg/new", "d#vg/old"}, "single": {"d#vg/snap"}} {
		disk := fixture(t, name)
		for _, text := range texts {
			a, err := Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			b, err := OpenSnapshotParts(a, disk)
			if err != nil {
				t.Fatal(err)
			}
			st, err := store.OpenToRead(b.COW)
			if err != nil {
				t.Fatal(err)
			}
			view, err := store.NewView(b.Origin, st)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(readAll(t, view), readAll(t, openText(t, text, disk))) {
				t.Errorf("%s %s: other bytes than the volume's", name, text)
			}
			blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return b.Origin })
		}
	}
	disk := fixture(t, "gpt")
	for _, text := range []string{"d", "d#p1", "d#vg0/root", "d#vg0/later:cow"} {
		a, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenSnapshotParts(a, disk); !errors.Is(err, lvm.ErrNoSnapshot) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
