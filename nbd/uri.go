package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// DefaultPort is the port of NBD over TCP.
const DefaultPort = "10809"

// A URI is the address of an export:
//
//	nbd://host:port/export
//	nbd+unix:///export?socket=path
//
// and nbds, nbds+unix with TLS. The first slash after the authority is not part of the export's name, later ones are. Names and paths
// are percent-encoded; a plus sign means itself.
type URI struct {
	Network string // "tcp" or "unix"
	Address string // host:port, or the socket's path; a path that begins with NUL is in the abstract namespace
	Export  string // "" is the server's default export
	TLS     bool
}

// ParseURI reads a URI. A part that it does not know is an error.
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("NBD URI %q: %w", s, err)
	}
	return u, nil
}

func parseURI(s string) (URI, error) {
	parsed, err := url.Parse(s)
	if err != nil {
		return URI{}, errors.Unwrap(err) // url.Parse wraps it with the URI
	}
	if parsed.Opaque != "" || parsed.Fragment != "" || parsed.User != nil {
		return URI{}, errors.New("want nbd://host:port/export or nbd+unix:///export?socket=path")
	}
	u := URI{Export: strings.TrimPrefix(parsed.Path, "/")}
	if !wire.ValidName(u.Export) {
		return URI{}, fmt.Errorf("the export's name is longer than %d bytes, or not UTF-8 without NUL", wire.MaxName)
	}
	socket, err := socketOf(parsed.RawQuery)
	if err != nil {
		return URI{}, err
	}
	scheme := parsed.Scheme
	if plain, ok := strings.CutPrefix(scheme, "nbds"); ok {
		u.TLS, scheme = true, "nbd"+plain
	}
	switch scheme {
	case "nbd":
		if socket != "" {
			return URI{}, errors.New("a socket goes with nbd+unix only")
		}
		host, port := parsed.Hostname(), parsed.Port()
		if host == "" {
			host = "localhost"
		}
		if port == "" {
			port = DefaultPort
		}
		if !validHost(host) {
			return URI{}, fmt.Errorf("host %q is neither a name nor an address", host)
		}
		u.Network, u.Address = "tcp", net.JoinHostPort(host, port)
	case "nbd+unix":
		if parsed.Host != "" {
			return URI{}, fmt.Errorf("host %q does not go with nbd+unix (three slashes?)", parsed.Host)
		}
		if socket == "" {
			return URI{}, errors.New("?socket=path is missing")
		}
		u.Network, u.Address = "unix", socket
	default:
		return URI{}, fmt.Errorf("scheme %q is neither nbd nor nbd+unix", parsed.Scheme)
	}
	return u, nil
}

// validHost reports whether host is an IP address without a zone, or may be a host's name.
func validHost(host string) bool {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Zone() == ""
	}
	return host == escape(host) && !strings.Contains(host, "/")
}

// socketOf finds the socket in a query. (url.ParseQuery takes a plus sign for a space, as only HTML forms
// do.)
func socketOf(query string) (socket string, err error) {
	for part := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(part, "=")
		switch {
		case part == "":
		case key != "socket" || socket != "":
			return "", fmt.Errorf("parameter %q is unknown or there twice", key)
		default:
			if socket, err = url.PathUnescape(value); err != nil {
				return "", err
			}
		}
	}
	return socket, nil
}

// String prints u so that ParseURI reads the same.
func (u URI) String() string {
	scheme := "nbd"
	if u.TLS {
		scheme = "nbds"
	}
	if u.Network == "unix" {
		return scheme + "+unix:///" + escape(u.Export) + "?socket=" + escape(u.Address)
	}
	return scheme + "://" + strings.TrimSuffix(u.Address, ":"+DefaultPort) + "/" + escape(u.Export)
}

// escape percent-encodes all but letters, digits and characters without a meaning in a path or a query.
func escape(s string) string {
	const hex = "0123456789ABCDEF"
	b := make([]byte, 0, len(s))
	for i := range len(s) {
		c := s[i]
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~/", c) >= 0 {
			b = append(b, c)
		} else {
			b = append(b, '%', hex[c>>4], hex[c&15])
		}
	}
	return string(b)
}

// URI is ExportURI for a listener of a server with these options: with TLS where clients there have to start it.
func (o *Options) URI(l net.Addr, name string) string {
	return ExportURI(l, name, o.TLS != nil && o.RequireTLS && !(o.PlainUnix && l.Network() == "unix"))
}

// ExportURI returns the URI of an export on a listener. The path of a unix socket is made absolute: the client may work in
// another directory.
func ExportURI(l net.Addr, name string, tls bool) string {
	u := URI{Network: l.Network(), Address: l.String(), Export: name, TLS: tls}
	if path, err := filepath.Abs(u.Address); err == nil && u.Network == "unix" {
		u.Address = path
	}
	return u.String()
}
