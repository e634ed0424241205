package source

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// LoadTLS reads a client's certificates from a folder, under the names that libnbd, qemu and nbdkit use:
//
//	ca-cert.pem                       the authority of servers; without it those of the system
//	client-cert.pem, client-key.pem   the client's, for servers that require one; optional
func LoadTLS(dir string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	path := filepath.Join(dir, "ca-cert.pem")
	switch pem, err := os.ReadFile(path); {
	case err == nil:
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: no certificate in it", path)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	certificate := filepath.Join(dir, "client-cert.pem")
	if _, err := os.Stat(certificate); err != nil {
		if errors.Is(err, fs.ErrNotExist) && config.RootCAs != nil {
			return config, nil
		}
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(certificate, filepath.Join(dir, "client-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	config.Certificates = []tls.Certificate{pair}
	return config, nil
}
