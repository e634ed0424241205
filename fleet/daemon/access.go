package daemon

import (
	"bufio"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source/address"
)

// Rights are what a client may do.
type Rights int

// The rights, each with those before it.
const (
	RightNone  Rights = iota
	RightRead         // read exports; requests that change nothing
	RightWrite        // write to exports; requests about nodes and checkpoints
	RightAdmin        // requests with paths, about disks and policies
)

var rightNames = [...]string{"none", "read", "write", "admin"}

func (r Rights) String() string { return rightNames[r] }

type rightsKey struct{}

// WithRights gives rights to the requests of a context.
func WithRights(ctx context.Context, r Rights) context.Context {
	return context.WithValue(ctx, rightsKey{}, r)
}

// RightsOf returns the rights that WithRights gave, or none.
func RightsOf(ctx context.Context) Rights {
	r, _ := ctx.Value(rightsKey{}).(Rights)
	return r
}

// connContext gives the requests of a connection the rights of its peer.
func connContext(ctx context.Context, nc net.Conn) context.Context {
	uid, err := peerUID(nc)
	if err != nil {
		return ctx
	}
	return WithRights(ctx, rightsOfUser(uid, uint32(os.Geteuid())))
}

// rightsOfUser are those of a user that may connect to a unix socket of own's: root and own may do everything, and others,
// whom the mode of the socket lets in, everything that names no path.
func rightsOfUser(uid, own uint32) Rights {
	if uid == 0 || uid == own {
		return RightAdmin
	}
	return RightWrite
}

// peerUID is the user of the peer when it connected.
func peerUID(nc net.Conn) (uid uint32, err error) {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T: not a unix socket", nc)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

// resolvePaths returns directories as absolute paths without symbolic links.
func resolvePaths(dirs []string) (list []string, err error) {
	for _, dir := range dirs {
		if dir, err = filepath.Abs(dir); err == nil {
			dir, err = filepath.EvalSymlinks(dir)
		}
		if err != nil {
			return nil, err
		}
		list = append(list, dir)
	}
	return list, nil
}

// allowFile returns the path of a file that a request names, without symbolic links, or an error unless it is absolute and
// below an allowed directory.
func (d *Daemon) allowFile(field, path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", refuse(api.CodeBadRequest, "%s: %q is not an absolute path", field, path)
	}
	refused := refuse(api.CodeForbidden, "%s: %s is not below a directory in which this daemon opens files", field, path)
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		// Whether a file exists elsewhere is not for clients to learn.
		if !d.below(filepath.Clean(path)) {
			return "", refused
		}
		return "", refuse(api.CodeFailed, "%s: %v", field, err)
	}
	if !d.below(resolved) {
		return "", refused
	}
	return resolved, nil
}

func (d *Daemon) below(path string) bool {
	return slices.ContainsFunc(d.allow, func(dir string) bool {
		rest, err := filepath.Rel(dir, path)
		return err == nil && rest != "." && filepath.IsLocal(rest)
	})
}

// allowSource is allowFile for the address of a disk: a path, a part of a disk on one, an NBD URI, of which the path of
// a unix socket is one, or an image in a registry by its digest. A tag may name another disk when the daemon starts again, under
// the forks that it has then.
func (d *Daemon) allowSource(source string) (string, error) {
	a, err := address.Parse(source)
	if err != nil {
		return "", refuse(api.CodeBadRequest, "source: %v", err)
	}
	if !strings.Contains(a.Path, "://") {
		if a.Path, err = d.allowFile("source", a.Path); err != nil {
			return "", err
		}
		return a.String(), nil
	}
	if strings.HasPrefix(a.Path, "oci://") {
		if !strings.Contains(a.Path, "@sha256:") {
			return "", refuse(api.CodeBadRequest, "source: %s: a digest is required, oci://HOST/REPOSITORY@sha256:…", a.Path)
		}
		return source, nil
	}
	u, err := nbd.ParseURI(a.Path)
	if err != nil {
		return "", refuse(api.CodeBadRequest, "source: %v", err)
	}
	if u.Network == "unix" {
		if _, err := d.allowFile("source", u.Address); err != nil {
			return "", err
		}
	}
	return source, nil
}

// A Rule gives the clients with a certificate rights to a disk and its nodes.
type Rule struct {
	Certificate string // a common name or DNS name of it; "*": any
	Disk        string // "*": any
	Rights      Rights
}

// ParseRules reads rules: a line each, of a certificate's name, a disk's, and read, write or admin. Empty lines and those
// that begin with # are skipped.
func ParseRules(r io.Reader) (rules []Rule, err error) {
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		f := strings.Fields(lines.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if len(f) != 3 {
			return nil, fmt.Errorf("line %d: want CERTIFICATE DISK RIGHTS", n)
		}
		right := Rights(slices.Index(rightNames[:], f[2]))
		if right <= RightNone {
			return nil, fmt.Errorf("line %d: %q is not read, write or admin", n, f[2])
		}
		rules = append(rules, Rule{strings.TrimPrefix(f[0], "CN="), f[1], right})
	}
	return rules, lines.Err()
}

// rightsOfCertificate are the most that the rules give to a certificate for a disk.
func rightsOfCertificate(rules []Rule, c *x509.Certificate, disk string) (most Rights) {
	names := append([]string{c.Subject.CommonName}, c.DNSNames...)
	for _, r := range rules {
		if (r.Disk == "*" || r.Disk == disk) && (r.Certificate == "*" || slices.Contains(names, r.Certificate)) {
			most = max(most, r.Rights)
		}
	}
	return most
}

// Access says what clients may do with exports, for nbd.Options.Authorize: those on unix sockets everything, since the mode
// of the socket let them in, others what the rules give to their certificates. Without SetRules, every client that TLS let in
// may do everything. The zero value is ready. Its methods may be called concurrently.
type Access struct {
	// DiskOf returns the disk of an export, "" without one. It is set before the first client connects.
	DiskOf func(export string) string

	rules atomic.Pointer[[]Rule]
}

// SetRules replaces the rules for handshakes from then on.
func (a *Access) SetRules(rules []Rule) { a.rules.Store(&rules) }

// Authorize is for nbd.Options.
func (a *Access) Authorize(c nbd.ClientInfo, export string) nbd.Access {
	rules := a.rules.Load()
	if rules == nil || c.Addr != nil && c.Addr.Network() == "unix" {
		return nbd.AccessWrite
	}
	if c.TLS == nil || len(c.TLS.PeerCertificates) == 0 {
		return nbd.AccessNone
	}
	switch rightsOfCertificate(*rules, c.TLS.PeerCertificates[0], a.DiskOf(export)) {
	case RightWrite, RightAdmin:
		return nbd.AccessWrite
	case RightRead:
		return nbd.AccessRead
	}
	return nbd.AccessNone
}
