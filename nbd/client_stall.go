package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// SetTimeout bounds how long the server may send nothing while requests are in flight, or accept nothing of a request: the
// connection ends then, and all requests fail. It is called before the first request. 0: no bound.
func (c *Client) SetTimeout(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stall = d
}

// newReader returns the reader of the server's replies on nc.
func (c *Client) newReader(nc net.Conn) *bufio.Reader { return newReader(stalling{nc, c}) }

// stalling is a connection whose reads fail when the server makes no progress with the calls.
type stalling struct {
	nc net.Conn
	c  *Client
}

func (s stalling) Read(p []byte) (int, error) {
	s.c.mu.Lock()
	s.c.await(s.nc)
	s.c.mu.Unlock()
	n, err := s.nc.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) && s.c.stall > 0 {
		err = fmt.Errorf("the server sent nothing for %v: %w", s.c.stall, err)
	}
	return n, err
}

// await sets how long a read of the next reply may take from now on. mu is held.
func (c *Client) await(nc net.Conn) {
	switch {
	case c.stall == 0:
	case len(c.calls) > 0:
		nc.SetReadDeadline(time.Now().Add(c.stall))
	default:
		nc.SetReadDeadline(time.Time{})
	}
}

// boundSend sets how long a request may take to be sent: the bound for each MiB.
func (c *Client) boundSend(r wire.Request, payload []byte) {
	if c.stall > 0 && r.Command != wire.CmdDisconnect { // Close has a bound of its own
		c.nc.SetWriteDeadline(time.Now().Add(c.stall * time.Duration(1+len(payload)>>20)))
	}
}
