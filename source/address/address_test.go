package address

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/lvm"
)

func TestParse(t *testing.T) {
	dir := t.TempDir()
	whole := filepath.Join(dir, "disk#p1")
	if err := os.WriteFile(whole, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]Address{
		"disk.img":             {Path: "disk.img"},
		whole:                  {Path: whole},
		whole + "#p2":          {Path: whole, Partition: 2},
		"disk.img#p10":         {Path: "disk.img", Partition: 10},
		"a#b.img#vg/root":      {Path: "a#b.img", Group: "vg", Volume: "root"},
		"d#vg/root:real":       {Path: "d", Group: "vg", Volume: "root", Layer: lvm.Real},
		"d#vg/s.1-2:cow":       {Path: "d", Group: "vg", Volume: "s.1-2", Layer: lvm.COW},
		"/dev/sda#Ab-c/9":      {Path: "/dev/sda", Group: "Ab-c", Volume: "9"},
		"/a/b#c/d.img#p1/root": {Path: "/a/b#c/d.img", Group: "p1", Volume: "root"},
	} {
		got, err := Parse(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"#p1", "d#", "d#p", "d#p0", "d#p01", "d#p99999", "d#p-1", "d#x", "d#vg/", "d#/lv", "d#vg/lv:", "d#vg/lv:x", "d#vg/a/b", "d#vg/:cow"} {
		if a, err := Parse(text); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %+v, %v", text, a, err)
		}
	}
}

func TestStore(t *testing.T) {
	for text, want := range map[string]string{"d": "d", "d#p1": "d#p1", "d#vg/s": "d#vg/s:cow", "d#vg/s:real": "d#vg/s:real"} {
		a, err := Parse(text)
		if err != nil || a.Store().String() != want {
			t.Errorf("%s: %s, %v", text, a.Store(), err)
		}
	}
}

func TestOpenRefused(t *testing.T) {
	disk := block.NewMemory(1 << 20)
	for _, text := range []string{"d#p1", "d#vg/lv"} {
		a, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if dev, err := Open(a, disk); err == nil || !strings.HasPrefix(err.Error(), text+": ") {
			t.Errorf("%s: %v, %v", text, dev, err)
		}
	}
}
