package server

import (
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/server/api"
)

func TestAttachment(t *testing.T) {
	for arg, want := range map[string][2]string{
		"disk.cow":        {"disk", "disk.cow"},
		"/a/b/disk.1.cow": {"disk.1", "/a/b/disk.1.cow"},
		"plain":           {"plain", "plain"},
		".cow":            {".cow", ".cow"},
		"a=b.cow":         {"a", "b.cow"},
		"a=b=c":           {"a", "b=c"},
		"./a=b.cow":       {"a=b", "./a=b.cow"},
		"ü 1=x":           {"ü 1", "x"},
		"a\xff.cow":       {"a_", "a\xff.cow"},
	} {
		if a := Attachment(arg, api.AttachRequest{}); a.Name != want[0] || a.COW != want[1] {
			t.Errorf("%q: name %q, path %q, want %q", arg, a.Name, a.COW, want)
		}
	}
}

// Of the sockets of a disk all are made or none, and those that were passed take the place of those that are named.
func TestListeners(t *testing.T) {
	dir := testhost.ShortDir(t)
	socket, control := filepath.Join(dir, "nbd"), filepath.Join(dir, "control")
	clients, requests, err := Listeners{Socket: socket, Control: control}.Open()
	if err != nil {
		t.Fatal(err)
	}
	if clients.Addr().String() != socket || requests.Addr().String() != control {
		t.Errorf("it listens on %v and %v", clients.Addr(), requests.Addr())
	}
	clients.Close()

	if l, c, err := (Listeners{Socket: socket, Control: control}).Open(); err == nil || l != nil || c != nil {
		t.Fatalf("with a control socket in use: %v, %v, error %v", l, c, err)
	}
	if l, err := net.Dial("unix", socket); err == nil {
		l.Close()
		t.Error("the first socket is left")
	}

	passed := map[string]net.Listener{"control": requests}
	if clients, requests, err = (Listeners{Passed: passed, Listen: "127.0.0.1:0", Socket: "unused", Control: control}).Open(); err != nil {
		t.Fatal(err)
	}
	if clients.Addr().Network() != "tcp" || requests != passed["control"] {
		t.Errorf("it listens on %v and %v", clients.Addr(), requests.Addr())
	}
	CloseListeners(clients, nil, requests)
	if clients, requests, err = (Listeners{Without: true, Socket: "unused"}).Open(); err != nil || clients != nil || requests != nil {
		t.Errorf("nothing to listen on: %v, %v, error %v", clients, requests, err)
	}
}

// What can't be listened on is refused before anything is made.
func TestListenersCheck(t *testing.T) {
	long := "/" + strings.Repeat("x", maxSocketPath)
	for what, l := range map[string]Listeners{
		"a long path":            {Socket: long},
		"a long path of control": {Without: true, Control: long},
		"no port":                {Listen: "127.0.0.1"},
	} {
		if l.Check() == nil {
			t.Errorf("%s: no error", what)
		}
	}
	passed := map[string]net.Listener{"nbd": &net.UnixListener{}, "control": &net.UnixListener{}}
	for what, l := range map[string]Listeners{
		"not used":   {Without: true, Socket: long, Listen: "127.0.0.1"},
		"was passed": {Passed: passed, Socket: long, Control: long},
	} {
		if err := l.Check(); err != nil {
			t.Errorf("what is %s was refused: %v", what, err)
		}
	}
}
