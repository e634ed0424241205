package nbd_test

import (
	"net"
	"testing"

	"github.com/dmsnap/dmsnap/nbd"
)

func TestURI(t *testing.T) {
	for _, c := range []struct {
		uri     string
		want    nbd.URI
		printed string // "" means as it was
	}{
		{"nbd://example.com/disk", nbd.URI{Network: "tcp", Address: "example.com:10809", Export: "disk"}, ""},
		{"nbd://example.com:1/", nbd.URI{Network: "tcp", Address: "example.com:1"}, ""},
		{"nbd://example.com", nbd.URI{Network: "tcp", Address: "example.com:10809"}, "nbd://example.com/"},
		{"nbd://example.com:10809/x", nbd.URI{Network: "tcp", Address: "example.com:10809", Export: "x"}, "nbd://example.com/x"},
		{"nbd://example.com//disk", nbd.URI{Network: "tcp", Address: "example.com:10809", Export: "/disk"}, ""},
		{"nbd://[::1]:10/a/b", nbd.URI{Network: "tcp", Address: "[::1]:10", Export: "a/b"}, ""},
		{"nbd://[::1]/a", nbd.URI{Network: "tcp", Address: "[::1]:10809", Export: "a"}, ""},
		{"nbd:///a", nbd.URI{Network: "tcp", Address: "localhost:10809", Export: "a"}, "nbd://localhost/a"},
		{"nbd://h/hello%20world%3F%25%23", nbd.URI{Network: "tcp", Address: "h:10809", Export: "hello world?%#"}, ""},
		{"nbd://h/a+b", nbd.URI{Network: "tcp", Address: "h:10809", Export: "a+b"}, "nbd://h/a%2Bb"},
		{"nbd://h/%C3%A4", nbd.URI{Network: "tcp", Address: "h:10809", Export: "ä"}, ""},
		{"nbd+unix:///?socket=nbd.sock", nbd.URI{Network: "unix", Address: "nbd.sock"}, ""},
		{"nbd+unix:///disk?socket=/run/a%26b%3Dc%20d.sock", nbd.URI{Network: "unix", Address: "/run/a&b=c d.sock", Export: "disk"}, ""},
		{"nbd+unix:////disk?socket=/s", nbd.URI{Network: "unix", Address: "/s", Export: "/disk"}, ""},
		{"nbd+unix:///d?socket=a+b", nbd.URI{Network: "unix", Address: "a+b", Export: "d"}, "nbd+unix:///d?socket=a%2Bb"},
		{"nbd+unix:///d?socket=%00abstract", nbd.URI{Network: "unix", Address: "\x00abstract", Export: "d"}, ""},
		{"nbd+unix:///%2Fd%2f?socket=s", nbd.URI{Network: "unix", Address: "s", Export: "/d/"}, "nbd+unix:////d/?socket=s"},
		{"nbds://h/x", nbd.URI{Network: "tcp", Address: "h:10809", Export: "x", TLS: true}, ""},
		{"nbds+unix:///x?socket=s", nbd.URI{Network: "unix", Address: "s", Export: "x", TLS: true}, ""},
	} {
		got, err := nbd.ParseURI(c.uri)
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.uri, got, err, c.want)
			continue
		}
		if c.printed == "" {
			c.printed = c.uri
		}
		if got.String() != c.printed {
			t.Errorf("%s: printed %s, want %s", c.uri, got, c.printed)
		}
	}
	for _, bad := range []string{
		"", "/dev/sda", "nbd", "nbd:unix:/x", "http://h/x", "nbdss://h/x", "nbds+tcp://h/x", "nbd://user@h/x",
		"nbd://h/x?socket=s", "nbd://h/x?y=z", "nbd://h/x#y", "nbd://h/%zz", "nbd://h/%00", "nbd://h/%ff", "nbd://h:port/x",
		"nbd+unix:///x", "nbd+unix:///x?socket=", "nbd+unix://h/x?socket=s", "nbd+unix:///x?socket=s&tls-type=x509",
		"nbd+unix:///x?socket=s&socket=t", "nbd+unix:///x?socket=%zz",
	} {
		if u, err := nbd.ParseURI(bad); err == nil {
			t.Errorf("%q was read as %+v", bad, u)
		}
	}
}

func FuzzURI(f *testing.F) {
	f.Add("nbd://[::1]:10/a%20b")
	f.Add("nbd+unix:////disk?socket=/run/a%26b")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := nbd.ParseURI(s)
		if err != nil {
			return
		}
		if again, err := nbd.ParseURI(u.String()); err != nil || again != u {
			t.Errorf("%q is %+v, printed %q, which is %+v, %v", s, u, u.String(), again, err)
		}
	})
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
		if got := nbd.ExportURI(c.l, c.name, false); got != c.want {
			t.Errorf("URI of %q: %s, want %s", c.name, got, c.want)
		}
	}
}
