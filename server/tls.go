package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// LoadTLS reads a server's certificates from a directory, under the names that libnbd, qemu and nbdkit use:
//
//	server-cert.pem, server-key.pem   the server's
//	ca-cert.pem                       the authority of its clients; with it, clients without a certificate
//	                                  that it signed are refused. Without it any client may connect.
func LoadTLS(dir string) (*tls.Config, error) {
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
