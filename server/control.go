package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// The control API: HTTP with JSON on a unix socket, described in docs/api.md.

const (
	maxBody     = 64 << 10 // bytes of a request's body
	maxWait     = 60       // seconds that GET /v1/merge?wait=… waits
	dropTimeout = 10 * time.Second
)

// serveControl serves the API on l until ctx ends, and lets requests under way end then.
func (s *Server) serveControl(ctx context.Context, l net.Listener) error {
	h := &http.Server{Handler: s.Handler(), MaxHeaderBytes: 16 << 10, IdleTimeout: time.Minute,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: (maxWait + 30) * time.Second, // it also bounds a long poll
		ErrorLog:    log.New(io.Discard, "", 0),
		BaseContext: func(net.Listener) context.Context { return ctx }} // long polls end with ctx
	var closing error
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropTimeout)
		defer cancel()
		closing = errors.Join(h.Shutdown(late), h.Close())
	})
	err := h.Serve(l)
	if stop() {
		return err // ctx has not ended: the listener failed
	}
	<-closed
	return closing
}

// Handler returns the control API, for servers of HTTP other than the one that Start runs.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			answer, err := f(r)
			reply(w, answer, err)
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return s.Status(), nil })
	handle("GET /v1/tree", func(*http.Request) (any, error) { return s.Tree(), nil })
	handle("GET /v1/heat/{name}", func(r *http.Request) (any, error) {
		parts, err := PartsOf(r)
		if err != nil {
			return nil, err
		}
		return s.HeatMap(r.PathValue("name"), parts)
	})
	handle("GET /v1/snapshots/{name}", func(r *http.Request) (any, error) { return s.Snapshot(r.PathValue("name")) })
	handle("POST /v1/snapshots", func(r *http.Request) (any, error) {
		var q api.AttachRequest
		if err := readBody(r, &q); err != nil {
			return nil, err
		}
		return s.Attach(q)
	})
	handle("POST /v1/snapshots/{name}/grow", func(r *http.Request) (any, error) {
		var q api.GrowRequest
		if err := readBody(r, &q); err != nil {
			return nil, err
		}
		return s.Grow(r.PathValue("name"), q.Size)
	})
	handle("DELETE /v1/snapshots/{name}", func(r *http.Request) (any, error) {
		// A drop is not left half done when the client disconnects.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), dropTimeout)
		defer cancel()
		return struct{}{}, s.Drop(ctx, r.PathValue("name"))
	})
	handle("POST /v1/merge", s.postMerge)
	handle("GET /v1/merge", s.getMerge)
	handle("POST /v1/merge/pause", func(*http.Request) (any, error) { return s.PauseMerge() })
	handle("POST /v1/merge/resume", func(*http.Request) (any, error) { return s.ResumeMerge() })
	handle("/", func(r *http.Request) (any, error) {
		return nil, refuse(api.CodeNoSuchRequest, "there is no %s %s", r.Method, r.URL.Path)
	})
	return mux
}

// PartsOf returns the number of parts that a request for a heat map asks for: parts=N, 1 to 512, without it 256.
func PartsOf(r *http.Request) (int, error) {
	q := r.URL.Query().Get("parts")
	if q == "" {
		return 256, nil
	}
	n, err := strconv.Atoi(q)
	if err != nil || n < 1 || n > maxParts {
		return 0, refuse(api.CodeBadRequest, "parts: must be 1 to %d", maxParts)
	}
	return n, nil
}

// reply writes an answer, or an error.
func reply(w http.ResponseWriter, answer any, err error) {
	status := http.StatusOK
	if err != nil {
		e := api.Error{Code: codeOf(err), Message: err.Error()}
		status, answer = e.Code.HTTPStatus(), api.ErrorReply{Error: e}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(answer)
}

// codeOf is the code of an error.
func codeOf(err error) api.Code {
	var coded *api.Error
	var notEmpty *image.NotEmptyError
	switch {
	case errors.As(err, &coded):
		return coded.Code
	case errors.As(err, &notEmpty):
		return api.CodeNotEmpty
	case errors.Is(err, store.ErrOriginTooSmall):
		return api.CodeOriginTooSmall
	case errors.Is(err, merge.ErrUnfinished):
		return api.CodeUnfinished
	}
	return api.CodeFailed
}

// readBody reads a request's body into v: one JSON object without unknown fields.
func readBody(r *http.Request, v any) error {
	body, err := io.ReadAll(r.Body)
	if err == nil && !utf8.Valid(body) {
		err = errors.New("not UTF-8") // what could not be decoded would be another path or name
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err == nil {
		err = d.Decode(v)
	}
	if err == nil {
		if _, err = d.Token(); err == io.EOF {
			return nil
		}
		err = errors.New("more than one object")
	}
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return refuse(api.CodeTooLarge, "the body is longer than %d bytes", maxBody)
	}
	return refuse(api.CodeBadRequest, "body: %v", err)
}

func (s *Server) postMerge(r *http.Request) (any, error) {
	var q api.MergeRequest
	if err := readBody(r, &q); err != nil {
		return nil, err
	}
	if _, err := s.StartMerge(q.Name); err != nil {
		return nil, err
	}
	return s.getMerge(r)
}

// getMerge replies at once, or, with ?wait=SECONDS, when the merge has ended or failed or that time is over.
func (s *Server) getMerge(r *http.Request) (any, error) {
	wait := uint64(0)
	if text := r.URL.Query().Get("wait"); text != "" {
		var err error
		if wait, err = strconv.ParseUint(text, 10, 16); err != nil || wait > maxWait {
			return nil, refuse(api.CodeBadRequest, "wait: %q is not a number of seconds up to %d", text, maxWait)
		}
	}
	return s.Merge(r.Context(), time.Duration(wait)*time.Second)
}
