package source_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/lvm"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// TestActiveGroup: of a group that is active on this host nothing is read, unless whatever others do is accepted. Other parts of
// the disk are.
func TestActiveGroup(t *testing.T) {
	content := testhost.Unpack(t, "lvm/testdata/gpt/disk0.gz")
	disk := filepath.Join(t.TempDir(), "vm.img")
	if err := os.WriteFile(disk, content, 0o600); err != nil {
		t.Fatal(err)
	}
	set, err := lvm.Scan([]lvm.Disk{{Name: "disk", Dev: block.MemoryFrom(content)}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	active := t.TempDir()
	dm := filepath.Join(active, "block/dm-0/dm")
	if err := os.MkdirAll(dm, 0o755); err != nil {
		t.Fatal(err)
	}
	uuid := "LVM-" + strings.ReplaceAll(set.Groups[0].ID, "-", "") + strings.Repeat("x", 32)
	if err := os.WriteFile(filepath.Join(dm, "uuid"), []byte(uuid), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		part    string
		o       source.Options
		refused bool
	}{
		{"vg0/root", source.Options{SysFS: active}, true},
		{"vg0/later", source.Options{SysFS: active}, true},
		{"vg0/later:cow", source.Options{SysFS: active}, true},
		{"vg0/later:cow", source.Options{SysFS: active, Lock: block.LockShared}, false},
		{"vg0/root", source.Options{SysFS: active, Lock: block.LockShared}, false},
		{"vg0/root", source.Options{SysFS: t.TempDir()}, false},
		{"p1", source.Options{SysFS: active}, false},
	} {
		c.o.ReadOnly = true
		d, err := source.Open(disk+"#"+c.part, c.o)
		if refused := errors.Is(err, lvm.ErrActive) && errors.Is(err, block.ErrInUse); refused != c.refused || !refused && err != nil {
			t.Errorf("%s, %+v: %v", c.part, c.o, err)
		}
		if err == nil {
			d.Close()
		}
	}
	// Two snapshots, as for a comparison.
	sides, err := source.OpenSides([]string{disk + "#vg0/before", disk + "#vg0/later"}, source.Options{ReadOnly: true, SysFS: active})
	if !errors.Is(err, lvm.ErrActive) {
		t.Errorf("two snapshots of an active group: %v, %v", sides, err)
	}
}
