package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A Transmission is a connection to an export on which the handshake is done and nothing was requested, for a client outside of
// this package, such as the kernel's: with simple replies, and in the clear. Its owner closes Conn.
type Transmission struct {
	Conn  net.Conn
	Info  Info
	Flags uint16 // transmission flags as the server sent them (wire.HasFlags, ...)
}

// DialTransmission connects to the export that an NBD URI names. ctx bounds connecting and the handshake. A URI that asks
// for TLS is refused with an error that wraps errors.ErrUnsupported: the connection's owner could not encrypt.
func DialTransmission(ctx context.Context, uri string) (*Transmission, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if u.TLS {
		return nil, fmt.Errorf("%s: a connection with TLS can't be handed over: %w", uri, errors.ErrUnsupported)
	}
	nc, err := new(net.Dialer).DialContext(ctx, u.Network, u.Address)
	if err != nil {
		return nil, err
	}
	t, err := NewTransmission(ctx, nc, u.Export)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", uri, err)
	}
	return t, nil
}

// NewTransmission does the handshake on nc, which it owns from then on when it returns an error too; see [DialTransmission].
func NewTransmission(ctx context.Context, nc net.Conn, export string) (*Transmission, error) {
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Now()) })
	c := &Client{nc: nc, ids: make(map[string]uint32)}
	h := &clientHandshake{c: c, r: newReader(nc), simple: true}
	err := h.run(export, nil)
	if err == nil && h.r.Buffered() > 0 {
		err = errors.New("the server sent data that was not requested")
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &Transmission{Conn: nc, Info: c.Info(), Flags: h.flags}, nil
}

// Disconnect ends an unused transmission in order, and closes it.
func (t *Transmission) Disconnect() error {
	t.Conn.SetWriteDeadline(time.Now().Add(time.Second))
	t.Conn.Write(wire.Request{Magic: wire.MagicRequest, Command: wire.CmdDisconnect}.Append(nil)) // an error does not matter
	return t.Conn.Close()
}
