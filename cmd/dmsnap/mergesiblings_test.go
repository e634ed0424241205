package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/source"
)

// exported is what an export of origin and COW device, or of an address, has.
func exported(t *testing.T, args ...string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	mustRun(t, append(append([]string{"export"}, args...), out)...)
	return readFile(t, out)
}

// TestMergeSiblings merges with another snapshot of the origin in the same folder, named as a sibling and not.
func TestMergeSiblings(t *testing.T) {
	for _, name := range []bool{true, false} {
		p := newPair(t)
		p.withStore(t)
		other := filepath.Join(p.dir, "other.cow")
		mustRun(t, "create", p.origin, other)
		shown, want := exported(t, p.origin, other), exported(t, p.origin, p.cow)
		args := []string{"merge", p.origin, p.cow}
		if name {
			args = append(args, "--sibling", other)
		}
		dry := dmsnap(append(args, "--dry-run")...)
		o := dmsnap(args...)
		if dry.status != exitDone || o.status != exitDone {
			t.Fatalf("%+v, %+v", dry, o)
		}
		if warned := strings.Contains(o.stderr, other+"; --sibling COW preserves one"); warned == name || dry.stderr != o.stderr {
			t.Errorf("sibling named %v: %q, dry run %q", name, o.stderr, dry.stderr)
		}
		if said := strings.Contains(o.out, other+": preserved 5 chunks") && strings.Contains(dry.out, other+": is to preserve 5 chunks"); said != name {
			t.Errorf("sibling named %v: %q, dry run %q", name, o.out, dry.out)
		}
		if kept := bytes.Equal(exported(t, p.origin, other), shown); kept != name {
			t.Errorf("sibling named %v, preserved %v", name, kept)
		}
		if !bytes.Equal(readFile(t, p.origin), want) {
			t.Error("the origin is not what the snapshot showed")
		}
		mustRun(t, "check", other)
	}
	p := newPair(t)
	p.withStore(t)
	small, before := filepath.Join(p.dir, "small.cow"), readFile(t, p.origin)
	mustRun(t, "create", p.origin, small, "--cow-size", "8K")
	for want, args := range map[string][]string{
		"no space":                 {p.origin, p.cow, "--sibling", small},
		"COW device is the origin": {p.origin, p.cow, "--sibling", p.cow},
		"the origin device":        {p.origin, p.cow, "--sibling", p.origin},
		"COW is required":          {p.origin},
		"for an offline merge":     {"--control", "x", "--sibling", small},
	} {
		o := dmsnap(append([]string{"merge"}, args...)...)
		if o.status != exitTrouble || !strings.Contains(o.stderr, want) && !strings.Contains(o.stderr, "origin device") {
			t.Errorf("%v: %d, %q, want %q", args, o.status, o.stderr, want)
		}
	}
	if !bytes.Equal(readFile(t, p.origin), before) {
		t.Error("a refused merge changed the origin")
	}
}

// digestOf is the beginning of the SHA-256 of what an address shows, as in the cases of package source/lvm.
func digestOf(t *testing.T, address string) string {
	t.Helper()
	return fmt.Sprintf("%x", sha256.Sum256(exported(t, address)))[:6]
}

// TestMergeVolume merges a snapshot volume inside an image that a real lvm2 made: the sibling stays, and so does the metadata.
func TestMergeVolume(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dir := testhost.ShortDir(t)
	disk, undo := filepath.Join(dir, "vm.img"), filepath.Join(dir, "undo.cow")
	writeLVMImage(t, disk)
	before := readFile(t, disk)
	if o := dmsnap("merge", disk+"#vg0/before", "--dry-run"); o.status != exitDone || !strings.Contains(o.out, "later: is to preserve") || o.stderr != "" {
		t.Errorf("dry run: %+v", o)
	}
	if !bytes.Equal(readFile(t, disk), before) {
		t.Error("a dry run changed the image")
	}
	res := mustJSON[offline.MergeResult](t, "merge", disk+"#vg0/before", "--undo", undo)
	if res.Chunks == 0 || len(res.Siblings) != 1 || res.Siblings[0].COW != "later" || res.Siblings[0].Chunks == 0 {
		t.Errorf("%+v", res)
	}
	for volume, want := range map[string]string{"root": "47626b", "before": "47626b", "later": "0fb3b0", "root:real": "47626b"} {
		if got := digestOf(t, disk+"#vg0/"+volume); got != want {
			t.Errorf("%s: %s", volume, got)
		}
	}
	for _, volume := range []string{"before", "later"} {
		mustRun(t, "check", disk+"#vg0/"+volume)
	}
	if _, err := os.Stat(disk + ".merging"); err == nil {
		t.Error("a side file is left")
	}
	// The undo store takes it back, and all snapshots are preserved again.
	mustRun(t, "merge", disk+"#vg0/root", undo)
	for volume, want := range map[string]string{"root": "2f1cda", "before": "47626b", "later": "0fb3b0"} {
		if got := digestOf(t, disk+"#vg0/"+volume); got != want {
			t.Errorf("taken back, %s: %s", volume, got)
		}
	}
	// Metadata is the same: the first MiB of the physical volume, and all that is before it.
	if !bytes.Equal(readFile(t, disk)[:2<<20], before[:2<<20]) {
		t.Error("the metadata was changed")
	}
}

// TestMergeVolumePending merges what LVM had been asked to merge, wholly or in part.
func TestMergeVolumePending(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for name, c := range map[string]struct{ snapshot, base, sibling, digest string }{
		"merge-pending": {"snap", "c569f6", "", ""},
		"merge-half":    {"snap", "e02b6e", "", ""},
		"merge-grown":   {"old", "945640", "new", "c84a90"},
	} {
		disk := inLVMCase(t, name)[0]
		copied := filepath.Join(t.TempDir(), "copy.img")
		writeFile(t, copied, readFile(t, disk))
		if c.sibling != "" {
			if o := dmsnap("merge", copied+"#vg/"+c.sibling); o.status != exitTrouble || !strings.Contains(o.stderr, "merge it first") {
				t.Errorf("%s: a merge of another snapshot: %+v", name, o)
			}
		}
		mustRun(t, "merge", copied+"#vg/"+c.snapshot)
		if got := digestOf(t, copied+"#vg/base:real"); got != c.base {
			t.Errorf("%s: %s", name, got)
		}
		if c.sibling != "" {
			if got := digestOf(t, copied+"#vg/"+c.sibling); got != c.digest {
				t.Errorf("%s: the sibling: %s", name, got)
			}
		}
	}
}

// TestMergeVolumeRefused: a refused merge leaves the image as it is.
func TestMergeVolumeRefused(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dir := testhost.ShortDir(t)
	disk := filepath.Join(dir, "vm.img")
	writeLVMImage(t, disk)
	before := readFile(t, disk)
	cow := filepath.Join(dir, "p.cow")
	writeFile(t, filepath.Join(dir, "p.img"), exported(t, disk+"#p1"))
	mustRun(t, "create", filepath.Join(dir, "p.img"), cow)
	held, err := block.Open(disk, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if o := dmsnap("merge", disk+"#vg0/before"); o.status != exitTrouble || !strings.Contains(o.stderr, "already in use") {
		t.Errorf("beside a writer: %+v", o)
	}
	held.Close()
	for want, args := range map[string][]string{
		"it is not a snapshot volume":   {disk + "#vg0/root"},
		"it is merged without COW":      {disk + "#vg0/before", cow},
		"a COW volume is no disk":       {disk + "#vg0/before:cow"},
		"not found":                     {disk + "#vg0/none"},
		"not a snapshot volume":         {disk + "#p1"},
		"the COW device is the origin":  {disk + "#p1", disk},
		"COW device is the origin devi": {disk + "#vg0/before", "--sibling", disk},
	} {
		if o := dmsnap(append([]string{"merge"}, args...)...); o.status != exitTrouble || !strings.Contains(o.stderr, want) {
			t.Errorf("%v: %d, %q, want %q", args, o.status, o.stderr, want)
		}
	}
	mustRun(t, "merge", disk+"#p1", cow) // an empty store
	if !bytes.Equal(readFile(t, disk), before) {
		t.Error("a refused merge changed the image")
	}
}

// beginMerge leaves a merge of a snapshot volume that is begun and not complete.
func beginMerge(t *testing.T, snapshot string, pvs ...string) {
	t.Helper()
	cow, err := source.OpenStore(snapshot, source.Options{PVs: pvs})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := merge.Begin(source.Path(snapshot), snapshot, cow, nil, nil, false); err != nil {
		t.Fatal(err)
	}
	if err := cow.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestMergeVolumeCut: while a merge inside an image is not complete, a side file beside the image says so, and the same merge
// continues.
func TestMergeVolumeCut(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dir := testhost.ShortDir(t)
	disk := filepath.Join(dir, "vm.img")
	writeLVMImage(t, disk)
	beginMerge(t, disk+"#vg0/before")
	for _, args := range [][]string{
		{"merge", disk + "#vg0/later"},
		{"serve", disk + "#vg0/root", "--socket", filepath.Join(dir, "s")},
		{"serve", disk, filepath.Join(dir, "new.cow"), "--create", "--socket", filepath.Join(dir, "s")},
	} {
		if o := dmsnap(args...); o.status != exitTrouble || !strings.Contains(o.stderr, "vm.img#vg0/before") {
			t.Errorf("%v: %+v", args, o)
		}
	}
	mustRun(t, "merge", disk+"#vg0/before")
	if _, err := os.Stat(disk + ".merging"); err == nil {
		t.Error("the side file is left")
	}
	if got := digestOf(t, disk+"#vg0/root"); got != "47626b" {
		t.Errorf("root: %s", got)
	}
}

// TestMergeVolumeCutOnSeveralDisks: a merge that is not complete is known by whichever disk of the group the address begins with.
func TestMergeVolumeCutOnSeveralDisks(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dir := t.TempDir()
	var disks []string
	for name, content := range lvmCase(t, "two-pvs") {
		writeFile(t, filepath.Join(dir, name), content)
		disks = append(disks, filepath.Join(dir, name))
	}
	beginMerge(t, disks[0]+"#vg/snap", disks[1:]...)
	for _, args := range [][]string{
		{"merge", disks[1] + "#vg/snap", "--pv", disks[0]},
		{"serve", disks[1] + "#vg/base", "--pv", disks[0], "--socket", filepath.Join(dir, "s")},
	} {
		if o := dmsnap(args...); o.status != exitTrouble || !strings.Contains(o.stderr, "not complete") {
			t.Errorf("%v: %+v", args, o)
		}
	}
	mustRun(t, "merge", disks[0]+"#vg/snap", "--pv", disks[1])
	mustRun(t, "merge", disks[1]+"#vg/snap", "--pv", disks[0])
}
