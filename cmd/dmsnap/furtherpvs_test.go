package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/offline"
)

// twoPVs makes the disks of a group on two disks: an origin of 4456448 bytes, and a snapshot of its first 3670016 bytes.
func twoPVs(t *testing.T) (first, second string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range lvmCase(t, "two-pvs") {
		writeFile(t, filepath.Join(dir, name), content)
	}
	return filepath.Join(dir, "disk0.img"), filepath.Join(dir, "disk1.img")
}

// TestMergeFurtherPVs merges a snapshot volume of a group on two disks; the origin has grown since it was made.
func TestMergeFurtherPVs(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	first, second := twoPVs(t)
	snapshot, origin := first+"#vg/snap", first+"#vg/base"
	want := exported(t, snapshot, "--pv", second)
	want = append(want, exported(t, origin, "--pv", second)[len(want):]...)
	before := digests(t, filepath.Dir(first))
	if o := dmsnap("merge", snapshot); o.status != exitTrouble || !strings.Contains(o.stderr, "is missing") {
		t.Errorf("without the second disk: %+v", o)
	}
	if o := dmsnap("merge", snapshot, "--pv", second, "--dry-run"); o.status != exitDone {
		t.Errorf("dry run: %+v", o)
	}
	held := openFile(t, second, false) // as another program does
	if o := dmsnap("merge", snapshot, "--pv", second); o.status != exitTrouble || !strings.Contains(o.stderr, second) {
		t.Errorf("the second disk is in use: %+v", o)
	}
	held.Close()
	wantSame(t, filepath.Dir(first), before)
	if o := dmsnap("merge", snapshot, "--pv", second); o.status != exitDone {
		t.Fatalf("%+v", o)
	}
	if !bytes.Equal(exported(t, origin, "--pv", second), want) {
		t.Error("the origin does not have the content of the snapshot, followed by its own")
	}
	if st := mustJSON[offline.MergeResult](t, "merge", snapshot, "--pv", second, "--dry-run"); st.Chunks != 0 {
		t.Errorf("left to merge: %+v", st)
	}
	mustRun(t, "check", snapshot, "--pv", second)
}

// TestServeFurtherPVs serves an origin on two disks: what is written to it is preserved in its snapshot.
func TestServeFurtherPVs(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	first, second := twoPVs(t)
	snapshot, origin := first+"#vg/snap", first+"#vg/base"
	kept, want := exported(t, snapshot, "--pv", second), exported(t, origin, "--pv", second)
	r := start(t, pair{dir: filepath.Dir(first), origin: origin}, serveOptions{disk: diskFlags{pvs: []string{second}}})
	if o := dmsnap("export", snapshot, "x", "--pv", second); o.status != exitTrouble || !strings.Contains(o.stderr, "in use") {
		t.Errorf("while it is served: %+v", o)
	}
	wrote := bytes.Repeat([]byte("written by a client "), 20_000)
	c, err := nbd.Dial(t.Context(), r.uri("base"))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{512 << 10, int64(len(want) - len(wrote))} {
		writeAt(t, c, wrote, off)
		copy(want[off:], wrote)
	}
	if err := c.Flush(); err != nil {
		t.Error(err)
	}
	c.Close()
	r.stop()
	if !bytes.Equal(exported(t, origin, "--pv", second), want) {
		t.Error("the origin does not have what was written")
	}
	if !bytes.Equal(exported(t, snapshot, "--pv", second), kept) {
		t.Error("the snapshot was changed")
	}
	mustRun(t, "check", snapshot, "--pv", second)
}
