package server

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
)

// umask guards the process's file mode mask.
var umask sync.Mutex

// ListenUnix listens on a unix socket that its owner alone may connect to (mode 0600). A socket that nobody listens
// on any more, left by a server that was killed, is replaced; anything else at the path is an error. The listener
// removes the socket when it is closed.
func ListenUnix(path string) (net.Listener, error) {
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The mode must be right from the first moment: a chmod afterwards would leave a gap.
	umask.Lock()
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	umask.Unlock()
	if errors.Is(err, syscall.EINVAL) && len(path) > 107 {
		return nil, fmt.Errorf("%s: the path of a socket can't be longer than 107 bytes", path)
	}
	return l, block.WithPath(path, err)
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
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

// ListenTCP listens on HOST:PORT; without a HOST on the loopback interface, since NBD has no authentication.
func ListenTCP(address string) (net.Listener, error) {
	if !strings.Contains(address, ":") {
		address = ":" + address
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if host == "" {
		host = "localhost"
	}
	return net.Listen("tcp", net.JoinHostPort(host, port))
}

// exportURI is the NBD URI of an export on a listener.
func exportURI(l net.Addr, name string, tls bool) string {
	u := nbd.URI{Network: l.Network(), Address: l.String(), Export: name, TLS: tls}
	if path, err := filepath.Abs(u.Address); err == nil && u.Network == "unix" {
		u.Address = path // the client may work in another folder
	}
	return u.String()
}
