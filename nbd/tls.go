package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// startTLS answers OptStartTLS: the rest of the connection is encrypted, and nothing that was settled
// before it counts any more.
//
// Whatever a peer sent behind the option, before it had our answer, was sent in the clear. Taken for the
// first words of the encrypted stream it would speak with the client's authority, so it ends the
// connection.
func (h *handshake) startTLS(data []byte) error {
	const o = wire.OptStartTLS
	switch {
	case h.server.opts.TLS == nil:
		return h.refuse(o, wire.RepErrUnsup, "the server has no certificate")
	case h.secure:
		return h.refuse(o, wire.RepErrInvalid, "TLS was started already")
	case len(data) > 0:
		return h.refuse(o, wire.RepErrInvalid, "no data expected")
	case h.r.Buffered() > 0:
		return errors.New("handshake: data in the clear behind STARTTLS")
	}
	if err := h.reply(o, wire.RepAck, nil); err != nil {
		return err
	}
	nc := tls.Server(h.nc, h.server.opts.TLS)
	if err := nc.Handshake(); err != nil { // within the deadline of the whole handshake
		return fmt.Errorf("TLS: %w", err)
	}
	h.attach(nc)
	h.secure = true
	h.structured, h.contexts, h.contextsOf = false, nil, ""
	return nil
}

// mustEncrypt reports whether an option has to wait for TLS.
func (h *handshake) mustEncrypt(o wire.Option) bool {
	return h.server.opts.RequireTLS && !h.secure && o != wire.OptStartTLS && o != wire.OptAbort
}
