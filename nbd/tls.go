package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// startTLS answers OptStartTLS: the rest of the connection is encrypted, and everything negotiated before is discarded.
//
// Bytes that a peer sent after the option, before the reply, were sent unencrypted. Read as part of the encrypted
// stream they would have the client's authority, so they end the connection.
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
	nc := tls.Server(h.nc, h.server.tls.Load())
	if err := nc.Handshake(); err != nil { // within the deadline of the whole handshake
		return fmt.Errorf("TLS: %w", err)
	}
	state := nc.ConnectionState()
	h.client.TLS = &state
	h.attach(nc)
	h.secure = true
	h.structured, h.contexts, h.contextsOf = false, nil, ""
	return nil
}

// mustEncrypt reports whether an option has to wait for TLS.
func (h *handshake) mustEncrypt(o wire.Option) bool {
	if !h.server.opts.RequireTLS || h.secure || o == wire.OptStartTLS || o == wire.OptAbort {
		return false
	}
	return !(h.server.opts.PlainUnix && h.client.unix())
}

// SetTLS replaces the certificates and the authorities of clients for handshakes that begin from now on. The server must
// have been made with [Options].TLS.
func (s *Server) SetTLS(config *tls.Config) {
	if s.opts.TLS == nil || config == nil {
		panic("nbd: SetTLS of a server without TLS")
	}
	s.warnOfCertificates(config)
	s.tls.Store(withoutAuthorityNames(config))
}

func (s *Server) warnOfCertificates(config *tls.Config) {
	warnOfCertificates(config, time.Now(), func(line string) { s.log.Event(slog.LevelWarn, line, line, nil) })
}

// withoutAuthorityNames returns a configuration that verifies clients as config does, and does not send them the names
// of the authorities. GnuTLS before 3.8, which most NBD clients use, searches in TLS 1.3 for a certificate by authority
// and signature algorithm together, regards an RSA certificate as unfit for the RSA-PSS signatures that TLS 1.3
// requires, and sends none. Without names it sends the certificate that it has.
func withoutAuthorityNames(config *tls.Config) *tls.Config {
	if config == nil || config.ClientCAs == nil {
		return config
	}
	c := config.Clone()
	switch config.ClientAuth {
	case tls.RequireAndVerifyClientCert:
		c.ClientAuth = tls.RequireAnyClientCert
	case tls.VerifyClientCertIfGiven:
		c.ClientAuth = tls.RequestClientCert
	default:
		return config
	}
	c.ClientCAs = nil
	// Called for every connection, resumed ones included.
	c.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) > 0 {
			chains, err := verifyClient(config, state.PeerCertificates)
			if err != nil {
				return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
			}
			state.VerifiedChains = chains
		}
		if config.VerifyConnection != nil {
			return config.VerifyConnection(state)
		}
		return nil
	}
	return c
}

// verifyClient verifies a client's certificate and those that came with it.
func verifyClient(config *tls.Config, certs []*x509.Certificate) ([][]*x509.Certificate, error) {
	o := x509.VerifyOptions{Roots: config.ClientCAs, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if config.Time != nil {
		o.CurrentTime = config.Time()
	}
	for _, c := range certs[1:] {
		o.Intermediates.AddCert(c)
	}
	return certs[0].Verify(o)
}

// warnOfCertificates logs the server's certificates that clients will refuse at the time now.
func warnOfCertificates(config *tls.Config, now time.Time, log func(line string)) {
	if config == nil {
		return
	}
	for _, chain := range config.Certificates {
		for _, der := range chain.Certificate {
			c, err := x509.ParseCertificate(der)
			switch {
			case err != nil:
				log(fmt.Sprintf("server certificate: %v", err))
			case now.After(c.NotAfter):
				log(fmt.Sprintf("server certificate %q expired on %s: clients that verify it refuse to connect", c.Subject, c.NotAfter.UTC().Format(time.DateTime)))
			case now.Before(c.NotBefore):
				log(fmt.Sprintf("server certificate %q is not valid before %s: clients that verify it refuse to connect", c.Subject, c.NotBefore.UTC().Format(time.DateTime)))
			}
		}
	}
}
