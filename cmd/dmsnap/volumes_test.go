package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/internal/testhost"
)

// lvmFixtures is where the disks of a real lvm2 are; tests change the working folder.
var lvmFixtures, _ = filepath.Abs("../../source/lvm/testdata")

// lvmCase returns the content of the disks of a case, by names like disk0.img.
func lvmCase(t testing.TB, name string) map[string][]byte {
	t.Helper()
	disks := map[string][]byte{}
	packed, err := filepath.Glob(filepath.Join(lvmFixtures, name, "disk*.gz"))
	if err != nil || len(packed) == 0 {
		t.Fatalf("case %s: %d disks (%v)", name, len(packed), err)
	}
	for _, path := range packed {
		disks[strings.TrimSuffix(filepath.Base(path), ".gz")+".img"] = testhost.Unpack(t, path)
	}
	return disks
}

// inLVMCase makes the disks of a case in a new working folder, and returns their names. The test fails when one of them was
// changed.
func inLVMCase(t *testing.T, name string) []string {
	t.Helper()
	disks := lvmCase(t, name)
	t.Chdir(t.TempDir())
	var names []string
	for disk, content := range disks {
		writeSparse(t, disk, content)
		names = append(names, disk)
		before, err := os.Stat(disk)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if after, err := os.Stat(disk); err != nil || after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
				t.Errorf("%s was changed (%v)", disk, err)
			}
		})
	}
	slices.Sort(names)
	return names
}

// writeSparse writes a file whose pieces of zeros are holes.
func writeSparse(t *testing.T, path string, content []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dev, err := newfile.Device(f, int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := block.WriteSparse(dev, content, 0, block.IntoZeros); err != nil {
		t.Fatal(err)
	}
}

// lvmCases are the names of all cases.
func lvmCases(t *testing.T) []string {
	t.Helper()
	var cases []struct{ Name string }
	if err := json.Unmarshal(readFile(t, filepath.Join(lvmFixtures, "cases.json")), &cases); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range cases {
		names = append(names, c.Name)
	}
	return names
}

var update = flag.Bool("update", false, "write the golden tables anew")

// TestInspectVolumes holds the table of each LVM fixture against testdata/inspect.
func TestInspectVolumes(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	golden, err := filepath.Abs("testdata/inspect")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range lvmCases(t) {
		t.Run(name, func(t *testing.T) {
			disks := inLVMCase(t, name)
			text := mustRun(t, append([]string{"inspect"}, disks...)...)
			path := filepath.Join(golden, name+".txt")
			if *update {
				writeFile(t, path, []byte(text))
			}
			if want := string(readFile(t, path)); text != want {
				t.Errorf("%s\nwant\n%s", text, want)
			}
		})
	}
}

// TestInspectVolumesJSON: one document for one disk, and one for several.
func TestInspectVolumesJSON(t *testing.T) {
	inLVMCase(t, "gpt")
	one := mustJSON[inspect.Single](t, "inspect", "disk0.img")
	if one.Kind != "gpt" || one.Scheme != "gpt" || len(one.Partitions) != 2 || len(one.VolumeGroups) != 1 {
		t.Fatalf("%+v", one)
	}
	if p := one.Partitions[1]; p.Address != "disk0.img#p2" || p.Number != 2 || p.Kind != "lvm2-pv" || p.Group != "vg0" || p.Size <= 0 {
		t.Errorf("partition %+v", p)
	}
	g := one.VolumeGroups[0]
	if g.Name != "vg0" || len(g.PVs) != 1 || g.PVs[0].Address != "disk0.img#p2" || len(g.Volumes) != 3 {
		t.Fatalf("%+v", g)
	}
	for i, want := range []string{"before", "later", "root"} {
		v := g.Volumes[i]
		if v.Name != want || v.Address != "disk0.img#vg0/"+want || v.Size != 6<<20 || !v.Readable || v.Reason != "" || (v.Status != nil) != (v.Type == "snapshot") {
			t.Errorf("%+v", v)
		}
		if v.Status == nil {
			continue
		}
		// The fields are those of status.
		if st := mustJSON[inspect.Status](t, "status", v.Address); st != *v.Status || v.Origin != "root" {
			t.Errorf("%+v, status says %+v", *v.Status, st)
		}
	}
	if o := dmsnap("inspect", "--json", "disk0.img#vg0/later"); !strings.Contains(o.out, `"bytes": 6291456`) { // its content is noise
		t.Errorf("the address of a volume: %+v", o)
	}

	disks := inLVMCase(t, "missing-pv")
	several := mustJSON[inspect.Report](t, append([]string{"inspect"}, disks...)...)
	if len(several.Images) != 2 || several.Images[1].Path != "disk2.img" || len(several.VolumeGroups) != 1 {
		t.Fatalf("%+v", several)
	}
	g = several.VolumeGroups[0]
	if len(g.Missing) != 1 || g.Missing[0].Device != "/dev/ubdc" || len(g.PVs) != 2 {
		t.Errorf("%+v", g)
	}
	for _, v := range g.Volumes {
		if unreadable := strings.Contains(" c1 c2 o2 r_rimage_0 r_rmeta_0 wide ", " "+v.Name+" "); v.Readable == unreadable || (v.Reason == "") == unreadable {
			t.Errorf("%+v", v)
		}
	}
}

// TestInspectDamagedStoreInVolume: a store that can't be loaded is named, the rest is listed.
func TestInspectDamagedStoreInVolume(t *testing.T) {
	disks := lvmCase(t, "single")
	t.Chdir(t.TempDir())
	content := disks["disk0.img"]
	at := bytes.Index(content, []byte("SnAp\x01\x00\x00\x00"))
	if at < 0 {
		t.Fatal("no store")
	}
	copy(content[at+4096:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x0f") // slot 0
	writeFile(t, "disk0.img", content)
	i := mustJSON[inspect.Single](t, "inspect", "disk0.img")
	for _, v := range i.VolumeGroups[0].Volumes {
		if damaged := v.Name == "snap"; v.Readable == damaged || (v.Status != nil) || (v.Reason == "") == damaged {
			t.Errorf("%+v", v)
		}
	}
	if text := mustRun(t, "inspect", "disk0.img"); !strings.Contains(text, "damaged") {
		t.Errorf("%s", text)
	}
}
