package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testcerts"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// certificates makes a directory with an authority's certificates and returns configurations for both sides.
func certificates(t *testing.T) (dir string, server, client *tls.Config) {
	t.Helper()
	return certificatesOf(t, testcerts.ECDSA, time.Now().Add(time.Hour))
}

// certificatesOf is certificates with keys of a kind and an expiry.
func certificatesOf(t *testing.T, kind testcerts.KeyKind, expiry time.Time) (dir string, server, client *tls.Config) {
	t.Helper()
	dir = t.TempDir()
	a, err := testcerts.NewAuthority("for a test")
	if err == nil {
		err = a.WriteKind(dir, kind, expiry)
	}
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	pair := func(name string) []tls.Certificate {
		c, err := tls.LoadX509KeyPair(filepath.Join(dir, name+"-cert.pem"), filepath.Join(dir, name+"-key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{c}
	}
	return dir, &tls.Config{Certificates: pair("server"), ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert},
		&tls.Config{Certificates: pair("client"), RootCAs: pool}
}

// command runs a program and returns what it printed.
func command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}

func secure(uri string) string { return strings.Replace(uri, "nbd", "nbds", 1) }

func TestTLS(t *testing.T) {
	_, server, client := certificates(t)
	_, _, strangeClient := certificates(t)
	mem := striped()
	for _, network := range []string{"tcp", "unix"} {
		for _, require := range []bool{true, false} {
			s := start(t, nbd.Options{TLS: server, RequireTLS: require}, network, nbd.Export{Name: "x", Device: mem})
			c, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), client, "base:allocation")
			if err != nil {
				t.Fatal(err)
			}
			got, want := make([]byte, 8<<20), make([]byte, 8<<20)
			mem.ReadAt(want, 0)
			if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read: %v", err)
			}
			p := blocktest.Pattern(5<<20, 9)
			if _, err := c.WriteAt(p, 1<<20); err != nil {
				t.Error(err)
			}
			if _, err := c.ReadAt(got[:5<<20], 1<<20); err != nil || !bytes.Equal(got[:5<<20], p) {
				t.Errorf("read back: %v", err)
			}
			if !c.Info().MultiConn && len(c.Info().Contexts) != 1 {
				t.Errorf("%+v", c.Info())
			}
			c.Close()

			// In the clear: as the server says.
			if c, err := nbd.Dial(t.Context(), s.uri("x")); (err == nil) == require {
				t.Errorf("%s: TLS required %v, in the clear: %v", network, require, err)
			} else if err == nil {
				c.Close()
			}
			// A client with a certificate of an unknown issuer, one without a certificate, and one that trusts another server.
			for name, wrong := range map[string]*tls.Config{
				"another authority's": {Certificates: strangeClient.Certificates, RootCAs: client.RootCAs},
				"none":                {RootCAs: client.RootCAs},
				"distrust":            {Certificates: client.Certificates, RootCAs: strangeClient.RootCAs},
			} {
				if c, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), wrong); err == nil {
					t.Errorf("%s: connected with a wrong certificate: %s", network, name)
					c.Close()
				}
			}
		}
	}
	// TLS of a server that has none: the client doesn't go on in the clear.
	s := start(t, nbd.Options{}, "tcp", nbd.Export{Name: "x", Device: mem})
	if _, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), client); err == nil {
		t.Error("went on in the clear")
	}
}

func TestTLSConformance(t *testing.T) {
	_, server, client := certificates(t)
	blocktest.Run(t, func(t *testing.T) block.Device {
		s := start(t, nbd.Options{TLS: server, RequireTLS: true}, "tcp",
			nbd.Export{Name: "x", Device: block.NewMemory(300 << 10), CanTrim: true, MultiConn: true})
		c, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), client)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	})
}

// Nothing but STARTTLS and ABORT is answered before TLS when that is required.
func TestTLSComesFirst(t *testing.T) {
	_, server, client := certificates(t)
	s := start(t, nbd.Options{TLS: server, RequireTLS: true}, "tcp", nbd.Export{Name: "x", Device: striped()})
	for o := wire.Option(2); o < 14; o++ {
		p := connect(t, s.uri("x"))
		p.send("00000003")
		if o == wire.OptAbort || o == wire.OptStartTLS {
			continue
		}
		p.option(o, nil)
		p.skipAnswer(wire.RepErrTLSRequired)
	}
	p := connect(t, s.uri("x"))
	p.send("00000003 IHAVEOPT 00000001 00000001 'x")
	p.disconnected()

	// What is sent in the clear behind STARTTLS is not taken for the first words of the encrypted stream.
	p = connect(t, s.uri("x"))
	p.send("00000003 IHAVEOPT 00000005 00000000 IHAVEOPT 00000003 00000000")
	p.disconnected()

	// What was settled in the clear counts no more, and TLS is started once.
	s = start(t, nbd.Options{TLS: server}, "tcp", nbd.Export{Name: "x", Device: striped()})
	u, err := nbd.ParseURI(s.uri("x"))
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial(u.Network, u.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(10 * time.Second))
	option := func(w io.ReadWriter, o wire.Option, data []byte) wire.OptionReplyType {
		t.Helper()
		b := wire.OptionHeader{Magic: wire.MagicOption, Option: o, Length: uint32(len(data))}.Append(nil)
		if _, err := w.Write(append(b, data...)); err != nil {
			t.Fatal(err)
		}
		head := make([]byte, wire.OptionReplySize)
		if _, err := io.ReadFull(w, head); err != nil {
			t.Fatal(err)
		}
		r := wire.DecodeOptionReply(head)
		if _, err := io.CopyN(io.Discard, w, int64(r.Length)); err != nil {
			t.Fatal(err)
		}
		return r.Type
	}
	io.CopyN(io.Discard, nc, 18)
	nc.Write([]byte{0, 0, 0, 3})
	if got := option(nc, wire.OptStructuredReply, nil); got != wire.RepAck {
		t.Fatalf("structured replies: %v", got)
	}
	if got := option(nc, wire.OptStartTLS, []byte{1}); got != wire.RepErrInvalid {
		t.Errorf("STARTTLS with data: %v", got)
	}
	if got := option(nc, wire.OptStartTLS, nil); got != wire.RepAck {
		t.Fatalf("STARTTLS: %v", got)
	}
	config := client.Clone()
	config.ServerName = "localhost"
	tc := tls.Client(nc, config)
	if got := option(tc, wire.OptSetMetaContext, wire.MetaQuery{Export: "x", Queries: []string{"base:allocation"}}.Append(nil)); got != wire.RepErrInvalid {
		t.Errorf("structured replies are settled still: %v", got)
	}
	if got := option(tc, wire.OptStartTLS, nil); got != wire.RepErrInvalid {
		t.Errorf("second STARTTLS: %v", got)
	}
}

// A peer that begins TLS and stops is given up like one that stops in any handshake.
func TestTLSPeerThatStops(t *testing.T) {
	_, server, _ := certificates(t)
	s := start(t, nbd.Options{TLS: server, HandshakeTimeout: 500 * time.Millisecond}, "tcp", nbd.Export{Name: "x", Device: striped()})
	p := connect(t, s.uri("x"))
	p.send("00000003 IHAVEOPT 00000005 00000000")
	p.answer(wire.OptStartTLS, wire.RepAck, "")
	p.disconnected()
}

func TestInteropTLS(t *testing.T) {
	nbdinfo, nbdcopy := tool(t, "nbdinfo", "libnbd-bin"), tool(t, "nbdcopy", "libnbd-bin")
	dir, server, _ := certificates(t)
	strange, _, _ := certificates(t)
	mem := striped()
	s := start(t, nbd.Options{TLS: server, RequireTLS: true}, "tcp", nbd.Export{Name: "x", Device: mem, MultiConn: true})
	uri := secure(s.uri("x")) + "?tls-certificates="
	if out := nbdinfo("--json", uri+dir); !strings.Contains(out, `"TLS": true`) {
		t.Errorf("nbdinfo says %s", out)
	}
	out := filepath.Join(t.TempDir(), "copy")
	nbdcopy(uri+dir, out)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, mem.Bytes()) {
		t.Error("nbdcopy made another copy")
	}
	fails := func(name string, args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if out, err := command(ctx, name, args...); err == nil {
			t.Errorf("%s %v connected: %s", name, args, out)
		}
	}
	fails("nbdinfo", uri+strange)
	fails("nbdinfo", s.uri("x"))

	tool(t, "qemu-img", "qemu-utils")
	u, _ := nbd.ParseURI(s.uri("x"))
	host, port, _ := net.SplitHostPort(u.Address)
	args := func(dir string) []string {
		return []string{"convert", "--object", "tls-creds-x509,id=t,endpoint=client,dir=" + dir, "--image-opts",
			"driver=nbd,host=" + host + ",port=" + port + ",export=x,tls-creds=t", "-O", "raw", out}
	}
	if text, err := command(t.Context(), "qemu-img", args(dir)...); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, text)
	}
	if got, _ = os.ReadFile(out); !bytes.Equal(got, mem.Bytes()) {
		t.Error("qemu-img made another copy")
	}
	fails("qemu-img", args(strange)...)
}

// TestInteropTLSMatrix: clients with keys of each kind, in each version of TLS, from each program that has a client
// certificate, are let in; and none with a certificate of another authority, or without one.
func TestInteropTLSMatrix(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, name := range []string{"nbdinfo", "nbdcopy"} {
		tool(t, name, "libnbd-bin")
	}
	tool(t, "qemu-img", "qemu-utils")
	mem := striped()
	for _, kind := range []testcerts.KeyKind{testcerts.ECDSA, testcerts.RSA, testcerts.Ed25519} {
		dir, server, client := certificatesOf(t, kind, time.Now().Add(time.Hour))
		strange, _, strangeClient := certificatesOf(t, kind, time.Now().Add(time.Hour))
		ca, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
		if err == nil {
			err = os.WriteFile(filepath.Join(strange, "ca-cert.pem"), ca, 0o600) // it trusts the server all the same
		}
		none := t.TempDir()
		if err == nil {
			err = os.WriteFile(filepath.Join(none, "ca-cert.pem"), ca, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			config := server.Clone()
			config.MinVersion, config.MaxVersion = version, version
			s := start(t, nbd.Options{TLS: config, RequireTLS: true}, "tcp", nbd.Export{Name: "x", Device: mem, MultiConn: true})
			out := filepath.Join(t.TempDir(), "copy")
			u, err := nbd.ParseURI(s.uri("x"))
			if err != nil {
				t.Fatal(err)
			}
			host, port, _ := net.SplitHostPort(u.Address)
			uri := secure(s.uri("x")) + "?tls-certificates="
			for _, try := range []struct {
				dir  string
				good bool
			}{{dir, true}, {strange, false}, {none, false}} {
				for _, args := range [][]string{
					{"nbdinfo", "--size", uri + try.dir},
					{"nbdcopy", uri + try.dir, out},
					{"qemu-img", "convert", "--object", "tls-creds-x509,id=t,endpoint=client,dir=" + try.dir, "--image-opts",
						"driver=nbd,host=" + host + ",port=" + port + ",export=x,tls-creds=t", "-O", "raw", out},
				} {
					os.Remove(out)
					ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
					text, err := command(ctx, args[0], args[1:]...)
					cancel()
					if (err == nil) != try.good {
						t.Errorf("%s, %s, %v: let in %v, want %v: %s", kind, tls.VersionName(version), args[:2], err == nil, try.good, text)
					}
					if err == nil && args[0] != "nbdinfo" {
						if got, _ := os.ReadFile(out); !bytes.Equal(got, mem.Bytes()) {
							t.Errorf("%s, %s: %s made another copy", kind, tls.VersionName(version), args[0])
						}
					}
				}
			}
			// A session that was verified once is verified again when it is resumed.
			cached := client.Clone()
			cached.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			for range 2 {
				c, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), cached)
				if err != nil {
					t.Fatalf("%s, %s: own client: %v", kind, tls.VersionName(version), err)
				}
				c.Close()
			}
			if c, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), &tls.Config{Certificates: strangeClient.Certificates, RootCAs: client.RootCAs}); err == nil {
				c.Close()
				t.Errorf("%s, %s: another authority's client was let in", kind, tls.VersionName(version))
			}
		}
	}
}

// TestExpiredCertificateIsLogged: it is logged at the start, not when the first client connects.
func TestExpiredCertificateIsLogged(t *testing.T) {
	for expiry, want := range map[time.Duration]int{-time.Minute: 1, time.Hour: 0} {
		_, server, client := certificatesOf(t, testcerts.ECDSA, time.Now().Add(expiry))
		var log []string
		nbd.NewServer(nbd.Options{TLS: server, Log: func(line string) { log = append(log, line) }})
		if len(log) != want || want == 1 && !strings.Contains(log[0], "expired") {
			t.Errorf("expiry in %v: log %q", expiry, log)
		}
		// A client's certificate that expired is refused.
		s := start(t, nbd.Options{TLS: server, RequireTLS: true}, "tcp", nbd.Export{Name: "x", Device: striped()})
		unverified := &tls.Config{Certificates: client.Certificates, InsecureSkipVerify: true}
		if c, err := nbd.DialTLS(t.Context(), secure(s.uri("x")), unverified); (err == nil) != (expiry > 0) {
			t.Errorf("expiry in %v: client %v", expiry, err)
		} else if err == nil {
			c.Close()
		}
	}
}
