package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// maxSocketPath is how long the path of a unix socket may be, in bytes: sun_path has 108 with the zero at its end.
const maxSocketPath = 107

// CheckSocketPath refuses a path that is too long for clients, which are given the absolute one.
func CheckSocketPath(path string) error {
	full, err := filepath.Abs(path)
	if err == nil && len(full) > maxSocketPath {
		err = fmt.Errorf("%s: the absolute path of a socket can't be longer than %d bytes, and this one has %d", path, maxSocketPath, len(full))
	}
	return err
}

// ownerOnly sets the mode of a unix socket before it has a name: bind makes the file with the mode of the socket, less
// the umask. So the mode is right from the first moment. Setting the umask instead would change the mode of every file and
// directory that the process makes meanwhile.
func ownerOnly(_, _ string, c syscall.RawConn) error {
	var err error
	if failed := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }); failed != nil {
		return failed
	}
	return err
}

// ListenUnix listens on a unix socket that its owner alone may connect to (mode 0600). A stale socket, left by a server
// that was killed, is replaced; anything else at the path is an error. Of several servers that start at the same time
// one gets the socket. The listener removes the socket when it is closed, unless another one has taken its place.
func ListenUnix(path string) (net.Listener, error) {
	if err := CheckSocketPath(path); err != nil {
		return nil, err
	}
	unlock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return nil, block.WithPath(path, err)
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: ownerOnly}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, block.WithPath(path, err)
	}
	u := &ownSocket{UnixListener: l.(*net.UnixListener)}
	u.SetUnlinkOnClose(false)
	if u.info, err = os.Lstat(path); err == nil {
		u.path, err = filepath.Abs(path)
	}
	if err != nil {
		u.UnixListener.Close()
		return nil, err
	}
	return u, nil
}

// ownSocket is a listener that removes its socket when it is closed.
type ownSocket struct {
	*net.UnixListener
	path string // absolute
	info os.FileInfo
	once sync.Once
}

// Close removes the socket, if the path still leads to it, and stops listening.
func (u *ownSocket) Close() error {
	u.once.Do(func() {
		unlock, err := lockDirectory(filepath.Dir(u.path))
		if err != nil {
			return // a socket that is left can be replaced; one of another server can't be restored
		}
		defer unlock()
		if now, err := os.Lstat(u.path); err == nil && os.SameFile(now, u.info) {
			os.Remove(u.path)
		}
	})
	return u.UnixListener.Close()
}

// directoryLockTimeout is how long to wait for the lock of a directory.
const directoryLockTimeout = 5 * time.Second

// lockDirectory excludes other servers from changing sockets in a directory. Where the directory can't be read, or its
// file system has no locks, it has no effect.
func lockDirectory(path string) (unlock func(), err error) {
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return func() { d.Close() }, nil
		case err != syscall.EWOULDBLOCK && err != syscall.EINTR:
			d.Close()
			return func() {}, nil
		case time.Since(began) > directoryLockTimeout:
			d.Close()
			return nil, fmt.Errorf("%s: another program holds the folder's lock", path)
		}
	}
}

// removeStale removes a socket without a listener.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s: exists and is not a socket", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("%s: a server listens there already", path)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return os.Remove(path)
	}
	return block.WithPath(path, err)
}

// ListenTCP listens on HOST:PORT, [HOST]:PORT or PORT; without a HOST on the loopback interface, since NBD has no
// authentication. A HOST that is an IPv4 address means IPv4 only; [::] is every interface, IPv6 and IPv4. Port 0 is a
// free one.
func ListenTCP(address string) (net.Listener, error) {
	network, address, err := tcpAddress(address)
	if err != nil {
		return nil, err
	}
	return net.Listen(network, address)
}

// CheckTCPAddress returns the error of an address on which ListenTCP can't listen whatever the machine.
func CheckTCPAddress(address string) error {
	_, _, err := tcpAddress(address)
	return err
}

// tcpAddress returns what net.Listen takes for an address.
func tcpAddress(address string) (network, full string, err error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		if _, err := strconv.ParseUint(address, 10, 64); err != nil {
			bare := strings.Trim(address, "[]")
			return "", "", fmt.Errorf("%q has no port, as %q has", address, net.JoinHostPort(bare, "10809"))
		}
		host, port = "", address
	}
	if port == "" {
		return "", "", fmt.Errorf("%q has no port, as %q has", address, net.JoinHostPort(host, "10809"))
	}
	if n, err := strconv.ParseUint(port, 10, 64); err == nil && n > 65535 {
		return "", "", fmt.Errorf("%q: ports end at 65535", address)
	}
	network = "tcp"
	switch ip, err := netip.ParseAddr(host); {
	case host == "":
		host = "localhost"
	case err == nil && ip.Is4():
		network = "tcp4" // with "tcp", Go takes 0.0.0.0 for every address, IPv6 included
	}
	return network, net.JoinHostPort(host, port), nil
}
