package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/dmsnap/dmsnap/snapshot"
)

// The control API: HTTP with JSON on a unix socket, described in docs/api.md.

const (
	maxBody     = 64 << 10 // bytes of a request's body
	maxWait     = 60       // seconds that GET /v1/merge?wait=… waits
	dropTimeout = 10 * time.Second
)

// serveControl serves the API on l until ctx ends, and lets requests under way end then.
func (s *server) serveControl(ctx context.Context, l net.Listener) error {
	h := &http.Server{Handler: s.routes(), MaxHeaderBytes: 16 << 10, IdleTimeout: time.Minute,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: (maxWait + 30) * time.Second, // a long poll's reading goes on
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
		return err // ctx goes on: the listener failed
	}
	<-closed
	return closing
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			answer, err := f(r)
			reply(w, answer, err)
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return s.status(), nil })
	handle("GET /v1/snapshots/{name}", func(r *http.Request) (any, error) { return s.snapshotStatus(r.PathValue("name")) })
	handle("POST /v1/snapshots", s.postSnapshot)
	handle("POST /v1/snapshots/{name}/grow", s.postGrow)
	handle("DELETE /v1/snapshots/{name}", func(r *http.Request) (any, error) {
		// Half a drop helps nobody: it goes on when the client has gone.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), dropTimeout)
		defer cancel()
		return struct{}{}, s.drop(ctx, r.PathValue("name"))
	})
	handle("POST /v1/merge", s.postMerge)
	handle("GET /v1/merge", s.getMerge)
	handle("POST /v1/merge/pause", func(*http.Request) (any, error) { return s.tellMerge(func(m *liveMerged) { m.driver.Pause() }) })
	handle("POST /v1/merge/resume", func(*http.Request) (any, error) { return s.tellMerge(func(m *liveMerged) { m.driver.Resume() }) })
	handle("/", func(r *http.Request) (any, error) {
		return nil, refuse(http.StatusNotFound, "no_such_request", "there is no %s %s", r.Method, r.URL.Path)
	})
	return mux
}

// reply writes an answer, or an error.
func reply(w http.ResponseWriter, answer any, err error) {
	status := http.StatusOK
	if err != nil {
		r := &refusal{http.StatusUnprocessableEntity, "failed", err}
		errors.As(err, &r)
		status, answer = r.status, errorReply{errorText{r.code, err.Error()}}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(answer)
}

// errorReply is the body of every answer that is not a success.
type errorReply struct {
	Error errorText `json:"error"`
}

type errorText struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// readBody reads a request's body into v: one JSON object without unknown fields.
func readBody(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, err = d.Token(); err == io.EOF {
			return nil
		}
		err = errors.New("more than one object")
	}
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return refuse(http.StatusRequestEntityTooLarge, "too_large", "the body is longer than %d bytes", maxBody)
	}
	return refuse(http.StatusBadRequest, "bad_request", "body: %w", err)
}

// snapshotRequest is the body of POST /v1/snapshots.
type snapshotRequest struct {
	Name      string `json:"name"`
	COW       string `json:"cow"` // relative to the server's working folder
	Create    bool   `json:"create,omitempty"`
	Force     bool   `json:"force,omitempty"`      // overwrite what the COW device holds
	ChunkSize int64  `json:"chunk_size,omitempty"` // bytes, of a store that is made; 0: the default
	Store     string `json:"store,omitempty"`      // P, PO or N; "": P
}

func (s *server) postSnapshot(r *http.Request) (any, error) {
	var q snapshotRequest
	if err := readBody(r, &q); err != nil {
		return nil, err
	}
	a := attachment{name: q.Name, cow: q.COW, create: q.Create, force: q.Force, chunkSize: sizeFlag{q.ChunkSize, q.ChunkSize != 0}}
	if q.COW == "" {
		return nil, refuse(http.StatusBadRequest, "bad_request", "cow is needed")
	}
	kind := storeFlag{snapshot.Persistent}
	if q.Store != "" {
		if err := kind.Set(q.Store); err != nil {
			return nil, refuse(http.StatusBadRequest, "bad_request", "store: %w", err)
		}
	}
	a.store = kind.StoreType
	if _, err := a.chunkSize.chunkSectors(); err != nil {
		return nil, refuse(http.StatusBadRequest, "bad_request", "%w", err)
	}
	if err := s.attach(a); err != nil {
		return nil, err
	}
	return s.snapshotStatus(q.Name)
}

// growRequest is the body of POST /v1/snapshots/{name}/grow.
type growRequest struct {
	Size int64 `json:"size"` // bytes
}

func (s *server) postGrow(r *http.Request) (any, error) {
	var q growRequest
	if err := readBody(r, &q); err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	if err := s.grow(name, q.Size); err != nil {
		return nil, err
	}
	return s.snapshotStatus(name)
}

func (s *server) postMerge(r *http.Request) (any, error) {
	var q struct {
		Name string `json:"name"`
	}
	if err := readBody(r, &q); err != nil {
		return nil, err
	}
	if err := s.startMerge(q.Name); err != nil {
		return nil, err
	}
	return s.getMerge(r)
}

// getMerge answers at once, or, with ?wait=SECONDS, when the merge has ended or failed or that time is up.
func (s *server) getMerge(r *http.Request) (any, error) {
	m, err := s.currentMerge()
	if err != nil {
		return nil, err
	}
	if text := r.URL.Query().Get("wait"); text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n > maxWait {
			return nil, refuse(http.StatusBadRequest, "bad_request", "wait: %q is not a number of seconds up to %d", text, maxWait)
		}
		ctx, cancel := context.WithTimeout(r.Context(), time.Duration(n)*time.Second)
		defer cancel()
		m.wait(ctx)
	}
	return m.status(), nil
}

func (s *server) tellMerge(do func(*liveMerged)) (any, error) {
	m, err := s.currentMerge()
	if err != nil {
		return nil, err
	}
	do(m)
	return m.status(), nil
}
