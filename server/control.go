package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
	"github.com/dmsnap/dmsnap/store"
)

// The control API: HTTP with JSON on a unix socket, described in docs/api.md.

const dropTimeout = 10 * time.Second

// Handler returns the control API, for servers of HTTP other than the one that Start runs.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, api.MaxBody)
			answer, err := f(r)
			api.WriteReply(w, answer, err, codeOf)
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return s.Status(), nil })
	handle("GET /v1/tree", func(*http.Request) (any, error) { return s.Tree(), nil })
	handle("GET /v1/heat/{name}", func(r *http.Request) (any, error) {
		parts, err := figures.Parts(r)
		if err != nil {
			return nil, err
		}
		return s.HeatMap(r.PathValue("name"), parts)
	})
	handle("GET /v1/snapshots/{name}", func(r *http.Request) (any, error) { return s.Snapshot(r.PathValue("name")) })
	handle("POST /v1/snapshots", func(r *http.Request) (any, error) {
		var q api.AttachRequest
		if err := api.ReadBody(r, &q); err != nil {
			return nil, err
		}
		st, err := s.Attach(q)
		if err == nil {
			s.logOperation(st.Name, "attach", "attached", nil)
		}
		return st, err
	})
	handle("POST /v1/snapshots/{name}/grow", func(r *http.Request) (any, error) {
		var q api.GrowRequest
		if err := api.ReadBody(r, &q); err != nil {
			return nil, err
		}
		st, err := s.Grow(r.PathValue("name"), q.Size)
		if err == nil {
			s.logOperation(st.Name, "grow", fmt.Sprintf("grown to %d bytes", q.Size), nil)
		}
		return st, err
	})
	handle("DELETE /v1/snapshots/{name}", func(r *http.Request) (any, error) {
		// A drop is not left half done when the client disconnects.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), dropTimeout)
		defer cancel()
		err := s.Drop(ctx, r.PathValue("name"))
		if err == nil {
			s.logOperation(r.PathValue("name"), "drop", "dropped", nil)
		}
		return struct{}{}, err
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

func (s *Server) postMerge(r *http.Request) (any, error) {
	var q api.MergeRequest
	if err := api.ReadBody(r, &q); err != nil {
		return nil, err
	}
	if _, err := s.StartMerge(q.Name); err != nil {
		return nil, err
	}
	return s.getMerge(r)
}

// getMerge replies at once, or, with ?wait=SECONDS, when the merge has ended or failed or that time is over.
func (s *Server) getMerge(r *http.Request) (any, error) {
	const most = uint64(api.MaxWait / time.Second)
	wait := uint64(0)
	if text := r.URL.Query().Get("wait"); text != "" {
		var err error
		if wait, err = strconv.ParseUint(text, 10, 16); err != nil || wait > most {
			return nil, refuse(api.CodeBadRequest, "wait: %q is not a number of seconds up to %d", text, most)
		}
	}
	return s.Merge(r.Context(), time.Duration(wait)*time.Second)
}
