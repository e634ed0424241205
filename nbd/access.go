package nbd

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// ClientInfo is what is known of a client in its handshake.
type ClientInfo struct {
	Addr net.Addr             // of the server's end of the connection: its network is "unix" or "tcp"
	TLS  *tls.ConnectionState // nil while the connection is not encrypted
}

func (c ClientInfo) unix() bool { return c.Addr != nil && c.Addr.Network() == "unix" }

// Access is what a client may do with an export.
type Access int

// The rights, each with those before it.
const (
	AccessNone Access = iota // nothing: the client does not learn whether the export exists
	AccessRead
	AccessWrite
)

// find returns the export that the client asked for, or nil, and whether the client may use it. The name of an export
// that is the default is that of the export.
func (h *handshake) find(name string) (e *export, allowed bool) {
	e = h.server.find(name)
	h.readOnly = false
	if e != nil {
		name = e.Name
	}
	access := AccessWrite
	if h.server.opts.Authorize != nil {
		access = h.server.opts.Authorize(h.client, name)
	}
	if access == AccessNone {
		return nil, false
	}
	h.readOnly = access == AccessRead
	if e == nil && h.server.opts.Open != nil {
		e = h.open(name)
	}
	return e, true
}

// open returns an export of Options.Open, or nil. It is kept for further options that name it.
func (h *handshake) open(name string) *export {
	if h.opened != nil && h.opened.Name == name {
		return h.opened
	}
	begin := time.Now()
	e, end := h.server.opts.Open(name)
	h.setDeadline(h.deadline.Add(time.Since(begin))) // that time is not the client's
	if e == nil {
		return nil
	}
	h.closeOpened()
	e.Name = name
	h.opened, h.close = &export{Export: *e, gone: make(chan struct{})}, end
	return h.opened
}

// closeOpened gives up what Options.Open returned.
func (h *handshake) closeOpened() {
	if h.opened != nil {
		h.close()
		h.opened = nil
	}
}

// refuseExport answers an option for an export that there is not, or not for this client.
func (h *handshake) refuseExport(o wire.Option, name string, allowed bool) error {
	if allowed {
		return h.refuse(o, wire.RepErrUnknown, noExport)
	}
	from := peer(h.nc)
	h.server.log.Event(slog.LevelWarn, fmt.Sprintf("%s: the client has no right to export %q", from, name), "access refused", nil,
		slog.String("peer", from), slog.String("export", name))
	return h.refuse(o, wire.RepErrPolicy, "the client has no right to this export")
}
