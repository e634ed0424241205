package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A get begins to receive n bytes from byte off on. from is the byte at which the body begins: off or, where the server ignores
// ranges, less. The body may be longer than asked for.
type get func(ctx context.Context, off, n int64) (body io.ReadCloser, from int64, err error)

// A Blob is a sequence of bytes on a server.
type Blob struct {
	name    string
	size    int64
	timeout time.Duration
	get     get
}

// Name is where it is, without credentials.
func (b *Blob) Name() string { return b.name }

// Size is in bytes.
func (b *Blob) Size() int64 { return b.size }

// Bounds of attempts. A connection on which nothing arrives for a third of the timeout is given up.
const (
	firstPause = 50 * time.Millisecond
	mostPause  = 5 * time.Second
	stallPart  = 3
)

// ReadRange fills p from byte off of the blob. Attempts that fail are repeated, from where the last one ended, until the
// timeout. After an error p holds anything.
func (b *Blob) ReadRange(ctx context.Context, p []byte, off int64) error {
	if off < 0 || off > b.size-int64(len(p)) {
		return fmt.Errorf("%s: %d bytes at byte %d of %d", b.name, len(p), off, b.size)
	}
	err := attempts(ctx, b.timeout, func(ctx context.Context, moved func()) (bool, error) {
		n, err := b.attempt(ctx, p, off, moved)
		p, off = p[n:], off+int64(n)
		return n > 0, err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", b.name, err)
	}
	return nil
}

// attempts repeats do until it succeeds, fails permanently, or the timeout ends. do calls moved when it has received something, and reports
// whether it came further: then the next attempt follows soon.
func attempts(ctx context.Context, timeout time.Duration, do func(ctx context.Context, moved func()) (further bool, err error)) error {
	caller := ctx
	ctx, cancel := WithTimeout(ctx, timeout)
	defer cancel()
	pause := firstPause
	var before error // of the attempt before
	for {
		further := false
		err := whileMoving(ctx, timeout/stallPart, func(ctx context.Context, moved func()) (err error) {
			further, err = do(ctx, moved)
			return err
		})
		if err == nil {
			return nil
		}
		if before != nil && ctx.Err() != nil && err == context.Cause(ctx) {
			err = before // the time was over before this attempt waited for anything
		}
		err = clean(err)
		if !mayPass(err) {
			return err
		}
		before = err
		if further {
			pause = firstPause
		}
		wait := pause/2 + rand.N(pause)
		var s *statusError
		if errors.As(err, &s) {
			wait = max(wait, s.after)
		}
		pause = min(2*pause, mostPause)
		if deadline, _ := ctx.Deadline(); ctx.Err() == nil && wait > time.Until(deadline) {
			cancel() // another attempt would not begin in time
		}
		select {
		case <-time.After(wait):
			continue
		case <-ctx.Done():
		}
		if cause := context.Cause(caller); cause != nil && !errors.Is(cause, context.DeadlineExceeded) {
			return cause // the caller does not wait any more
		}
		if s == nil {
			err = fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
		return err
	}
}

// attempt reads as far as one answer goes.
func (b *Blob) attempt(ctx context.Context, p []byte, off int64, moved func()) (n int, err error) {
	body, from, err := b.get(ctx, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer body.Close()
	r := &watched{body, moved}
	if _, err := io.CopyN(io.Discard, r, off-from); err != nil {
		return 0, cut(err)
	}
	n, err = io.ReadFull(r, p)
	return n, cut(err)
}

// cut is the error of an answer that ended early.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the answer was cut off")
	}
	return err
}

// watched calls a function after each read that returned something.
type watched struct {
	r     io.Reader
	moved func()
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if n > 0 {
		w.moved()
	}
	return n, err
}

// setRange asks for a range.
func setRange(r *http.Request, off, n int64) {
	r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	r.Header.Set("Accept-Encoding", "identity")
}

// checkRange judges an answer to a request for a range of a file of size bytes (-1: unknown), and returns the byte at
// which its body begins and the size of the file.
func checkRange(status int, header http.Header, off, size int64) (from, total int64, err error) {
	if e := header.Get("Content-Encoding"); e != "" && e != "identity" {
		return 0, 0, fmt.Errorf("%w: the server encodes the file as %.20q", errFinal, e)
	}
	switch status {
	case http.StatusOK:
		from = 0
		if total, err = strconv.ParseInt(header.Get("Content-Length"), 10, 64); err != nil {
			total = size
		}
	case http.StatusPartialContent:
		if from, total, err = contentRange(header.Get("Content-Range")); err != nil {
			return 0, 0, err
		}
		if from != off {
			return 0, 0, fmt.Errorf("the server answered with bytes from %d on instead of from %d on", from, off)
		}
		if total < 0 {
			total = size
		}
	default:
		return 0, 0, newStatusError(status, header)
	}
	if size >= 0 && total != size {
		return 0, 0, fmt.Errorf("the server has a file of %d bytes instead of %d", total, size)
	}
	return from, total, nil
}

// contentRange reads "bytes 0-499/1234"; of "*" total is -1.
func contentRange(s string) (from, total int64, err error) {
	var to int64
	malformed := fmt.Errorf("the server answered with the range %.60q", s)
	span, length, is := strings.Cut(strings.TrimPrefix(s, "bytes "), "/")
	if _, err := fmt.Sscanf(span, "%d-%d", &from, &to); err != nil || !is || from < 0 || to < from {
		return 0, 0, malformed
	}
	if length == "*" {
		return from, -1, nil
	}
	if total, err = strconv.ParseInt(length, 10, 64); err != nil || total <= to {
		return 0, 0, malformed
	}
	return from, total, nil
}
