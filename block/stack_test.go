package block

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testhost"
)

// fakeStack is a machine: sda (8:0, 1000 sectors) with partitions sda1 (8:1, sectors 100 to 400) and sda2 (8:2, 400 to 900), loop0
// and loop1 (7:0, 7:1) over the first and second half of one file, dm-0 and dm-1 (254:0, 254:1) on sda2.
func fakeStack(t *testing.T) (k stack, file string) {
	t.Helper()
	root := t.TempDir()
	put := func(path, text string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := func(path, to string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(root, to), path); err != nil {
			t.Fatal(err)
		}
	}
	device := func(dir, number string, sectors int) {
		put("sys/"+dir+"/dev", number)
		put("sys/"+dir+"/size", fmt.Sprint(sectors))
		link("sys/dev/block/"+number, "sys/"+dir)
	}
	device("devices/sda", "8:0", 1000)
	for i, p := range [][2]int{{100, 300}, {400, 500}} {
		dir := fmt.Sprintf("devices/sda/sda%d", i+1)
		device(dir, fmt.Sprintf("8:%d", i+1), p[1])
		put("sys/"+dir+"/partition", fmt.Sprint(i+1))
		put("sys/"+dir+"/start", fmt.Sprint(p[0]))
	}
	put("disk.img", strings.Repeat("x", 1<<20))
	file = filepath.Join(root, "disk.img")
	for i := range 2 {
		dir := fmt.Sprintf("devices/loop%d", i)
		device(dir, fmt.Sprintf("7:%d", i), 1024)
		put("sys/"+dir+"/loop/backing_file", file)
		put("sys/"+dir+"/loop/offset", fmt.Sprint(i*512<<10))
		link(fmt.Sprintf("sys/block/loop%d", i), "sys/"+dir)
		dm := fmt.Sprintf("devices/dm-%d", i)
		device(dm, fmt.Sprintf("254:%d", i), 100)
		link("sys/"+dm+"/slaves/sda2", "sys/devices/sda/sda2")
		link(fmt.Sprintf("sys/devices/sda/sda2/holders/dm-%d", i), "sys/"+dm)
	}
	put("mounts", "36 35 8:1 / /mnt/one rw,noatime shared:1 - ext4 /dev/nothing rw\n37 35 7:1 / /mnt/ro ro - squashfs /dev/nothing ro\n"+
		"38 35 0:5 / /proc rw - proc proc rw")
	put("swaps", "Filename Type Size Used Priority\n"+file+".swap file 1 0 -2")
	put("disk.img.swap", "swap")
	return stack{filepath.Join(root, "sys"), filepath.Join(root, "mounts"), filepath.Join(root, "swaps"), 16}, file
}

func TestOverlap(t *testing.T) {
	k, file := fakeStack(t)
	id := map[string]string{"file": identityOf(file), "other file": "file 1:1"}
	for name, number := range map[string]string{"sda": "8:0", "sda1": "8:1", "sda2": "8:2", "loop0": "7:0", "loop1": "7:1", "dm-0": "254:0", "dm-1": "254:1", "sdz": "8:99"} {
		id[name] = specialPrefix + number
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"sda", "sda", true}, {"sda", "sda1", true}, {"sda1", "sda2", false},
		{"file", "loop0", true}, {"file", "loop1", true}, {"loop0", "loop1", false}, {"loop0", "other file", false},
		{"dm-0", "sda2", true}, {"dm-0", "sda", true}, {"dm-0", "sda1", false}, {"dm-0", "dm-1", false},
		{"sdz", "sda", false}, {"sdz", "sdz", true}, {"sda", "file", false},
	} {
		if got := k.overlap(id[c.a], id[c.b]); got != c.want || k.overlap(id[c.b], id[c.a]) != got {
			t.Errorf("%s and %s: %v, want %v both ways", c.a, c.b, got, c.want)
		}
	}
}

func TestUsers(t *testing.T) {
	k, file := fakeStack(t)
	for disk, want := range map[string][2]string{ // to write, to read
		specialPrefix + "8:0":      {"sda1 is mounted on /mnt/one, sda2 is held by dm-0, sda2 is held by dm-1", "sda1 is mounted on /mnt/one, sda2 is held by dm-0, sda2 is held by dm-1"},
		specialPrefix + "8:1":      {"sda1 is mounted on /mnt/one", "sda1 is mounted on /mnt/one"},
		specialPrefix + "254:0":    {"", ""},
		specialPrefix + "7:0":      {"", ""},
		specialPrefix + "7:1":      {"loop1 is mounted on /mnt/ro", ""},
		identityOf(file):           {"loop1 is mounted on /mnt/ro", ""},
		identityOf(file + ".swap"): {file + ".swap is used as swap space", file + ".swap is used as swap space"},
		"file 1:1":                 {"", ""},
	} {
		for i, toRead := range []bool{false, true} {
			if got := strings.Join(k.users(disk, toRead), ", "); got != want[i] {
				t.Errorf("%s, to read %v: %q, want %q", disk, toRead, got, want[i])
			}
		}
	}
}

// A file and a loop device over it are one disk to every lock and check.
func TestLoopDeviceOverAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	device := testhost.Loop(t, path, 512)
	open := func(path string, readOnly bool) (*File, error) { return Open(path, Options{ReadOnly: readOnly}) }
	f, err := open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, readOnly := range []bool{false, true} {
		if l, err := open(device, readOnly); err == nil {
			l.Close()
			t.Errorf("the loop device, read-only %v, while its file is written", readOnly)
		}
	}
	f.Close()
	f, err = open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	l, err := open(device, true)
	if err != nil {
		t.Fatal(err)
	}
	if !Overlap(f, l) || !Overlap(l, f) {
		t.Error("a loop device and its file don't overlap")
	}
	if err := f.AllowWrites(); err == nil {
		t.Error("the file became writable while its loop device is read")
	}
	if err := l.AllowWrites(); err == nil {
		t.Error("the loop device became writable while its file is read")
	}
	f.Close()
	if err := l.AllowWrites(); err != nil {
		t.Error(err)
	}
	l.Close()
}
