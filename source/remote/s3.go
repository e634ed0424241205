package remote

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	s3credentials "github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"github.com/dmsnap/dmsnap/layer"
)

// s3 is a key of a bucket.
type s3 struct {
	bucket, key string
	core        *minio.Core
	timeout     time.Duration
}

// openS3 opens BUCKET/KEY on the server of AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, or on Amazon's.
func openS3(ref string, o Options) (Repository, error) {
	bucket, key, is := strings.Cut(ref, "/")
	if !is || bucket == "" || key == "" || strings.HasSuffix(key, "/") || path.Clean(key) != key {
		return nil, fmt.Errorf("s3://%s: s3://BUCKET/KEY is required", ref)
	}
	if err := s3utils.CheckValidBucketName(bucket); err != nil { // a request would end with the answer of no server
		return nil, fmt.Errorf("s3://%s: %w", ref, err)
	}
	endpoint := firstOf(os.Getenv("AWS_ENDPOINT_URL_S3"), os.Getenv("AWS_ENDPOINT_URL"), "https://s3.amazonaws.com")
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("s3://%s: the URL of the server (AWS_ENDPOINT_URL) is not http(s)://HOST", ref)
	}
	if u.Scheme == "http" && !o.plain(u.Host) {
		return nil, fmt.Errorf("s3://%s: plain HTTP is used for loopback hosts only, unless it is allowed", ref)
	}
	providers := []s3credentials.Provider{&s3credentials.EnvAWS{}}
	if o.Helpers { // the file may name a program
		providers = append(providers, &s3credentials.FileAWSCredentials{})
	}
	// Attempts are ours: they end in time.
	core, err := minio.NewCore(u.Host, &minio.Options{Creds: s3credentials.NewChainCredentials(providers), Secure: u.Scheme == "https",
		Region: firstOf(os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION"), "us-east-1"), Transport: o.newTransport(), MaxRetries: 1})
	if err != nil {
		return nil, fmt.Errorf("s3://%s: %w", ref, clean(err))
	}
	return &s3{bucket, key, core, o.timeout()}, nil
}

func (s *s3) Name() string { return "s3://" + s.bucket + "/" + s.key }

// blobKey is the key of a blob: disks in one folder share their blobs.
func (s *s3) blobKey(d layer.Digest) string {
	return path.Join(path.Dir(s.key), "blobs/sha256", d.Hex())
}

// failed replaces the errors of the client by ours.
func failed(err error) error {
	if r := minio.ToErrorResponse(err); err != nil && r.StatusCode != 0 {
		return newStatusError(r.StatusCode, http.Header{})
	}
	return err
}

func (s *s3) Description(ctx context.Context) (text []byte, err error) {
	err = attempts(ctx, s.timeout, func(ctx context.Context, moved func()) (bool, error) {
		body, _, _, err := s.core.GetObject(ctx, s.bucket, s.key, minio.GetObjectOptions{})
		if err != nil {
			return false, failed(err)
		}
		defer body.Close()
		text, err = io.ReadAll(io.LimitReader(&watched{body, moved}, layer.MaxDescription+1))
		return false, cut(err)
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.Name(), err)
	}
	return text, nil
}

func (s *s3) Blob(b layer.Blob) *Blob {
	return &Blob{s.Name(), b.Size, s.timeout, func(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
		var o minio.GetObjectOptions
		if err := o.SetRange(off, off+n-1); err != nil {
			return nil, 0, err
		}
		body, _, header, err := s.core.GetObject(ctx, s.bucket, s.blobKey(b.Digest), o)
		if err != nil {
			return nil, 0, failed(err)
		}
		status := http.StatusOK
		if header.Get("Content-Range") != "" {
			status = http.StatusPartialContent
		}
		if header.Get("Content-Encoding") == "aws-chunked" {
			header.Del("Content-Encoding") // it was that of the upload; some servers keep it
		}
		from, _, err := checkRange(status, header, off, b.Size)
		if err != nil {
			body.Close()
			return nil, 0, err
		}
		return body, from, nil
	}}
}

func (s *s3) Has(ctx context.Context, b layer.Blob) (has bool, err error) {
	err = s.write(ctx, "look for a blob", func(ctx context.Context, _ func()) error {
		info, err := s.core.StatObject(ctx, s.bucket, s.blobKey(b.Digest), minio.StatObjectOptions{})
		if has = err == nil && info.Size == b.Size; minio.ToErrorResponse(err).StatusCode == http.StatusNotFound {
			return nil
		}
		return err
	})
	return has, err
}

func (s *s3) write(ctx context.Context, what string, do func(ctx context.Context, moved func()) error) error {
	if err := writeAttempts(ctx, s.timeout, func(ctx context.Context, moved func()) error { return failed(do(ctx, moved)) }); err != nil {
		return fmt.Errorf("%s: %s: %w", s.Name(), what, err)
	}
	return nil
}

func (s *s3) put(ctx context.Context, key, mediaType string, size int64, content io.ReaderAt) error {
	return s.write(ctx, "write an object", func(ctx context.Context, moved func()) error {
		_, err := s.core.Client.PutObject(ctx, s.bucket, key, &watched{io.NewSectionReader(content, 0, size), moved}, size, minio.PutObjectOptions{ContentType: mediaType})
		return err
	})
}

func (s *s3) Put(ctx context.Context, b layer.Blob, mediaType string, content io.ReaderAt) error {
	return s.put(ctx, s.blobKey(b.Digest), mediaType, b.Size, content)
}

// Mount does nothing: disks in one folder share their blobs.
func (s *s3) Mount(context.Context, layer.Blob, string, Repository) (bool, error) { return false, nil }

func (s *s3) PutDescription(ctx context.Context, d *layer.Description) error {
	text, err := d.Encode()
	if err != nil {
		return err
	}
	return s.put(ctx, s.key, layer.MediaDescription, int64(len(text)), bytes.NewReader(text))
}
