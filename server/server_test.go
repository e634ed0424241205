package server

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// pair is an origin of 1 MiB and a COW file with an empty store, in a directory of their own.
type pair struct {
	dir, origin, cow string
	content          []byte // of the origin
}

func newPair(t testing.TB) pair {
	t.Helper()
	dir := testhost.ShortDir(t)
	p := pair{dir, filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow"), bytes.Repeat([]byte("origin, "), 128<<10)}
	if err := os.WriteFile(p.origin, p.content, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := cowfile.Create(p.origin, p.cow, cowfile.Options{}); err != nil {
		t.Fatal(err)
	}
	return p
}

// open opens a server with the pair's snapshot "disk". At the end of the test it is closed, and the store checked.
func (p pair) open(t testing.TB, o Options) *Server {
	t.Helper()
	o.Log = func(line string) { t.Log(line) }
	s, err := Open(p.origin, o)
	if err != nil {
		t.Fatal(err)
	}
	closed := sync.OnceFunc(func() {
		if err := s.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		p.check(t)
	})
	t.Cleanup(closed)
	if _, err := s.Attach(api.AttachRequest{Name: "disk", COW: p.cow}); err != nil {
		t.Fatal(err)
	}
	return s
}

// check checks the store.
func (p pair) check(t testing.TB) {
	t.Helper()
	cow, err := block.Open(p.cow, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		t.Fatal(err)
	}
	defer cow.Close()
	r, err := check.Run(context.Background(), cow, check.Options{})
	if err != nil || r.Worst() >= check.Error {
		t.Errorf("the store: %v, %+v", err, r)
	}
}

// exceptions is how many exceptions are on disk.
func (p pair) exceptions(t *testing.T) uint64 {
	t.Helper()
	cow, err := block.Open(p.cow, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		t.Fatal(err)
	}
	defer cow.Close()
	st, err := store.Open(cow)
	if err != nil {
		t.Fatal(err)
	}
	return st.Len()
}

func writeAt(t *testing.T, d block.Device, p string, off int64) {
	t.Helper()
	if _, err := d.WriteAt([]byte(p), off); err != nil {
		t.Fatal(err)
	}
}

// What was written and not flushed is on disk after the timer's flush and after Close.
func TestUnflushedWritesBecomeDurable(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{})
	dev, err := s.Device("disk")
	if err != nil {
		t.Fatal(err)
	}
	writeAt(t, dev, "one", 0)
	if n := p.exceptions(t); n != 0 {
		t.Fatalf("%d exceptions on disk before any flush", n)
	}
	s.flushDirty()
	if n := p.exceptions(t); n != 1 {
		t.Errorf("%d exceptions on disk after the timer's flush, want 1", n)
	}
	writeAt(t, dev, "two", 100_000)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := p.exceptions(t); n != 2 {
		t.Errorf("%d exceptions on disk after Close, want 2", n)
	}
}

// The policy for full COW devices that was not chosen depends on the store.
func TestFullPolicyDefaults(t *testing.T) {
	for _, c := range []struct {
		policy FullPolicy
		store  string
		want   api.State // after a write without space
	}{
		{"", "P", api.StateOK},
		{"", "PO", api.StateOverflow},
		{FullFail, "PO", api.StateOK},
		{FullInvalidate, "P", api.StateInvalid},
	} {
		p := newPair(t)
		small := filepath.Join(p.dir, "small.cow")
		if _, err := cowfile.Create(p.origin, small, cowfile.Options{Size: 12 << 10}); err != nil {
			t.Fatal(err)
		}
		s := p.open(t, Options{OnFull: c.policy})
		if _, err := s.Attach(api.AttachRequest{Name: "small", COW: small, Store: c.store}); err != nil {
			t.Fatal(err)
		}
		dev, _ := s.Device("small")
		writeAt(t, dev, "fits", 0)
		dev.WriteAt([]byte("does not"), 40_000)
		if st, err := s.Snapshot("small"); err != nil || st.State != c.want {
			t.Errorf("policy %q, store %s: %+v, %v, want %s", c.policy, c.store, st, err, c.want)
		}
	}
	if _, err := Open("disk.img", Options{OnFull: "explode"}); err == nil {
		t.Error("a policy that does not exist was taken")
	}
}

// Errors that API clients distinguish have codes in process, too, and no words of the command line.
func TestErrorsHaveCodes(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{})
	code := func(_ any, err error) api.Code {
		var e *api.Error
		if !errors.As(err, &e) {
			return ""
		}
		if bytes.Contains([]byte(e.Message), []byte("--")) {
			t.Errorf("%q names a flag", e.Message)
		}
		return e.Code
	}
	for _, c := range []struct {
		got, want api.Code
	}{
		{code(s.Attach(api.AttachRequest{Name: "disk", COW: "x"})), api.CodeNameTaken},
		{code(s.Attach(api.AttachRequest{Name: "", COW: "x"})), api.CodeBadName},
		{code(s.Attach(api.AttachRequest{Name: "x"})), api.CodeBadRequest},
		{code(s.Attach(api.AttachRequest{Name: "x", COW: "x", ChunkSize: 1000})), api.CodeBadRequest},
		{code(s.Attach(api.AttachRequest{Name: "x", COW: "x", Store: "X"})), api.CodeBadRequest},
		{code(s.Device("x")), api.CodeNoSuchSnapshot},
		{code(s.Snapshot("x")), api.CodeNoSuchSnapshot},
		{code(s.Grow("x", 1)), api.CodeNoSuchSnapshot},
		{code(s.Grow("disk", 1)), api.CodeBadRequest},
		{code(nil, s.Drop(t.Context(), "x")), api.CodeNoSuchSnapshot},
		{code(s.StartMerge("x")), api.CodeNoSuchSnapshot},
		{code(s.PauseMerge()), api.CodeNoMerge},
		{code(s.Merge(t.Context(), 0)), api.CodeNoMerge},
	} {
		if c.got != c.want {
			t.Errorf("code %q, want %q", c.got, c.want)
		}
	}
}

var _ block.Device = (*switchDevice)(nil)

// The export "" is the first snapshot that was attached, and none after that was dropped.
func TestDefaultExportGoesOverToNobody(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{})
	if err := s.Drop(t.Context(), "disk"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(api.AttachRequest{Name: "again", COW: p.cow, Store: snapshot.Persistent.String()}); err != nil {
		t.Fatal(err)
	}
	if s.fallback != nil {
		t.Errorf("the export \"\" went over to %s", s.fallback.name)
	}
}
