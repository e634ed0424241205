package nbd_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testcerts"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Authorize decides what a client finds and changes, and PlainUnix exempts unix sockets from TLS and nothing else.
func TestAuthorize(t *testing.T) {
	_, server, client := certificates(t)
	o := nbd.Options{TLS: server, RequireTLS: true, PlainUnix: true, Authorize: func(c nbd.ClientInfo, export string) nbd.Access {
		if c.Addr.Network() == "unix" {
			return nbd.AccessWrite
		}
		if c.TLS == nil || c.TLS.PeerCertificates[0].Subject.CommonName != "client" {
			t.Errorf("asked about a client without its certificate: %+v", c)
		}
		switch export {
		case "written":
			return nbd.AccessWrite
		case "read":
			return nbd.AccessRead
		}
		return nbd.AccessNone
	}}
	exports := []nbd.Export{{Name: "written", Device: block.NewMemory(4096)}, {Name: "read", Device: block.NewMemory(4096)}, {Name: "other", Device: block.NewMemory(4096)}}
	s := start(t, o, "tcp", exports...)
	for name, want := range map[string]struct {
		dial, write string
	}{"written": {}, "read": {write: "read-only"}, "other": {dial: "no right"}, "missing": {dial: "no right"}} {
		c, err := nbd.DialTLS(t.Context(), secure(s.uri(name)), client)
		if want.dial != "" {
			if err == nil || !strings.Contains(err.Error(), want.dial) {
				t.Errorf("%s: %v, want an error with %q", name, err, want.dial)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		_, err = c.WriteAt(make([]byte, 512), 0)
		if (err != nil) != (want.write != "") || err != nil && !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: write: %v", name, err)
		}
		c.Close()
	}
	if _, err := nbd.Dial(t.Context(), s.uri("written")); err == nil {
		t.Error("TCP without TLS was accepted")
	}
	u := start(t, o, "unix", exports...)
	c, err := nbd.Dial(t.Context(), u.uri("other"))
	if err != nil {
		t.Fatalf("a unix socket without TLS: %v", err)
	}
	if _, err := c.WriteAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
	c.Close()
}

// A client that may only read is refused by the server, whatever it tries.
func TestAuthorizeRefusesWritesOfAnyClient(t *testing.T) {
	s := start(t, nbd.Options{Authorize: func(nbd.ClientInfo, string) nbd.Access { return nbd.AccessRead }}, "unix", nbd.Export{Name: "x", Device: block.NewMemory(4096)})
	p := begin(t, s.uri("x"), false)
	p.request(wire.CmdWrite, 0, 7, 0, 512)
	p.write(make([]byte, 512))
	p.simple(7, wire.EPERM)
	p.inSync()
}

// SetTLS is for handshakes from then on: clients of the old authority are refused.
func TestSetTLS(t *testing.T) {
	_, server, client := certificates(t)
	_, other, otherClient := certificatesOf(t, testcerts.RSA, time.Now().Add(time.Hour))
	s := start(t, nbd.Options{TLS: server, RequireTLS: true}, "tcp", nbd.Export{Name: "x", Device: block.NewMemory(4096)})
	c, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), client)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s.SetTLS(other)
	if d, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), otherClient); err != nil {
		t.Errorf("the new certificates: %v", err)
	} else {
		d.Close()
	}
	if _, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), client); err == nil {
		t.Error("the old certificates are accepted still")
	}
	if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
}
