package remote

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/layer"
)

// A File is one version of a file on a web server.
type File struct {
	*Blob
	id      layer.Digest
	version Version
}

// Version is what OpenVersion needs to open the same one.
func (f *File) Version() Version { return f.version }

// Identity is a digest of the file's URL without a query, its entity tag and its size.
func (f *File) Identity() layer.Digest { return f.id }

// A Version says which version of a file is meant.
type Version struct {
	ETag string
	Size int64
}

// OpenFile opens a file. The server must give a strong entity tag, by which other versions are recognised.
func OpenFile(ctx context.Context, name string, o Options) (*File, error) {
	shown := text.WithoutSecrets(name)
	f, err := newHTTPFile(name, o)
	if err != nil {
		return nil, err
	}
	err = attempts(ctx, o.timeout(), func(ctx context.Context, _ func()) (bool, error) {
		body, _, err := f.get(ctx, 0, 1)
		if err != nil {
			return false, err
		}
		return false, body.Close()
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", shown, err)
	}
	if f.size <= 0 {
		return nil, fmt.Errorf("%s: the server does not say how long the file is", shown)
	}
	if f.tag == "" || strings.HasPrefix(f.tag, "W/") {
		return nil, fmt.Errorf("%s: the server gives no strong ETag: nothing says whether the file stays the same", shown)
	}
	return f.open(o), nil
}

// OpenVersion opens a version of a file that was opened before. It sends nothing.
func OpenVersion(name string, v Version, o Options) (*File, error) {
	f, err := newHTTPFile(name, o)
	if err != nil {
		return nil, err
	}
	if f.tag, f.size = v.ETag, v.Size; f.tag == "" || f.size <= 0 {
		return nil, fmt.Errorf("%s: no version of a file", text.WithoutSecrets(name))
	}
	return f.open(o), nil
}

func newHTTPFile(name string, o Options) (*httpFile, error) {
	u, err := url.Parse(name)
	switch {
	case err != nil || u.Host == "":
		return nil, fmt.Errorf("%s: no URL of a file", text.WithoutSecrets(name))
	case u.Scheme != "https" && !o.plain(u.Host):
		return nil, fmt.Errorf("%s: plain HTTP is used for loopback hosts only, unless it is allowed", text.WithoutSecrets(name))
	}
	f := &httpFile{client: o.newClient(), url: name, size: -1}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	f.plain = u.String()
	return f, nil
}

// open returns the file, whose version is known.
func (f *httpFile) open(o Options) *File {
	return &File{&Blob{text.WithoutSecrets(f.url), f.size, o.timeout(), f.get}, layer.DigestOf(fmt.Appendf(nil, "%s\n%s\n%d\n", f.plain, f.tag, f.size)),
		Version{f.tag, f.size}}
}

// httpFile is a file; tag and size are set by the first answer.
type httpFile struct {
	client *http.Client
	url    string
	plain  string // without user, query and fragment
	tag    string
	size   int64
}

func (f *httpFile) get(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, f.url, nil)
	if err != nil {
		return nil, 0, err
	}
	setRange(r, off, n)
	if f.tag != "" {
		r.Header.Set("If-Match", f.tag)
	}
	answer, err := f.client.Do(r)
	if err != nil {
		return nil, 0, err
	}
	first := f.tag == ""
	if !first && answer.StatusCode < 300 && answer.Header.Get("ETag") != f.tag {
		answer.Body.Close()
		return nil, 0, ErrChanged
	}
	from, total, err := checkRange(answer.StatusCode, answer.Header, off, f.size)
	if err != nil {
		answer.Body.Close()
		return nil, 0, err
	}
	if first {
		f.tag, f.size = answer.Header.Get("ETag"), total
	}
	return answer.Body, from, nil
}
