package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/internal/testcerts"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
)

// certificates makes a folder of certificates, and what its client needs.
func certificates(t *testing.T) (dir string, client *tls.Config) {
	t.Helper()
	dir = testhost.ShortDir(t)
	a, err := testcerts.NewAuthority("for a test")
	if err == nil {
		err = a.Write(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(readFile(t, filepath.Join(dir, "ca-cert.pem")))
	return dir, &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool}
}

func TestServeTLS(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	p := newPair(t)
	shown := p.withStore(t)
	dir, client := certificates(t)
	for _, mode := range []string{"require", "allow"} {
		s := launch(t, "serve", p.origin, p.cow, "--listen", "127.0.0.1:0", "--tls-certificates", dir, "--tls", mode)
		line, err := s.stdout.ReadString('\n')
		if err != nil {
			t.Fatalf("%v: %s", err, &s.stderr)
		}
		uri := strings.TrimSpace(strings.TrimPrefix(line, "disk"))
		if secure := strings.HasPrefix(uri, "nbds://"); secure != (mode == "require") {
			t.Errorf("%s: %s", mode, uri)
		}
		uri = strings.TrimPrefix(strings.TrimPrefix(uri, "nbds"), "nbd")
		c, err := nbd.DialTLS(t.Context(), "nbds"+uri, client)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(readAll(t, c), shown) {
			t.Error("another content")
		}
		c.Close()
		if c, err := nbd.Dial(t.Context(), "nbd"+uri); (err == nil) != (mode == "allow") {
			t.Errorf("%s: in the clear: %v", mode, err)
		} else if err == nil {
			c.Close()
		}
		if c, err := nbd.DialTLS(t.Context(), "nbds"+uri, &tls.Config{RootCAs: client.RootCAs}); err == nil {
			t.Error("a client without a certificate was let in")
			c.Close()
		}
		s.Process.Signal(os.Interrupt)
		if status := s.end(t); status != exitDone {
			t.Errorf("it ended with %d: %s", status, &s.stderr)
		}
	}

	// Without an authority for clients anybody may connect.
	if err := os.Rename(filepath.Join(dir, "ca-cert.pem"), filepath.Join(dir, "elsewhere.pem")); err != nil {
		t.Fatal(err)
	}
	config, err := server.LoadTLS(dir)
	if err != nil || config.ClientAuth != tls.NoClientCert {
		t.Errorf("%v, %+v", err, config)
	}

	// Folders that are none, or hold something else, are refused before anything listens.
	writeFile(t, filepath.Join(dir, "ca-cert.pem"), []byte("nothing of the kind"))
	dmsnap("serve", p.origin, p.cow, "--tls-certificates", dir).wantRefused(t, "ca-cert.pem")
	dmsnap("serve", p.origin, p.cow, "--tls-certificates", p.dir).wantRefused(t, p.dir, "server-cert.pem")
	dmsnap("serve", p.origin, p.cow, "--tls-certificates", dir, "--tls", "perhaps").wantRefused(t, "require or allow")
}

func TestServeLimits(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	p := newPair(t)
	p.withStore(t)
	s := launch(t, "serve", p.origin, p.cow, "--socket", filepath.Join(p.dir, "s"), "--max-connections", "1", "--idle-timeout", "200ms")
	line, err := s.stdout.ReadString('\n')
	if err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	uri := strings.TrimSpace(strings.TrimPrefix(line, "disk"))
	first := dial(t, uri)
	if c, err := nbd.Dial(t.Context(), uri); err == nil {
		t.Error("a second client was let in")
		c.Close()
	}
	time.Sleep(time.Second)
	if _, err := first.BlockStatus("base:allocation", 0, 1); err == nil {
		t.Error("an idle client was not disconnected")
	}
	s.Process.Signal(os.Interrupt)
	if status := s.end(t); status != exitDone {
		t.Errorf("it ended with %d: %s", status, &s.stderr)
	}
}

// TestSocketActivation passes sockets as a service manager does.
func TestSocketActivation(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	pass := func(name string) *os.File {
		l, err := net.Listen("unix", filepath.Join(p.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	script := `LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=nbd:control exec "$0" "$@"`
	cmd := exec.Command("sh", "-c", script, program(t), "serve", p.origin, p.cow)
	cmd.ExtraFiles = []*os.File{pass("nbd"), pass("control")}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	// The sockets are there already: clients connect before the server is ready.
	c := dial(t, "nbd+unix:///disk?socket="+filepath.Join(p.dir, "nbd"))
	if !bytes.Equal(readAll(t, c), shown) {
		t.Error("another content")
	}
	if st := mustJSON[api.Status](t, "status", "--control", filepath.Join(p.dir, "control")); len(st.Snapshots) != 1 {
		t.Errorf("%+v", st)
	}
	c.Close()
	cmd.Process.Signal(os.Interrupt)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, &said)
	}
	for _, name := range []string{"nbd", "control"} {
		if _, err := os.Lstat(filepath.Join(p.dir, name)); err != nil {
			t.Errorf("the manager's socket is gone: %v", err)
		}
	}
	if _, err := os.Lstat(p.origin + ".sock"); err == nil {
		t.Error("it listened on a socket of its own")
	}
}
