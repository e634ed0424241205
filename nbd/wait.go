package nbd

import (
	"crypto/tls"
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
)

// Requests wait here and not in a device, for two things: space in the device (block.RetryLater), and memory for a
// payload (budget). A request that waits when its connection ends is not executed any more: its client may have
// connected again and written the same place meanwhile, and the old write must not follow the new one.

// errAbandoned ends a request that waited while its client disconnected, or its export or the server was shut down.
var errAbandoned = errors.New(goingAway)

// wait waits until ch is closed, or for block.RetryInterval. It reports false when the request is not to be executed
// any more: the connection has ended or is to end, or its client has closed it. When no worker is left to read, that is
// known only from the state of the socket.
func (c *conn) wait(ch <-chan struct{}) bool {
	again := time.NewTimer(block.RetryInterval)
	defer again.Stop()
	select {
	case <-ch:
	case <-again.C:
	case <-c.stopped:
	case <-c.over:
	}
	select {
	case <-c.stopped:
		return false
	case <-c.over:
		return false
	default:
		return !c.isAbandoned()
	}
}

// isAbandoned reports whether the client has closed the connection, or its half of it. From then on nothing more is
// read from it.
func (c *conn) isAbandoned() bool {
	if !c.abandoned.Load() && closedByPeer(c.nc) {
		c.abandoned.Store(true)
	}
	return c.abandoned.Load()
}

// closedByPeer reports whether the peer has closed its sending side. It is false for a connection that is no socket.
func closedByPeer(nc net.Conn) bool {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	var events int16
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		for {
			_, err := unix.Poll(fds, 0)
			if err != unix.EINTR {
				break
			}
		}
		events = fds[0].Revents
	})
	return err != nil || events&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}
