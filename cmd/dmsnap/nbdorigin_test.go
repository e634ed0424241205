package main

import (
	"bytes"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/nbd"
)

// TestNBDOrigin: an export of a server is the origin of another one, and of the verbs that read.
func TestNBDOrigin(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	first, second := filepath.Join(p.dir, "1"), filepath.Join(p.dir, "2")
	base := launch(t, "serve", p.origin, "a="+p.cow, "--socket", first, "--export-origin")
	for range 2 {
		if _, err := base.stdout.ReadString('\n'); err != nil {
			t.Fatalf("%v: %s", err, &base.stderr)
		}
	}
	uri, cow, out := "nbd+unix:///origin?socket="+first, filepath.Join(p.dir, "over.cow"), filepath.Join(p.dir, "out")
	dmsnap("serve", uri).wantRefused(t, "--socket or --listen")
	dmsnap("serve", uri, "--socket", second).wantRefused(t, "COW is required")
	s := launch(t, "serve", uri, "b="+cow, "--create", "--socket", second, "--reconnect", "10s")
	if _, err := s.stdout.ReadString('\n'); err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	c, err := nbd.Dial(t.Context(), "nbd+unix:///b?socket="+second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	view := readAll(t, c)
	if !bytes.Equal(view, p.content) {
		t.Error("the snapshot over NBD does not show the origin")
	}
	change := bytes.Repeat([]byte("over"), 3000)
	writeAt(t, c, change, 70_000)
	copy(view[70_000:], change)
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	s.Process.Signal(syscall.SIGTERM)
	if status := s.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
	mustRun(t, "export", uri, cow, out)
	wantContent(t, out, view)
	mustRun(t, "export", uri, out, "--force")
	wantContent(t, out, p.content)
	if o := dmsnap("diff", uri, cow); o.status != exitNo {
		t.Errorf("%+v", o)
	}
	mustRun(t, "check", cow, "--origin", uri)
	mustRun(t, "rescue", uri, cow, out, "--force")
	wantContent(t, out, view)
	dmsnap("merge", uri, cow).wantRefused(t, uri, "can only be read")
	if format := formatIn(t, cow); format != "raw" {
		t.Errorf("the store records %q", format)
	}
	dmsnap("export", "nbd+unix:///absent?socket="+first, out, "--force").wantRefused(t, "absent")
	base.Process.Signal(syscall.SIGTERM)
	base.end(t)
	dmsnap("export", uri, cow, out, "--force").wantRefused(t, uri)
}
