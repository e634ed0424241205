package server

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// TestTree follows the tree and the heat map of an observed server through writes, a second snapshot, a merge and a drop.
func TestTree(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{Observe: true})
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	c := p.dial(t, s, "disk")
	if _, err := c.WriteAt([]byte("written by a client"), 8192); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	tree := s.Tree()
	if tree.Server != api.ServerOfOne || len(tree.Elements) != 2 {
		t.Fatalf("%+v", tree)
	}
	disk, v := tree.Elements[0], tree.Elements[1]
	if disk.Name != "origin" || disk.Kind != api.KindDisk || disk.Disk != "origin" || disk.State != api.ElementOK || disk.SizeBytes != int64(len(p.content)) ||
		disk.Activity == nil || disk.Activity.Writes.Count != 0 || disk.Figures != nil {
		t.Errorf("disk %+v", disk)
	}
	if v.Name != "disk" || v.Kind != api.KindNode || v.Parent != "origin" || v.Connections != 1 || v.Figures.Exceptions != 1 ||
		v.Activity == nil || v.Activity.Writes.Count != 1 || v.Activity.WrittenBytes != 19 || v.Activity.Flushes.Count != 1 {
		t.Errorf("snapshot %+v, activity %+v", v, v.Activity)
	}
	parts := len(p.content) / 4096
	h, err := s.HeatMap("disk", parts)
	if err != nil || len(h.Stored) != parts || h.Stored[2] != 1 || h.Stored[0] != 0 || h.Writes[2] != 1 || h.Writes[0] != 0 {
		t.Errorf("%+v, %v", h, err)
	}
	if h, err := s.HeatMap("origin", parts); err != nil || slices.Max(h.Stored) != 0 || len(h.Writes) != parts {
		t.Errorf("of the origin: %+v, %v", h, err)
	}
	if _, err := s.HeatMap("nothing", 4); err == nil {
		t.Error("a heat map of nothing")
	}
	// A refused export leaves what is observed.
	if err := s.ExportOrigin(); err == nil {
		t.Error("the origin was exported twice")
	}
	if s.Tree().Elements[0].Activity == nil {
		t.Error("the origin is not observed after a refused export")
	}
	if _, err := s.StartMerge("disk"); err != nil {
		t.Fatal(err)
	}
	for s.Status().Merge.State == api.MergeRunning {
		time.Sleep(time.Millisecond)
	}
	v = s.Tree().Elements[1]
	if v.Merge == nil || v.Merge.State != api.MergeDone || v.Merge.Node != "disk" || v.Activity.Writes.Count != 1 {
		t.Errorf("after the merge %+v", v)
	}
	if err := s.Drop(ctx, "disk"); err != nil {
		t.Fatal(err)
	}
	if tree := s.Tree(); len(tree.Elements) != 1 || s.observedDevice("disk") != nil {
		t.Errorf("after the drop %+v", tree)
	}
}

// A server that does not observe has no activity, and a map without writes.
func TestTreeWithoutObservation(t *testing.T) {
	s := newPair(t).open(t, Options{})
	if v := s.Tree().Elements[1]; v.Activity != nil || v.Figures == nil {
		t.Errorf("%+v", v)
	}
	if h, err := s.HeatMap("disk", 4); err != nil || h.Writes != nil || len(h.Stored) != 4 {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestHeatOverHTTP(t *testing.T) {
	s := newPair(t).open(t, Options{Observe: true})
	for path, want := range map[string]int{"/v1/tree": 200, "/v1/heat/disk": 200, "/v1/heat/disk?parts=512": 200,
		"/v1/heat/disk?parts=513": 400, "/v1/heat/disk?parts=0": 400, "/v1/heat/disk?parts=x": 400, "/v1/heat/other": 404} {
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != want {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
}

// dial connects a client to an export.
func (p pair) dial(t *testing.T, s *Server, export string) *nbd.Client {
	t.Helper()
	ours, theirs := net.Pipe()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.nbd.ServeConn(ctx, theirs) }()
	c, err := nbd.NewClient(ctx, ours, export)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); stop(); <-done })
	return c
}
