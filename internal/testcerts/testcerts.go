// Package testcerts makes certificates for tests of TLS, in a directory as NBD programs expect it. Only tests import
// it.
package testcerts

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// An Authority signs certificates.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// NewAuthority makes an authority of a name.
func NewAuthority(name string) (*Authority, error) {
	a := &Authority{}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	a.cert, err = x509.ParseCertificate(der)
	return a, err
}

// A KeyKind is a kind of key of a certificate.
type KeyKind string

const (
	ECDSA   KeyKind = "ECDSA"
	RSA     KeyKind = "RSA"
	Ed25519 KeyKind = "Ed25519"
)

func (k KeyKind) generate() (crypto.Signer, error) {
	switch k {
	case RSA:
		return rsa.GenerateKey(rand.Reader, 2048)
	case Ed25519:
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// Write is WriteKind with ECDSA keys, valid for an hour.
func (a *Authority) Write(dir string) error {
	return a.WriteKind(dir, ECDSA, time.Now().Add(time.Hour))
}

// WriteKind writes ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem and client-key.pem to a directory, for
// the server localhost, registry.test, 127.0.0.1 and ::1. Keys are of the kind, certificates valid until expiry.
func (a *Authority) WriteKind(dir string, kind KeyKind, expiry time.Time) error {
	if err := os.WriteFile(filepath.Join(dir, "ca-cert.pem"), a.pem, 0o600); err != nil {
		return err
	}
	for i, name := range []string{"server", "client"} {
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i) + 2), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: expiry,
			KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			DNSNames:    []string{"localhost", "registry.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}}
		key, err := kind.generate()
		if err != nil {
			return err
		}
		der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
		if err != nil {
			return err
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		for file, block := range map[string]*pem.Block{
			"-cert.pem": {Type: "CERTIFICATE", Bytes: der}, "-key.pem": {Type: "PRIVATE KEY", Bytes: private},
		} {
			if err := os.WriteFile(filepath.Join(dir, name+file), pem.EncodeToMemory(block), 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}
