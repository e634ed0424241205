// Package remote reads ranges of files from web servers, OCI registries and S3 object stores, and writes disks of package layer
// to the latter two.
//
//	r, err := remote.Open("oci://registry.example/golden/debian:13", remote.Options{})
//	text, err := r.Description(ctx)                    // a layer.Description
//	b := r.Blob(d.Layers[0].Data)
//	err = b.ReadRange(ctx, p, off)                     // several attempts, each continues where the last one ended
//
//	f, err := remote.OpenFile(ctx, "https://host/disk.img", remote.Options{})   // one version of a file
//
// # References
//
//	oci://HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]   by TLS; of a loopback host by plain HTTP
//	s3://BUCKET/KEY                              the description; blobs are beside it, in blobs/sha256/
//	https://HOST/PATH                            a file whose bytes are the disk; http:// for loopback hosts
//
// # Guarantees
//
//   - A call ends when its context does, and after [Options].Timeout at the latest. A connection on which nothing arrives is
//     given up and replaced before that.
//   - One range is requested at a time. A server that answers with the whole file is tolerated: what is before the range
//     is skipped.
//   - Content is not verified here: callers know the digests. A file has none; every answer must have the entity tag of the first one
//     ([ErrChanged]).
//   - Credentials are sent only to the registry or the store that they are for, and never appear in errors; neither
//     do the queries of URLs, which may be signatures. No program is run unless [Options].Helpers says so.
//
// Everything may be called concurrently.
package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/layer"
)

// Errors of this package. Others are of the network or of the server.
var (
	// ErrChanged reports a file that was replaced by another version since it was opened.
	ErrChanged = errors.New("the file on the server has changed")
	// ErrNotFound reports that the server does not have it.
	ErrNotFound = errors.New("not found")
	// ErrDenied reports that the server requires other credentials.
	ErrDenied = errors.New("access denied")
	// ErrUnreachable reports that no answer was received: the host is offline, or the server is.
	ErrUnreachable = errors.New("no answer from the server")
)

// DefaultTimeout is how long a request may take with all its attempts.
const DefaultTimeout = 30 * time.Second

// Options say how servers are spoken to. The zero value is usable.
type Options struct {
	// Insecure: plain HTTP also for hosts that are not loopback.
	Insecure bool
	// Helpers allows the programs that credential files name to be run.
	Helpers bool
	// Timeout bounds a request with all its attempts; 0: DefaultTimeout.
	Timeout time.Duration
	// Transport is used for requests; nil: one of its own.
	Transport http.RoundTripper
}

func (o Options) timeout() time.Duration {
	if o.Timeout > 0 {
		return o.Timeout
	}
	return DefaultTimeout
}

// A Repository has the disks of package layer.
type Repository interface {
	// Name is the reference as text, without credentials.
	Name() string
	// Description returns the description that the reference names now. Where the reference has a digest it was verified.
	Description(ctx context.Context) ([]byte, error)
	// Blob returns a blob, which need not exist.
	Blob(b layer.Blob) *Blob
	// Has reports whether a blob exists.
	Has(ctx context.Context, b layer.Blob) (bool, error)
	// Put writes a blob, again from its beginning after an error that may pass.
	Put(ctx context.Context, b layer.Blob, mediaType string, content io.ReaderAt) error
	// Mount makes a blob of another repository one of this, where the server can do that without a copy.
	Mount(ctx context.Context, b layer.Blob, mediaType string, from Repository) (bool, error)
	// PutDescription makes the reference name a disk whose blobs exist.
	PutDescription(ctx context.Context, d *layer.Description) error
}

// Open returns the repository of a reference. It sends nothing.
func Open(ref string, o Options) (Repository, error) {
	scheme, rest, is := strings.Cut(ref, "://")
	if !is {
		scheme, rest = "oci", ref
	}
	switch scheme {
	case "oci":
		return openOCI(rest, o)
	case "s3":
		return openS3(rest, o)
	}
	return nil, fmt.Errorf("%s: a reference begins with oci:// or s3://", text.WithoutSecrets(ref))
}

// IsReference reports whether a name is that of a disk in a registry or an object store.
func IsReference(name string) bool {
	return strings.HasPrefix(name, "oci://") || strings.HasPrefix(name, "s3://")
}

// IsFile reports whether a name is that of a file on a web server.
func IsFile(name string) bool {
	return strings.HasPrefix(name, "https://") || strings.HasPrefix(name, "http://")
}

// isLoopback reports whether a host, maybe with a port, is this one.
func isLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// plain reports whether a host is spoken to by plain HTTP.
func (o Options) plain(host string) bool { return o.Insecure || isLoopback(host) }

// newTransport returns the transport of a repository or a file.
func (o Options) newTransport() http.RoundTripper {
	if o.Transport != nil {
		return o.Transport
	}
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       90 * time.Second,
		DisableCompression:    true, // ranges are of the file itself
		ForceAttemptHTTP2:     false,
		ResponseHeaderTimeout: 0, // contexts bound it
	}
}

// newClient returns a client that does not go from TLS to plain HTTP.
func (o Options) newClient() *http.Client {
	return &http.Client{Transport: o.newTransport(), CheckRedirect: func(next *http.Request, via []*http.Request) error {
		switch {
		case len(via) >= 10:
			return errors.New("10 redirections")
		case via[0].URL.Scheme == "https" && next.URL.Scheme != "https":
			return errors.New("a redirection from TLS to plain HTTP")
		}
		return nil
	}}
}

// A statusError is an answer other than what was asked for.
type statusError struct {
	status int
	after  time.Duration // that the server wants to pass before the next attempt
	err    error         // one of the package's, or nil
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("the server answered %d %s", e.status, http.StatusText(e.status))
	if e.err != nil {
		return e.err.Error() + ": " + text
	}
	return text
}

func (e *statusError) Unwrap() error { return e.err }

// newStatusError describes an answer.
func newStatusError(status int, header http.Header) error {
	e := &statusError{status: status}
	switch status {
	case http.StatusNotFound, http.StatusGone:
		e.err = ErrNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		e.err = ErrDenied
	case http.StatusPreconditionFailed:
		e.err = ErrChanged
	}
	if d, err := time.ParseDuration(header.Get("Retry-After") + "s"); err == nil && d > 0 {
		e.after = d
	}
	return e
}

// mayPass reports whether the same request may succeed later.
func mayPass(err error) bool {
	var s *statusError
	if errors.As(err, &s) {
		return s.status >= 500 && s.status != http.StatusNotImplemented || s.status == http.StatusTooManyRequests || s.status == http.StatusRequestTimeout
	}
	var certificate *tls.CertificateVerificationError
	if errors.As(err, &certificate) || errors.Is(err, http.ErrSchemeMismatch) {
		return false // another attempt would meet the same server
	}
	return !errors.Is(err, ErrChanged) && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrDenied) && !errors.Is(err, errFinal)
}

// errFinal reports what does not change by another attempt.
var errFinal = errors.New("refused")

// cleanError is an error without secrets in its text.
type cleanError struct {
	text string
	err  error
}

func (e *cleanError) Error() string { return e.text }
func (e *cleanError) Unwrap() error { return e.err }

// clean removes URLs of requests, queries and user names from an error.
func clean(err error) error {
	if err == nil {
		return nil
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if clean := text.WithoutSecrets(err.Error()); clean != err.Error() {
		return &cleanError{clean, err}
	}
	return err
}
