package server

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A socket that nobody listens on is replaced; one that somebody listens on, and anything else, is not.
func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "listens there already") {
		t.Errorf("a socket in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if killed
	l.Close()
	if l, err = ListenUnix(path); err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if err := os.WriteFile(path, []byte("letter"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "letter" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if _, err := ListenUnix("/tmp/" + strings.Repeat("x", 200)); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("a long path: %v", err)
	}
}

func TestListenTCPIsLoopbackUnlessAsked(t *testing.T) {
	for _, address := range []string{":0", "0", "localhost:0", "127.0.0.1:0"} {
		l, err := ListenTCP(address)
		if err != nil {
			t.Fatal(err)
		}
		if a := l.Addr().(*net.TCPAddr); !a.IP.IsLoopback() {
			t.Errorf("--listen %s listens on %s", address, a)
		}
		l.Close()
	}
}

func TestExportURI(t *testing.T) {
	unix := &net.UnixAddr{Net: "unix", Name: "/run/a b&c?d+e%.sock"}
	tcp := &net.TCPAddr{IP: net.IPv6loopback, Port: 10809}
	for _, c := range []struct {
		l    net.Addr
		name string
		want string
	}{
		{unix, "snap", "nbd+unix:///snap?socket=/run/a%20b%26c%3Fd%2Be%25.sock"},
		{tcp, "snap", "nbd://[::1]/snap"},
		{tcp, "a/b c?#ü%", "nbd://[::1]/a/b%20c%3F%23%C3%BC%25"},
		{tcp, "", "nbd://[::1]/"},
	} {
		if got := exportURI(c.l, c.name, false); got != c.want {
			t.Errorf("URI of %q: %s, want %s", c.name, got, c.want)
		}
	}
}
