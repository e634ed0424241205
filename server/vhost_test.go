package server

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/server/api"
)

// Exports have a vhost-user socket as long as they are served, and a refused attach leaves none.
func TestVhostSockets(t *testing.T) {
	p := newPair(t)
	dir := testhost.ShortDir(t)
	want := func(names ...string) {
		t.Helper()
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var has []string
		for _, e := range entries {
			has = append(has, e.Name())
		}
		if !slices.Equal(has, names) {
			t.Errorf("sockets %q, want %q", has, names)
		}
	}
	s := p.open(t, Options{VhostUser: dir})
	want("disk.sock")
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	want("disk.sock", "origin.sock")
	more := filepath.Join(p.dir, "more.cow")
	if _, err := s.Attach(api.AttachRequest{Name: "more", COW: more, Create: true}); err != nil {
		t.Fatal(err)
	}
	want("disk.sock", "more.sock", "origin.sock")
	if err := s.Drop(context.Background(), "more"); err != nil {
		t.Fatal(err)
	}
	want("disk.sock", "origin.sock")

	// Another server listens on the socket.
	l, err := net.Listen("unix", filepath.Join(dir, "taken.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(api.AttachRequest{Name: "taken", COW: more}); !errors.Is(err, block.ErrInUse) {
		t.Errorf("a socket that is taken: %v", err)
	}
	if _, err := s.Attach(api.AttachRequest{Name: "a/b", COW: more}); err == nil {
		t.Error("a name with a slash was taken")
	}
	if _, err := s.Device("taken"); err == nil {
		t.Error("a refused snapshot is served")
	}
	l.Close()
	want("disk.sock", "origin.sock")

	st := s.Status()
	if got := st.Snapshots[0].VhostUser + " " + st.Origin.VhostUser; got != filepath.Join(dir, "disk.sock")+" "+filepath.Join(dir, "origin.sock") {
		t.Errorf("status: %q", got)
	}
	nbdSocket, err := ListenUnix(filepath.Join(dir, "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	wait := s.Start(ctx, nbdSocket, nil)
	c, err := net.Dial("unix", filepath.Join(dir, "disk.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel()
	if err := wait(); err != nil {
		t.Error(err)
	}
	want()
	if _, err := c.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the front-end is still connected: %v", err)
	}
}

// A server that is closed before it started leaves no socket.
func TestVhostSocketsOfAServerThatNeverStarted(t *testing.T) {
	p := newPair(t)
	dir := testhost.ShortDir(t)
	s := p.open(t, Options{VhostUser: dir})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("%v are left, %v", entries, err)
	}
}
