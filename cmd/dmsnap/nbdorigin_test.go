package main

import (
	"bytes"
	"path/filepath"
	"strings"
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

// TestStoreOverTLS: a store, and an image that needs a backing file, behind a server that requires TLS: every verb that reads one
// takes the certificates, and is refused without them.
func TestStoreOverTLS(t *testing.T) {
	p := newPair(t)
	view := p.withStore(t)
	dir, _ := certificates(t)
	s := launch(t, "serve", p.cow, "--raw", "--read-only", "--listen", "127.0.0.1:0", "--tls-certificates", dir)
	line, err := s.stdout.ReadString('\n')
	if err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	uri := strings.Fields(line)[1]
	out := func(name string) string { return filepath.Join(p.dir, name) }
	for _, args := range [][]string{
		{"status", uri}, {"check", uri}, {"list", uri}, {"dump", uri}, {"map", uri}, {"check", uri, "--origin", p.origin},
		{"diff", p.origin, uri}, {"export", p.origin, uri, out("x")}, {"rescue", p.origin, uri, out("r")}, {"repair", uri, out("f.cow")},
		{"compact", uri, out("c.cow")}, {"send", p.origin, uri, "--output", out("s")}, {"inspect", uri},
	} {
		if o := dmsnap(args...); o.status != exitTrouble || !strings.Contains(o.stderr, uri) {
			t.Errorf("%v without certificates: %+v", args, o)
		}
		if o := dmsnap(append(args, "--nbd-certificates", dir, "--reconnect", "5s")...); o.status == exitTrouble || o.stderr != "" && args[0] != "send" {
			t.Errorf("%v: %+v", args, o)
		}
	}
	wantContent(t, out("x"), view)
	wantContent(t, out("r"), view)
	for _, cow := range []string{"f.cow", "c.cow"} {
		formatIn(t, out(cow))
		mustRun(t, "export", p.origin, out(cow), out("x"), "--force")
		wantContent(t, out("x"), view)
	}
	dmsnap("merge", p.origin, uri).wantRefused(t, uri)
	s.Process.Signal(syscall.SIGTERM)
	if status := s.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
}
