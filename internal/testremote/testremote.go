// Package testremote has servers for tests of remote disks: a registry in memory, files with entity tags, and faults between a server and
// its clients.
package testremote

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A Registry is an OCI registry in memory, as far as disks need one.
type Registry struct {
	mu        sync.Mutex
	blobs     map[string][]byte // by digest
	manifests map[string][]byte // by repository and reference
	Gets      atomic.Int64      // of blobs, answered
	User      string            // that must be named, with Password; empty: nobody
	Password  string
}

// NewRegistry returns an empty registry.
func NewRegistry() *Registry {
	return &Registry{blobs: map[string][]byte{}, manifests: map[string][]byte{}}
}

func digestOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// Start serves a handler on a loopback port until the test ends, and returns HOST:PORT.
func Start(t testing.TB, h http.Handler) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = nil
	s.Start()
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return strings.TrimPrefix(s.URL, "http://")
}

func (g *Registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if user, password, _ := r.BasicAuth(); g.User != "" && (user != g.User || password != g.Password) {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	path := strings.TrimPrefix(r.URL.Path, "/v2/")
	for _, part := range []struct {
		name  string
		serve func(w http.ResponseWriter, r *http.Request, repository, rest string)
	}{{"/blobs/uploads/", g.upload}, {"/blobs/", g.blob}, {"/manifests/", g.manifest}} {
		if i := strings.LastIndex(path, part.name); i >= 0 {
			part.serve(w, r, path[:i], path[i+len(part.name):])
			return
		}
	}
	w.WriteHeader(http.StatusOK)
}

func (g *Registry) upload(w http.ResponseWriter, r *http.Request, repository, _ string) {
	body, _ := io.ReadAll(r.Body)
	g.mu.Lock()
	defer g.mu.Unlock()
	digest := r.URL.Query().Get("digest")
	mount := r.URL.Query().Get("mount")
	switch {
	case r.Method == http.MethodPost && g.blobs[mount] != nil:
		w.WriteHeader(http.StatusCreated)
	case r.Method == http.MethodPost:
		w.Header().Set("Location", "/v2/"+repository+"/blobs/uploads/1")
		w.WriteHeader(http.StatusAccepted)
	case digest != digestOf(body):
		w.WriteHeader(http.StatusBadRequest)
	default:
		g.blobs[digest] = body
		w.WriteHeader(http.StatusCreated)
	}
}

func (g *Registry) blob(w http.ResponseWriter, r *http.Request, _, digest string) {
	g.mu.Lock()
	b := g.blobs[digest]
	g.mu.Unlock()
	if b == nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if r.Method == http.MethodGet {
		g.Gets.Add(1)
	}
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

func (g *Registry) manifest(w http.ResponseWriter, r *http.Request, repository, reference string) {
	body, _ := io.ReadAll(r.Body)
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.Method == http.MethodPut {
		g.manifests[repository+" "+reference] = body
		g.manifests[repository+" "+digestOf(body)] = body
		w.WriteHeader(http.StatusCreated)
		return
	}
	b := g.manifests[repository+" "+reference]
	if b == nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	w.Header().Set("Docker-Content-Digest", digestOf(b))
	w.Header().Set("Content-Length", fmt.Sprint(len(b)))
	if r.Method == http.MethodGet {
		w.Write(b)
	}
}

// A File is a file with an entity tag, which may be replaced.
type File struct {
	mu      sync.Mutex
	tag     string
	content []byte
	Gets    atomic.Int64
}

// Set replaces the file.
func (f *File) Set(tag string, content []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tag, f.content = tag, content
}

func (f *File) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	tag, content := f.tag, f.content
	f.mu.Unlock()
	f.Gets.Add(1)
	if tag != "" {
		w.Header().Set("ETag", tag)
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}

// A Fault is what happens to an answer on its way.
type Fault string

// The faults.
const (
	Cut      Fault = "cut"      // it ends in the middle
	Stall    Fault = "stall"    // nothing comes after its middle
	Hang     Fault = "hang"     // nothing comes at all
	Busy     Fault = "busy"     // 503 instead
	Wrong    Fault = "wrong"    // a bit of it is another
	Whole    Fault = "whole"    // the whole file instead of a range
	Shifted  Fault = "shifted"  // the right range, of other bytes
	Redirect Fault = "redirect" // first, to the same place with a secret in its query
)

// Faults is a handler in front of another one, which faults at random. It may be changed while it serves.
type Faults struct {
	Next http.Handler

	mu   sync.Mutex
	kind Fault
	odds float64
	rand *rand.Rand
	done int
}

// Done returns how many answers were faulty.
func (f *Faults) Done() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.done
}

// Set makes answers fault with these odds.
func (f *Faults) Set(kind Fault, odds float64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kind, f.odds = kind, odds
	if f.rand == nil {
		f.rand = rand.New(rand.NewPCG(7, uint64(len(kind))))
	}
}

func (f *Faults) next() Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rand == nil || f.rand.Float64() >= f.odds {
		return ""
	}
	if f.kind != "" {
		f.done++
	}
	return f.kind
}

func (f *Faults) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind := f.next()
	switch kind {
	case "":
		f.Next.ServeHTTP(w, r)
		return
	case Busy:
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	case Hang:
		<-r.Context().Done()
		return
	case Whole:
		r.Header.Del("Range")
		f.Next.ServeHTTP(w, r)
		return
	case Redirect:
		if r.URL.Query().Get("signature") == "" {
			http.Redirect(w, r, r.URL.Path+"?signature=s3cr3t", http.StatusTemporaryRedirect)
			return
		}
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	answer := httptest.NewRecorder()
	f.Next.ServeHTTP(answer, r)
	for name, values := range answer.Header() {
		w.Header()[name] = values
	}
	body := answer.Body.Bytes()
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	w.WriteHeader(answer.Code)
	switch half := body[:len(body)/2]; kind {
	case Cut, Stall:
		w.Write(half)
		w.(http.Flusher).Flush()
		if kind == Stall {
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	case Wrong:
		if len(body) > 0 {
			body[len(half)] ^= 0x10
		}
	case Shifted:
		if len(body) > 1 {
			body = append(body[1:], body[0])
		}
	}
	w.Write(body)
}
