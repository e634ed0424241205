package server

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// firstPassed is the number of the first descriptor that a service manager passes on.
const firstPassed = 3

// PassedListeners returns the sockets that a service manager passed to this process, by name (FileDescriptorName= in a
// systemd socket unit): "nbd", and "control" for the control API; none when there are none. The environment variables that describe them are removed, so that no child process uses them.
func PassedListeners() (map[string]net.Listener, error) {
	defer os.Unsetenv("LISTEN_PID")
	defer os.Unsetenv("LISTEN_FDS")
	defer os.Unsetenv("LISTEN_FDNAMES")
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 1 || n > 2 {
		return nil, fmt.Errorf("LISTEN_FDS=%s: want one socket, or two with the control socket", os.Getenv("LISTEN_FDS"))
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	listeners := make(map[string]net.Listener)
	for i := range n {
		name := "nbd"
		if i < len(names) && names[i] == "control" {
			name = names[i]
		}
		if listeners[name] != nil {
			return nil, errors.New(`two sockets for the same use were passed; name the second "control"`)
		}
		syscall.CloseOnExec(firstPassed + i)
		f := os.NewFile(uintptr(firstPassed+i), "passed socket "+name)
		l, err := net.FileListener(f)
		f.Close() // the listener has its own
		if err != nil {
			return nil, fmt.Errorf("passed socket %d: %w", i, err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // it belongs to the service manager
		}
		listeners[name] = l
	}
	return listeners, nil
}
