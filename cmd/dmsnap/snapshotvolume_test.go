package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/rescue"
)

// sideBySide are the arguments of a snapshot volume as an origin and a COW volume.
type sideBySide struct{ snapshot, origin, cow string }

var laterOfGPT = sideBySide{"disk0.img#vg0/later", "disk0.img#vg0/root:real", "disk0.img#vg0/later:cow"}

// TestSnapshotVolumeDiff: an address stands for origin and COW volume; two are compared with each other.
func TestSnapshotVolumeDiff(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	inLVMCase(t, "gpt")
	s := laterOfGPT
	one, pair := dmsnap("diff", "--verify", s.snapshot), dmsnap("diff", "--verify", s.origin, s.cow)
	if one.status != exitNo || one.stderr != "" || one != pair {
		t.Errorf("%+v, by origin and COW volume %+v", one, pair)
	}
	// Two snapshots: the ranges are where their contents differ.
	before, later := exported(t, "disk0.img#vg0/before"), exported(t, s.snapshot)
	o := dmsnap("diff", "--verify", "--format", "ranges", "disk0.img#vg0/before", s.snapshot)
	if o.status != exitNo || o.stderr != "" {
		t.Fatalf("%+v", o)
	}
	differ := make([]bool, len(before)/512)
	for line := range strings.Lines(o.out) {
		var off, n int
		if _, err := fmt.Sscan(line, &off, &n); err != nil {
			t.Fatal(err)
		}
		for i := off / 512; i < (off+n)/512; i++ {
			differ[i] = true
		}
	}
	for i := range differ {
		if same := bytes.Equal(before[i*512:][:512], later[i*512:][:512]); same == differ[i] {
			t.Fatalf("sector %d: reported %v, same %v", i, differ[i], same)
		}
	}
	if o := dmsnap("diff", "--verify", s.snapshot, s.snapshot); o.status != exitDone {
		t.Errorf("a snapshot and itself: %+v", o)
	}
}

// TestSnapshotVolumeOfGrownOrigin: a snapshot is as long as its origin was when it was made.
func TestSnapshotVolumeOfGrownOrigin(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	inLVMCase(t, "two-pvs")
	const size = 3670016 // of the snapshot; the origin has 4456448 bytes
	pv := []string{"--pv", "disk1.img"}
	var ranges []struct{ Start, Length int64 }
	o := dmsnap(append([]string{"diff", "--json", "disk0.img#vg/snap"}, pv...)...)
	if err := json.Unmarshal([]byte(o.out), &ranges); err != nil {
		t.Fatalf("%v: %+v", err, o)
	}
	if last := ranges[len(ranges)-1]; last.Start+last.Length != size {
		t.Errorf("diff ends at byte %d, want %d", last.Start+last.Length, size)
	}
	mustRun(t, append([]string{"rescue", "disk0.img#vg/snap", "rescued"}, pv...)...)
	if got, want := readFile(t, "rescued"), exported(t, append([]string{"disk0.img#vg/snap"}, pv...)...); len(got) != size || !bytes.Equal(got, want) {
		t.Errorf("rescue: %d bytes, or other ones than those of the snapshot", len(got))
	}
}

// TestSnapshotVolumeStore: verbs that take a COW take the COW volume of a snapshot.
func TestSnapshotVolumeStore(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	inLVMCase(t, "gpt")
	s, want := laterOfGPT, exported(t, "disk0.img#vg0/later")
	exceptions := mustJSON[inspect.Map](t, "map", s.cow).Exceptions
	if exceptions == 0 {
		t.Fatal("no exceptions")
	}
	for _, verb := range [][]string{{"status"}, {"list"}, {"map"}, {"dump"}, {"check"}} {
		text := mustRun(t, append(verb, s.snapshot)...)
		if by := mustRun(t, append(verb, s.cow)...); strings.ReplaceAll(by, s.cow, s.snapshot) != text {
			t.Errorf("%v:\n%s\nof the COW volume\n%s", verb, text, by)
		}
	}
	if m := mustJSON[inspect.Map](t, "map", s.snapshot, "--origin", s.origin); m.Exceptions != exceptions || !m.DiskKnown || m.DiskBytes != 6<<20 {
		t.Errorf("map: %+v", m)
	}
	mustRun(t, "check", s.snapshot, "--origin", "disk0.img#vg0/root")
	// New stores of it, over the same origin, have its content.
	mustRun(t, "compact", s.snapshot, "dense.cow", "--drop-unchanged")
	mustRun(t, "compact", s.snapshot, "large.cow", "--chunk-size", "64KiB")
	mustRun(t, "compact", s.snapshot, "plain.cow", "--origin", s.origin)
	mustRun(t, "repair", s.snapshot, "sound.cow")
	mustRun(t, "dump", "--data", s.snapshot, "-o", "text")
	mustRun(t, "restore", "text", "restored.cow")
	for _, cow := range []string{"dense.cow", "large.cow", "plain.cow", "sound.cow", "restored.cow"} {
		mustRun(t, "check", "--level", "error", cow)
		if !bytes.Equal(exported(t, s.origin, cow), want) {
			t.Errorf("%s: other content than that of the snapshot", cow)
		}
	}
	mustRun(t, "rescue", s.snapshot, "rescued", "--map", "classes")
	if !bytes.Equal(readFile(t, "rescued"), want) {
		t.Error("rescue: other content than that of the snapshot")
	}
	mustRun(t, "export", s.snapshot, "later.qcow2", "--format", "qcow2")
	mustRun(t, "export", "disk0.img#p2", "p2.img")
	if got := exported(t, "p2.img#vg0/later"); !bytes.Equal(got, want) { // the partition alone is a physical volume
		t.Error("the volume in an exported partition has other content")
	}
	if o := dmsnap("export", s.snapshot, "-"); o.status != exitDone || o.out != string(want) {
		t.Errorf("export to standard output: status %d, %d bytes, %s", o.status, len(o.out), o.stderr)
	}
}

// TestSnapshotVolumeInvalid: what an invalid snapshot volume still has is certain as in a store beside a disk.
func TestSnapshotVolumeInvalid(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	inLVMCase(t, "overflow")
	result := mustJSON[rescue.Result](t, "rescue", "disk0.img#vg/own", "own.img")
	pair := mustJSON[rescue.Result](t, "rescue", "disk0.img#vg/base:real", "disk0.img#vg/own:cow", "pair.img")
	if result.Certain == 0 || result.Lost != 0 || fmt.Sprint(result) != fmt.Sprint(pair) || !bytes.Equal(readFile(t, "own.img"), readFile(t, "pair.img")) {
		t.Errorf("%+v, by origin and COW volume %+v", result, pair)
	}
	if dry := mustJSON[rescue.Result](t, "rescue", "--dry-run", "disk0.img#vg/own"); dry.Certain != result.Certain {
		t.Errorf("dry run: %+v", dry)
	}
	mustRun(t, "rescue", "--revalidate", "disk0.img#vg/own", "again.cow")
	if !bytes.Equal(exported(t, "disk0.img#vg/base", "again.cow"), readFile(t, "own.img")) {
		t.Error("the valid copy shows other content than what was rescued")
	}
	for _, args := range [][]string{{"export", "disk0.img#vg/own", "x"}, {"diff", "disk0.img#vg/own"}, {"compact", "disk0.img#vg/own", "x"}} {
		if o := dmsnap(args...); o.status != exitTrouble || !strings.Contains(o.stderr, "invalid") {
			t.Errorf("%v: %+v", args, o)
		}
	}
}

// TestFurtherPVs: a group on several disks is read with --pv, whichever disk the address names.
func TestFurtherPVs(t *testing.T) {
	disks := inLVMCase(t, "striped")
	var want []byte
	for i, first := range disks {
		var pvs []string
		for j, d := range disks {
			if i != j {
				pvs = append(pvs, "--pv", d)
			}
		}
		address := first + "#vg/snap"
		got := exported(t, append([]string{address}, pvs...)...)
		if i == 0 {
			want = got
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: other content than by %s", address, disks[0])
		}
		for _, verb := range []string{"status", "check", "list", "map", "dump"} {
			mustRun(t, append([]string{verb, address}, pvs...)...)
		}
		if o := dmsnap(append([]string{"diff", "--verify", address}, pvs...)...); o.status != exitNo || o.stderr != "" {
			t.Errorf("diff: %+v", o)
		}
		mustRun(t, append([]string{"rescue", "--force", address, "rescued"}, pvs...)...)
		if !bytes.Equal(readFile(t, "rescued"), want) {
			t.Errorf("%s: rescue has other content than export", address)
		}
		mustRun(t, append([]string{"compact", "--force", address, "dense.cow"}, pvs...)...)
		mustRun(t, append([]string{"repair", "--force", address, "sound.cow"}, pvs...)...)
		if o := dmsnap("export", "--force", address, "x", "--pv", disks[(i+1)%3]); o.status != exitTrouble || !strings.Contains(o.stderr, "is missing") {
			t.Errorf("without the third disk: %+v", o)
		}
	}
	// A physical volume in a partition of a further disk.
	inLVMCase(t, "gpt")
	writeFile(t, "empty.img", make([]byte, 1<<20))
	if !bytes.Equal(exported(t, "empty.img#vg0/later", "--pv", "disk0.img"), exported(t, "disk0.img#vg0/later")) {
		t.Error("other content through --pv")
	}
}

// TestAddressesRefused: each refusal says why, and changes nothing.
func TestAddressesRefused(t *testing.T) {
	for _, c := range []struct {
		name string // of the fixture
		args string // of dmsnap
		want string
	}{
		// Writing in place.
		{"gpt", "repair disk0.img#vg0/later --in-place --undo u", "can't be changed in place"},
		{"gpt", "repair disk0.img#vg0/later --undo-apply u", "can't be changed in place"},
		{"gpt", "rescue --revalidate disk0.img#vg0/later --in-place --undo u", "can't be changed in place"},
		{"gpt", "compact disk0.img#vg0/later --punch", "can't be changed in place"},
		{"gpt", "grow disk0.img#vg0/later 1GiB", "can't be changed in place"},
		{"gpt", "create disk0.img disk0.img#vg0/later --force", ""},
		{"gpt", "export --force disk0.img#vg0/later disk0.img", ""},
		{"gpt", "rescue --force disk0.img#vg0/later disk0.img", ""},
		{"gpt", "compact --force disk0.img#vg0/later disk0.img", ""},
		{"gpt", "repair --force disk0.img#vg0/later disk0.img", ""},
		{"gpt", "dump --force disk0.img#vg0/later -o disk0.img", ""},
		{"gpt", "map --force disk0.img#vg0/later --svg disk0.img", ""},
		{"two-pvs", "export --force disk0.img#vg/snap disk1.img --pv disk1.img", ""},
		// What is not there.
		{"gpt", "export disk0.img#vg0/nix x", `logical volume "nix" of volume group "vg0": not found`},
		{"gpt", "export disk0.img#vg/later x", `volume group "vg": not found: there are "vg0"`},
		{"gpt", "export disk0.img#p9 x", "no partition 9: the table has 1, 2"},
		{"gpt", "status disk0.img#vg0/root", "no COW volume"},
		{"gpt", "export disk0.img#vg0/later:real x", "no origin"},
		{"gpt", "diff disk0.img#vg0/root", "no snapshot volume"},
		{"gpt", "diff disk0.img#vg0/later disk0.img#vg0/root", "no snapshot volume"},
		{"gpt", "diff disk0.img#vg0/later disk0.img#vg0/before disk0.img#vg0/before", "only one other snapshot"},
		{"gpt", "rescue disk0.img#vg0/root x", "no snapshot volume"},
		{"names", "diff disk0.img#my-vg/big disk0.img#my-vg/4k", "no origin in common"},
		{"mbr-logical", "export disk0.img#p2 x", "extended"},
		{"gpt", "export disk0.img#vg0/later:raw x", `there is no layer "raw"`},
		{"gpt", "export disk0.img#nothing x", "pN or VG/LV must follow"},
		// What can't be read, each with its reason.
		{"thin-beside", "export disk0.img#vg/thin1 x", `segments of type "thin"`},
		{"thin-beside", "export disk0.img#vg/thickofthin x", `segments of type "thin"`},
		{"thin-beside", "rescue disk0.img#vg/thickofthin x", `segments of type "thin"`},
		{"missing-pv", "export disk0.img#vg/wide x --pv disk2.img", "FavG6v-PvoT-3TTs-ZmF3-AwD4-D79O-7IcgD3"},
		{"missing-pv", "diff disk0.img#vg/c2 --pv disk2.img", `origin "o2"`},
		{"two-pvs", "export disk0.img#vg/base x", "is missing"},
		{"duplicate", "export disk0.img#vg/base x --pv disk1.img", "there more than once: disk0.img, disk1.img"},
		{"split-brain", "export disk0.img#vg/a x --pv disk1.img", "sequence number 11 that differ"},
		{"overflow", "export disk0.img#vg/small x", "invalid"},
		{"returned-pv", "export disk0.img#vg/onb x --pv disk1.img --pv disk2.img", ""},
		{"unsupported", "export disk0.img#vg/main x --pv disk1.img --pv disk2.img --pv disk3.img --pv disk4.img", `"writecache"`},
		{"unsupported", "export disk0.img#vg/r5 x --pv disk1.img --pv disk2.img --pv disk3.img --pv disk4.img", `"raid5"`},
	} {
		t.Run(c.name+"/"+strings.ReplaceAll(c.args, "disk0.img#", ""), func(t *testing.T) {
			inLVMCase(t, c.name)
			o := dmsnap(strings.Fields(c.args)...)
			if o.status != exitTrouble || o.out != "" || !strings.Contains(o.stderr, c.want) || c.want != "" && !strings.Contains(o.stderr, "disk0.img") {
				t.Errorf("%+v, want %q", o, c.want)
			}
			for _, made := range []string{"x", "u"} {
				if _, err := os.Lstat(made); err == nil {
					t.Errorf("%s was made", made)
				}
			}
		})
	}
}

// TestReadThoughOfAnotherHost: exported and foreign groups, and what an outdated physical volume leaves, are read.
func TestReadThoughOfAnotherHost(t *testing.T) {
	for _, c := range []struct{ name, address, pv string }{
		{"exported", "disk0.img#vg/snap", ""}, {"foreign", "disk0.img#vg/snap", ""}, {"outdated-pv", "disk1.img#vg/gone", "disk0.img"},
		{"missing-pv", "disk2.img#vg/r", "disk0.img"},
	} {
		inLVMCase(t, c.name)
		args := []string{c.address}
		if c.pv != "" {
			args = append(args, "--pv", c.pv)
		}
		want := viewDigest(t, c.name, c.address[strings.LastIndexByte(c.address, '/')+1:])
		if got := fmt.Sprintf("%x", sha256.Sum256(exported(t, args...))); got != want {
			t.Errorf("%s %s: digest %.12s, want %.12s", c.name, c.address, got, want)
		}
	}
}

// viewDigest is the SHA-256 of what the kernel showed of a volume.
func viewDigest(t *testing.T, name, volume string) string {
	t.Helper()
	var cases []struct {
		Name   string
		Expect []struct {
			Views []struct{ LV, Layer, SHA256 string }
		}
	}
	if err := json.Unmarshal(readFile(t, filepath.Join(lvmFixtures, "cases.json")), &cases); err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		for _, e := range c.Expect {
			for _, v := range e.Views {
				if c.Name == name && v.LV == volume && v.Layer == "" {
					return v.SHA256
				}
			}
		}
	}
	t.Fatalf("case %s has no %s", name, volume)
	return ""
}

// TestAddressByName: a file that has the whole name is meant itself; the last # splits; two groups of one name need the UUID.
func TestAddressByName(t *testing.T) {
	inLVMCase(t, "gpt")
	want := exported(t, "disk0.img#vg0/later")
	if err := os.Link("disk0.img", "a#b"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(exported(t, "a#b#vg0/later"), want) {
		t.Error("a file with # in its name")
	}
	writeFile(t, "disk0.img#p2", make([]byte, 4096))
	if o := dmsnap("inspect", "disk0.img#p2"); !strings.Contains(o.out, "zeros") {
		t.Errorf("a file with the name of a partition: %+v", o)
	}

	// The group vg of another disk has the same name.
	disks := lvmCase(t, "single")
	other := lvmCase(t, "small-extents")
	t.Chdir(t.TempDir())
	writeFile(t, "one.img", disks["disk0.img"])
	writeFile(t, "two.img", other["disk0.img"])
	want = exported(t, "one.img#vg/snap")
	o := dmsnap("export", "one.img#vg/snap", "x", "--pv", "two.img")
	if o.status != exitTrouble || !strings.Contains(o.stderr, "choose one by its UUID") {
		t.Fatalf("%+v", o)
	}
	found := 0
	for _, id := range strings.Fields(strings.ReplaceAll(o.stderr, ",", " ")) {
		if len(id) != 38 || strings.Count(id, "-") != 6 {
			continue
		}
		found++
		if got := exported(t, "one.img#"+id+"/snap", "--pv", "two.img"); len(got) == len(want) && !bytes.Equal(got, want) {
			t.Errorf("%s: other content", id)
		}
	}
	if found != 2 {
		t.Errorf("%d UUIDs in %s", found, o.stderr)
	}
}
