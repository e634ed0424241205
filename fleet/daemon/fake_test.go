package daemon

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/server/api"
)

// A fakeFleet is a tree without devices: for what a daemon does itself.
type fakeFleet struct {
	mu       sync.Mutex
	elements []api.Element
	policy   map[string]string
	space    fleet.Space
	dropped  []string
	events   chan api.Event
}

func newFakeFleet() *fakeFleet {
	return &fakeFleet{events: make(chan api.Event, 10), elements: []api.Element{
		{Name: "base", Kind: api.KindDisk, Disk: "base", SizeBytes: 1 << 20, State: api.ElementOK},
		{Name: "a@n", Kind: api.KindCheckpoint, Parent: "base", Disk: "base", Children: 1, Sealed: true, State: api.ElementOK, Figures: &api.Figures{State: api.StateOK}},
		{Name: "a", Kind: api.KindNode, Parent: "a@n", Disk: "base", URI: "nbd://a", State: api.ElementOK, Created: time.Unix(1, 0), Figures: &api.Figures{}, Counters: &api.Counters{}},
	}}
}

func (f *fakeFleet) disk(name string) api.Disk {
	return api.Disk{Name: name, Source: "/disk", Format: "raw", State: api.ElementOK, Policy: f.policy, Merge: &api.TreeMerge{Node: "a", Disk: name, State: api.MergeDone}}
}

func (f *fakeFleet) AddDisk(_ context.Context, q api.AddDiskRequest) (api.Disk, error) {
	return f.disk(q.Name), nil
}
func (f *fakeFleet) SetSpace(_ string, s fleet.Space)         { f.space = s }
func (f *fakeFleet) RemoveDisk(context.Context, string) error { return nil }
func (f *fakeFleet) Disk(name string) (api.Disk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if name != "base" {
		return api.Disk{}, refuse(api.CodeNoSuchDisk, "no disk")
	}
	return f.disk(name), nil
}
func (f *fakeFleet) Disks() api.Disks {
	f.mu.Lock()
	defer f.mu.Unlock()
	return api.Disks{Disks: []api.Disk{f.disk("base")}}
}
func (f *fakeFleet) SetPolicy(_ context.Context, q api.PolicyRequest) (api.Disk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.policy = q.Set
	return f.disk(q.Disk), nil
}
func (f *fakeFleet) Fork(_ context.Context, q api.ForkRequest) (api.Element, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := api.Element{Name: q.Name, Kind: api.KindNode, Parent: q.From, Disk: "base", State: api.ElementOK}
	f.elements = append(f.elements, e)
	return e, nil
}
func (f *fakeFleet) Checkpoint(_ context.Context, q api.CheckpointRequest) (api.Checkpoints, error) {
	return api.Checkpoints{Checkpoints: []api.Element{{Name: q.Nodes[0] + "@" + q.Name, Kind: api.KindCheckpoint}}}, nil
}
func (f *fakeFleet) Rollback(_ context.Context, q api.RollbackRequest) (api.Element, error) {
	return f.Element(q.Node)
}
func (f *fakeFleet) Squash(_ context.Context, q api.SquashRequest) (api.Element, error) {
	return f.Element(q.Node)
}
func (f *fakeFleet) Drop(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dropped = append(f.dropped, name)
	return nil
}
func (f *fakeFleet) Forget(ctx context.Context, name string) error { return f.Drop(ctx, name) }
func (f *fakeFleet) PauseMerge(_ context.Context, node string) (api.TreeMerge, error) {
	return api.TreeMerge{Node: node}, nil
}
func (f *fakeFleet) ResumeMerge(ctx context.Context, node string) (api.TreeMerge, error) {
	return f.PauseMerge(ctx, node)
}
func (f *fakeFleet) TakeBackMerge(_ context.Context, node string) (api.Disk, error) {
	return f.Disk("base")
}

func (f *fakeFleet) Merge(_ context.Context, node string) (api.TreeMerge, error) {
	return api.TreeMerge{Node: node}, nil
}
func (f *fakeFleet) Adopt(_ context.Context, q api.AdoptRequest) (api.Element, error) {
	return api.Element{Name: q.Node, Kind: api.KindNode, File: q.COW}, nil
}
func (f *fakeFleet) Version() fleet.Version { return fleet.Version{} }
func (f *fakeFleet) Tree() api.Tree {
	f.mu.Lock()
	defer f.mu.Unlock()
	return api.Tree{Elements: slices.Clone(f.elements)}
}
func (f *fakeFleet) Element(name string) (api.Element, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.elements {
		if e.Name == name {
			return e, nil
		}
	}
	return api.Element{}, refuse(api.CodeNoSuchElement, "there is no %q", name)
}
func (f *fakeFleet) Table(string) (api.Table, error) {
	return api.Table{Devices: []api.TableDevice{{Name: "a", Table: "0 1 linear"}}, Files: []api.TableFile{{Placeholder: "@1", File: "/f"}}}, nil
}
func (f *fakeFleet) Layers(string) (api.Layers, error) {
	return api.Layers{Disk: "base", Layers: []api.Layer{{Name: "base", URI: "nbd://x/base@~0", SizeBytes: 4096, Source: "/f"}}}, nil
}
func (f *fakeFleet) Seal(context.Context, string) (api.Layers, error) { return f.Layers("") }
func (f *fakeFleet) Subscribe(context.Context) <-chan api.Event       { return f.events }
func (f *fakeFleet) Start(ctx context.Context, l net.Listener, _ ...net.Listener) (wait func() error) {
	return func() error { <-ctx.Done(); return l.Close() }
}

// fakeServer serves a daemon over a fake with the rights that a test chooses.
type fakeServer struct {
	fleet  *fakeFleet
	daemon *Daemon
	file   string // in an allowed directory
	rights Rights
	url    string
}

func newFakeServer(t *testing.T) *fakeServer {
	t.Helper()
	dir := t.TempDir()
	s := &fakeServer{fleet: newFakeFleet(), file: filepath.Join(dir, "disk.img"), rights: RightAdmin}
	if err := os.WriteFile(s.file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.daemon, err = New(s.fleet, Options{Dir: dir, URIs: []string{"nbd://x"}, AllowPaths: []string{dir}}); err != nil {
		t.Fatal(err)
	}
	h := s.daemon.Handler()
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(WithRights(r.Context(), s.rights)))
	}))
	t.Cleanup(hs.Close)
	s.url = hs.URL
	return s
}

// do makes a request.
func (s *fakeServer) do(t *testing.T, method, path, body string) (status int, reply []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	got, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Body.Close()
	b, err := io.ReadAll(got.Body)
	if err != nil {
		t.Fatal(err)
	}
	return got.StatusCode, bytes.TrimSpace(b)
}

// tlsState is that of a connection whose client has a certificate.
func tlsState(c *x509.Certificate) *tls.ConnectionState {
	return &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}}
}

func (f *fakeFleet) HeatMap(name string, parts int) (api.HeatMap, error) {
	if _, err := f.Element(name); err != nil {
		return api.HeatMap{}, err
	}
	return api.HeatMap{Name: name, Stored: make([]float64, parts), Writes: make([]uint32, parts)}, nil
}
