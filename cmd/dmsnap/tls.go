package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// loadTLS reads a server's certificates from a folder, under the names that libnbd, qemu and nbdkit use:
//
//	server-cert.pem, server-key.pem   the server's
//	ca-cert.pem                       the authority of its clients; with it, clients without a certificate
//	                                  that it signed are turned away. Without it anybody may connect.
func loadTLS(dir string) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	path := filepath.Join(dir, "ca-cert.pem")
	pem, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return config, nil
	}
	if err != nil {
		return nil, err
	}
	config.ClientCAs = x509.NewCertPool()
	if !config.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in it", path)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	return config, nil
}

// tlsFlag is the value of --tls.
type tlsFlag struct{ allow bool }

func (f *tlsFlag) Set(s string) error {
	if s != "require" && s != "allow" {
		return errors.New("must be require or allow")
	}
	f.allow = s == "allow"
	return nil
}

func (f *tlsFlag) String() string {
	if f.allow {
		return "allow"
	}
	return "require"
}

func (f *tlsFlag) Type() string { return "require|allow" }
