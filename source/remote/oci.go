package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry"
	ociremote "oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/dmsnap/dmsnap/layer"
)

// maxManifest bounds a manifest, in bytes.
const maxManifest = 1 << 20

// mostCopied bounds a description of which the manifest has a copy, in bytes: with it a reader needs one request less.
const mostCopied = 16 << 10

// oci is a repository of a registry. Its blobs are those of the description, which is the config of the manifest.
type oci struct {
	name    string
	ref     registry.Reference
	repo    *ociremote.Repository
	client  *auth.Client
	base    string // URL of the repository in the registry's API
	timeout time.Duration
}

func openOCI(ref string, o Options) (Repository, error) {
	parsed, err := registry.ParseReference(ref)
	if err != nil {
		return nil, fmt.Errorf("oci://%s: %w", ref, err)
	}
	if parsed.Reference == "" {
		parsed.Reference = "latest"
	}
	find, err := o.credentials()
	if err != nil {
		return nil, err
	}
	host := parsed.Host()
	r := &oci{name: "oci://" + parsed.String(), ref: parsed, timeout: o.timeout(),
		client: &auth.Client{Client: o.newClient(), Cache: auth.NewCache(), Credential: find}}
	r.client.SetUserAgent("dmsnap")
	scheme := "https"
	if o.plain(host) {
		scheme = "http"
	}
	if isLoopback(host) {
		r.client.BlockedRealmPrefixes = []netip.Prefix{} // its token server may be on this host, too
	}
	r.base = fmt.Sprintf("%s://%s/v2/%s/", scheme, host, parsed.Repository)
	r.repo = &ociremote.Repository{Client: r.client, Reference: parsed, PlainHTTP: scheme == "http", SkipReferrersGC: true}
	return r, nil
}

func (r *oci) Name() string { return r.name }

// do sends a request for something below the repository.
func (r *oci) do(ctx context.Context, what string, prepare func(*http.Request)) (*http.Response, error) {
	ctx = auth.AppendRepositoryScope(ctx, r.ref, auth.ActionPull)
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+what, nil)
	if err != nil {
		return nil, err
	}
	prepare(q)
	answer, err := r.client.Do(q)
	return answer, answered(err)
}

// answered replaces the errors of the client that stand for an answer of the registry or of its server of tokens: their
// texts have what that sent.
func answered(err error) error {
	var answer *errcode.ErrorResponse
	switch {
	case errors.As(err, &answer):
		return newStatusError(answer.StatusCode, http.Header{})
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		return fmt.Errorf("%w: there are no credentials for it", ErrDenied)
	}
	return err
}

func (r *oci) Description(ctx context.Context) ([]byte, error) {
	var text []byte
	err := attempts(ctx, r.timeout, func(ctx context.Context, moved func()) (bool, error) {
		answer, err := r.do(ctx, "manifests/"+r.ref.Reference, func(q *http.Request) { q.Header.Set("Accept", ocispec.MediaTypeImageManifest) })
		if err != nil {
			return false, err
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return false, newStatusError(answer.StatusCode, answer.Header)
		}
		text, err = io.ReadAll(io.LimitReader(&watched{answer.Body, moved}, maxManifest+1))
		return false, cut(err)
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.name, err)
	}
	config, copied, err := r.configOf(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.name, err)
	}
	if int64(len(copied)) == config.Size && layer.DigestOf(copied) == config.Digest {
		return copied, nil
	}
	p := make([]byte, config.Size)
	return p, readVerified(ctx, r.Blob(config), config, p)
}

// configOf returns what a manifest of a disk describes it by, and the copy of it in the manifest, if there is one.
func (r *oci) configOf(text []byte) (b layer.Blob, copied []byte, err error) {
	if want, err := r.ref.Digest(); err == nil && (want.Algorithm() != digest.SHA256 || digest.FromBytes(text) != want) {
		return b, nil, fmt.Errorf("%w: the manifest has another digest", layer.ErrCorrupt)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(text, &m); err != nil || len(text) > maxManifest {
		return b, nil, fmt.Errorf("%w: no manifest", layer.ErrCorrupt)
	}
	if m.Config.MediaType != layer.MediaDescription {
		return b, nil, fmt.Errorf("it holds %.80q, not a disk of dmsnap", firstOf(m.Config.MediaType, m.MediaType, "something else"))
	}
	b.Size = m.Config.Size
	if err := b.Digest.UnmarshalText([]byte(m.Config.Digest)); err != nil || b.Size <= 0 || b.Size > layer.MaxDescription {
		return b, nil, fmt.Errorf("%w: a description of %d bytes, digest %.80q", layer.ErrCorrupt, b.Size, m.Config.Digest)
	}
	return b, m.Config.Data, nil
}

func firstOf(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}

// readVerified reads a blob as a whole.
func readVerified(ctx context.Context, b *Blob, want layer.Blob, p []byte) error {
	if err := b.ReadRange(ctx, p, 0); err != nil {
		return err
	}
	if layer.DigestOf(p) != want.Digest {
		return fmt.Errorf("%s: %w: it has another digest", b.name, layer.ErrCorrupt)
	}
	return nil
}

func (r *oci) Blob(b layer.Blob) *Blob {
	return &Blob{r.name, b.Size, r.timeout, func(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
		answer, err := r.do(ctx, "blobs/"+b.Digest.String(), func(q *http.Request) { setRange(q, off, n) })
		if err != nil {
			return nil, 0, err
		}
		from, _, err := checkRange(answer.StatusCode, answer.Header, off, b.Size)
		if err != nil {
			answer.Body.Close()
			return nil, 0, err
		}
		return answer.Body, from, nil
	}}
}

func descriptor(b layer.Blob, mediaType string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.Digest(b.Digest.String()), Size: b.Size}
}

// write repeats a request that writes. Each attempt may take as long as something moves.
func (r *oci) write(ctx context.Context, what string, do func(ctx context.Context, moved func()) error) error {
	if err := writeAttempts(ctx, r.timeout, func(ctx context.Context, moved func()) error { return answered(do(ctx, moved)) }); err != nil {
		return fmt.Errorf("%s: %s: %w", r.name, what, err)
	}
	return nil
}

// writeAttempts calls do up to 4 times. An attempt in which nothing moves for the timeout is given up.
func writeAttempts(ctx context.Context, timeout time.Duration, do func(ctx context.Context, moved func()) error) error {
	pause := firstPause
	for n := 1; ; n++ {
		err := whileMoving(ctx, timeout, do)
		if err != nil && errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
		if err = clean(err); err == nil || n == 4 || ctx.Err() != nil || !mayPass(err) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause *= 4
	}
}

func (r *oci) Has(ctx context.Context, b layer.Blob) (has bool, err error) {
	err = r.write(ctx, "look for a blob", func(ctx context.Context, _ func()) (err error) {
		has, err = r.repo.Blobs().Exists(ctx, descriptor(b, layer.MediaData))
		return err
	})
	return has, err
}

func (r *oci) Put(ctx context.Context, b layer.Blob, mediaType string, content io.ReaderAt) error {
	return r.write(ctx, "write a blob", func(ctx context.Context, moved func()) error {
		return r.repo.Blobs().Push(ctx, descriptor(b, mediaType), &watched{io.NewSectionReader(content, 0, b.Size), moved})
	})
}

// errNoMount ends a mount that the registry turned into an upload.
var errNoMount = errors.New("the blob was not mounted")

func (r *oci) Mount(ctx context.Context, b layer.Blob, mediaType string, from Repository) (bool, error) {
	other, is := from.(*oci)
	if !is || other.ref.Registry != r.ref.Registry {
		return false, nil
	}
	err := r.write(ctx, "mount a blob", func(ctx context.Context, _ func()) error {
		err := r.repo.Mount(ctx, descriptor(b, mediaType), other.ref.Repository, func() (io.ReadCloser, error) { return nil, errNoMount })
		if errors.Is(err, errNoMount) {
			return fmt.Errorf("%w: %w", errFinal, errNoMount)
		}
		return err
	})
	if errors.Is(err, errNoMount) {
		return false, nil
	}
	return err == nil, err
}

func (r *oci) PutDescription(ctx context.Context, d *layer.Description) error {
	text, err := d.Encode()
	if err != nil {
		return err
	}
	config := layer.Blob{Digest: layer.DigestOf(text), Size: int64(len(text))}
	if err := r.Put(ctx, config, layer.MediaDescription, bytes.NewReader(text)); err != nil {
		return err
	}
	m := manifestOf(d, config)
	if config.Size <= mostCopied {
		m.Config.Data = text
	}
	manifest, err := json.Marshal(m)
	if err != nil {
		return err
	}
	about := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	return r.write(ctx, "write the manifest", func(ctx context.Context, _ func()) error {
		return r.repo.Manifests().PushReference(ctx, about, bytes.NewReader(manifest), r.ref.Reference)
	})
}

// manifestOf is the manifest of a disk: every blob is among its layers, so that registries keep them.
func manifestOf(d *layer.Description, config layer.Blob) ocispec.Manifest {
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: layer.MediaDisk,
		Config: descriptor(config, layer.MediaDescription)}
	for _, l := range d.Layers {
		m.Layers = append(m.Layers, descriptor(l.Data, layer.MediaData), descriptor(l.Index.Blob, layer.MediaIndex))
	}
	if len(d.Layers) > 1 {
		m.Layers = append(m.Layers, descriptor(d.Index.Blob, layer.MediaIndex))
	}
	return m
}
