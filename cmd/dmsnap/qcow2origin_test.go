package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// imageOf writes a qcow2 image of content.
func imageOf(t *testing.T, path string, content []byte) {
	t.Helper()
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow)
	writeFile(t, p.origin, content)
	mustRun(t, "export", p.origin, p.cow, path, "--format", "qcow2", "--compress")
}

// formatIn returns the format that a store records, and checks that the store is clean.
func formatIn(t *testing.T, path string) string {
	t.Helper()
	f, err := block.Open(path, block.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	format, err := store.OriginFormat(f)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := check.Run(t.Context(), f, check.Options{}); err != nil || r.Worst() == check.Error {
		t.Errorf("%s: %v, %v", path, r, err)
	}
	return format
}

// TestQcow2Origin: "serve IMAGE COW --create --socket S" is enough. The store records the format, every verb opens the origin by
// it, and nothing is written to the image.
func TestQcow2Origin(t *testing.T) {
	dir := testhost.ShortDir(t)
	origin, cow, socket := filepath.Join(dir, "debian.qcow2"), filepath.Join(dir, "vm1.cow"), filepath.Join(testhost.ShortDir(t), "s")
	content := bytes.Repeat([]byte("debian! "), 40<<10)
	imageOf(t, origin, content)
	before := digest(readFile(t, origin))

	s := launch(t, "serve", origin, cow, "--create", "--socket", socket, "--control", socket+".ctl", "--export-origin")
	if _, err := s.stdout.ReadString('\n'); err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	c, err := nbd.Dial(t.Context(), "nbd+unix:///vm1?socket="+socket)
	if err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, c); !bytes.Equal(got, content) {
		t.Error("the snapshot does not show the disk in the image")
	}
	change := bytes.Repeat([]byte("changed."), 1000)
	view := bytes.Clone(content)
	copy(view[100_000:], change)
	writeAt(t, c, change, 100_000)
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	o, err := nbd.Dial(t.Context(), "nbd+unix:///origin?socket="+socket)
	if err != nil {
		t.Fatal(err)
	}
	if !o.Info().ReadOnly {
		t.Error("the export of an image can be written to")
	}
	if st := mustJSON[api.Status](t, "status", "--control", socket+".ctl", "--json"); st.Origin.Format != "qcow2" {
		t.Errorf("%+v", st.Origin)
	}
	dmsnap("merge", "--control", socket+".ctl", "vm1").wantRefused(t, "can only be read")
	c.Close()
	o.Close()
	s.Process.Signal(syscall.SIGTERM)
	if status := s.end(t); status != exitDone || !strings.Contains(s.stderr.String(), "qcow2") {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
	if format := formatIn(t, cow); format != "qcow2" {
		t.Errorf("the store records %q", format)
	}

	out := filepath.Join(dir, "out")
	mustRun(t, "export", origin, cow, out)
	wantContent(t, out, view)
	mustRun(t, "export", origin, out, "--force")
	wantContent(t, out, content)
	mustRun(t, "rescue", origin, cow, out, "--force")
	wantContent(t, out, view)
	if o := dmsnap("diff", "--verify", origin, cow); o.status != exitNo {
		t.Errorf("%+v", o)
	}
	mustRun(t, "check", cow, "--origin", origin)
	mustRun(t, "map", cow, "--origin", origin)
	dense, sound := filepath.Join(dir, "dense.cow"), filepath.Join(dir, "sound.cow")
	mustRun(t, "compact", cow, dense, "--origin", origin, "--drop-unchanged")
	mustRun(t, "repair", cow, sound)
	for _, other := range []string{dense, sound} {
		if format := formatIn(t, other); format != "qcow2" {
			t.Errorf("%s records %q", other, format)
		}
		mustRun(t, "export", origin, other, out, "--force")
		wantContent(t, out, view)
	}
	dump, again := filepath.Join(dir, "dump"), filepath.Join(dir, "again.cow")
	mustRun(t, "dump", cow, "--data", "--output", dump)
	mustRun(t, "restore", dump, again)
	if format := formatIn(t, again); format != "qcow2" {
		t.Errorf("after dump and restore it records %q", format)
	}
	dmsnap("merge", origin, cow).wantRefused(t, origin, "can only be read", "dmsnap export")
	if got := digest(readFile(t, origin)); got != before {
		t.Error("the image was written to")
	}

	// The mark that says invalid keeps the label: rescue needs it.
	f := openFile(t, cow, false)
	st, err := store.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	st.Invalidate(os.ErrClosed)
	f.Close()
	mustRun(t, "rescue", origin, cow, out, "--force")
	if got := readFile(t, out); !bytes.Equal(got, view) {
		t.Error("rescue of the invalid snapshot shows another disk")
	}
}

// TestRawOriginStaysRaw: the bytes of a new store over a raw disk are the kernel's, and its origin is raw also when a guest has
// written the beginning of a qcow2 image to it since; a store with the label of an image opens nothing else.
func TestRawOriginStaysRaw(t *testing.T) {
	p := newPair(t)
	made := mustJSON[created](t, "create", p.origin, p.cow, "--json")
	if made.OriginFormat != ondisk.RawFormat {
		t.Errorf("%+v", made)
	}
	first := readFile(t, p.cow)[:8192]
	kernel := make([]byte, 8192)
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8}.Encode(kernel)
	if !bytes.Equal(first, kernel) {
		t.Error("the new store is not the kernel's")
	}
	image, labelled := filepath.Join(p.dir, "image.qcow2"), filepath.Join(p.dir, "labelled.cow")
	imageOf(t, image, bytes.Repeat([]byte("hidden"), 1<<16))
	mustRun(t, "create", image, labelled)
	raw := readFile(t, p.origin)
	copy(raw, readFile(t, image)[:112]) // a header of an image, by a guest
	writeFile(t, p.origin, raw)

	out := filepath.Join(p.dir, "out")
	mustRun(t, "export", p.origin, p.cow, out)
	wantContent(t, out, raw)
	mustRun(t, "diff", p.origin, p.cow)
	s := launch(t, "serve", p.origin, p.cow, "--socket", filepath.Join(p.dir, "s"), "--control", filepath.Join(p.dir, "c"))
	if _, err := s.stdout.ReadString('\n'); err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	if st := mustJSON[api.Status](t, "status", "--control", filepath.Join(p.dir, "c")); st.Origin.Format != "raw" || st.Origin.SizeBytes != int64(len(raw)) {
		t.Errorf("%+v", st.Origin)
	}
	// A store for an image does not fit a raw origin.
	dmsnap("snapshot", "--control", filepath.Join(p.dir, "c"), "other", labelled).wantRefused(t, labelled, "qcow2", "raw")
	s.Process.Signal(syscall.SIGTERM)
	s.end(t)
	mustRun(t, "merge", p.origin, p.cow)
	wantContent(t, p.origin, raw)
	dmsnap("serve", p.origin, p.cow, labelled, "--socket", filepath.Join(p.dir, "s")).wantRefused(t, labelled, "qcow2")
	dmsnap("export", p.origin, labelled, out, "--force").wantRefused(t, p.origin, "qcow2")
	// --raw overrides: the image's own bytes are the disk.
	mustRun(t, "create", image, filepath.Join(p.dir, "bytes.cow"), "--raw")
	mustRun(t, "export", image, filepath.Join(p.dir, "bytes.cow"), out, "--force")
	wantContent(t, out, readFile(t, image))
	// A damaged label is an error, not a raw origin.
	if err := patchFile(labelled, 465, 0xff); err != nil {
		t.Fatal(err)
	}
	dmsnap("export", image, labelled, out, "--force").wantRefused(t, labelled, "label")
	formatIn(t, p.cow)
}

// TestQcow2OpensNothingElse: what an image names is opened by a flag alone.
func TestQcow2OpensNothingElse(t *testing.T) {
	p := newPair(t)
	view := p.withStore(t)
	overlay, out := filepath.Join(p.dir, "o.qcow2"), filepath.Join(t.TempDir(), "out")
	mustRun(t, "export", p.origin, p.cow, overlay, "--format", "qcow2", "--backing", filepath.Base(p.origin))
	new := filepath.Join(p.dir, "new.cow")
	for _, args := range [][]string{
		{"export", overlay, out}, {"create", overlay, new}, {"serve", overlay, new, "--create", "--socket", filepath.Join(p.dir, "s")},
	} {
		dmsnap(args...).wantRefused(t, overlay, "--backing-file", "--follow-backing")
	}
	for _, flag := range []string{"--follow-backing", "--backing-file=" + p.origin} {
		mustRun(t, "export", overlay, out, "--force", flag)
		wantContent(t, out, view)
		mustRun(t, "create", overlay, new, "--force", flag)
		mustRun(t, "export", overlay, new, out, "--force", flag)
		wantContent(t, out, view)
		formatIn(t, new)
	}
	absolute := filepath.Join(p.dir, "a.qcow2")
	mustRun(t, "export", p.origin, p.cow, absolute, "--format", "qcow2", "--backing", p.origin)
	dmsnap("export", absolute, out, "--force", "--follow-backing").wantRefused(t, absolute, "absolute")
	// The backing file is the origin's disk, too: it is no COW device.
	dmsnap("create", overlay, p.origin, "--force", "--follow-backing").wantRefused(t, p.origin)
}

// TestQcow2ExportKilled: an export to an image that is killed at any point leaves no OUT, or a whole one.
func TestQcow2ExportKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dir := t.TempDir()
	origin, cow, out := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow"), filepath.Join(dir, "out.qcow2")
	content := bytes.Repeat(blocktest.Pattern(64<<10, 3), 128)
	writeFile(t, origin, content)
	mustRun(t, "create", origin, cow)
	cut, whole := 0, 0
	for i := range 12 {
		os.Remove(out)
		p := launch(t, "export", origin, cow, out, "--format", "qcow2", "--compress")
		time.Sleep(time.Duration(i*i) * 5 * time.Millisecond)
		p.Process.Kill()
		p.end(t)
		if _, err := os.Lstat(out); err != nil {
			cut++
			continue
		}
		whole++
		mustRun(t, "export", out, filepath.Join(dir, "raw"), "--force")
		wantContent(t, filepath.Join(dir, "raw"), content)
	}
	if cut == 0 {
		t.Error("none was cut short")
	}
	t.Logf("%d cut short, %d complete", cut, whole)
	formatIn(t, cow)
}

// TestInspectCheck: inspect --check answers by its exit status, and an image that is marked corrupt is read with a warning.
func TestInspectCheck(t *testing.T) {
	dir := t.TempDir()
	path, out := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "out")
	content := bytes.Repeat([]byte("checked "), 40<<10)
	imageOf(t, path, content)
	if text := mustRun(t, "inspect", "--check", path); !strings.Contains(text, "check     no problem\n") {
		t.Errorf("%s", text)
	}
	good := readFile(t, path)
	counts := binary.BigEndian.Uint64(good[48:])
	if err := patchFile(path, int64(counts)+1, 0xff); err != nil { // the counts are nowhere
		t.Fatal(err)
	}
	o := dmsnap("inspect", "--check", "--json", path)
	var i inspect.Single
	if err := json.Unmarshal([]byte(o.out), &i); err != nil || o.status != exitNo || i.QCOW2.Check.Errors == 0 || len(i.QCOW2.Check.Problems) == 0 {
		t.Errorf("%v, %+v", err, o)
	}
	if o := dmsnap("inspect", "--check", path); o.status != exitNo || !strings.Contains(o.out, "the reference count is 0, and there are 1 references") {
		t.Errorf("%+v", o)
	}
	mustRun(t, "inspect", path)
	if err := patchFile(path, 79, 2); err != nil {
		t.Fatal(err)
	}
	if text := mustRun(t, "inspect", path); !strings.Contains(text, "  corrupt   ") {
		t.Errorf("%s", text)
	}
	s := launch(t, "export", path, out)
	if status := s.end(t); status != exitDone || !strings.Contains(s.stderr.String(), "warning: "+path+": the image is marked corrupt") {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
	wantContent(t, out, content)
}
