package server

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/server/api"
)

// beside is a second COW file, with a store, of the same origin.
func (p pair) beside(t *testing.T) pair {
	t.Helper()
	p.cow = filepath.Join(p.dir, "beside.cow")
	if _, err := cowfile.Create(p.origin, p.cow, cowfile.Options{}); err != nil {
		t.Fatal(err)
	}
	return p
}

// Several servers use one base that is not exported; its file may be read-only.
func TestManyServersOnOneBase(t *testing.T) {
	p := newPair(t)
	q := p.beside(t)
	if err := os.Chmod(p.origin, 0o444); err != nil {
		t.Fatal(err)
	}
	a, b := p.open(t, Options{}), q.open(t, Options{})
	for _, s := range []*Server{a, b} {
		dev, err := s.Device("disk")
		if err != nil {
			t.Fatal(err)
		}
		writeAt(t, dev, "own", 5000)
		if err := dev.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Origin().WriteAt([]byte("x"), 0); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("a write to a base that is not exported: %v", err)
		}
	}
	if _, err := block.Open(p.origin, block.Options{}); err == nil {
		t.Error("a writer was let in beside servers that read the base")
	}
	if err := a.ExportOrigin(); !errors.Is(err, block.ErrInUse) {
		t.Errorf("an export of the base that another server reads: %v", err)
	}
	if got, err := os.ReadFile(p.origin); err != nil || !bytes.Equal(got, p.content) {
		t.Errorf("the base changed (%v)", err)
	}
}

// A merge needs the base for itself. A refused one changes nothing, and goes when the others have gone.
func TestMergeIsRefusedWhileOthersReadTheBase(t *testing.T) {
	p := newPair(t)
	q := p.beside(t)
	a, b := p.open(t, Options{}), q.open(t, Options{})
	dev, err := a.Device("disk")
	if err != nil {
		t.Fatal(err)
	}
	writeAt(t, dev, "merged", 5000)
	if _, err := a.StartMerge("disk"); !errors.Is(err, block.ErrInUse) || !strings.Contains(err.Error(), p.origin) {
		t.Fatalf("a merge into a base that another server reads: %v", err)
	}
	if !a.file.ReadOnly() {
		t.Error("the base is open for writing after the refusal")
	}
	writeAt(t, dev, "MERGED", 5000) // the snapshot goes on
	if st, err := a.Snapshot("disk"); err != nil || st.State != api.StateOK {
		t.Errorf("%+v, %v", st, err)
	}
	third, err := Open(p.origin, Options{}) // readers are let in as before
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Server{third, b} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.StartMerge("disk"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(p.origin, Options{}); !errors.Is(err, block.ErrInUse) {
		t.Errorf("a reader beside a merge: %v", err)
	}
	if m, err := a.Merge(t.Context(), 1e10); err != nil || m.State != api.MergeDone {
		t.Errorf("%+v, %v", m, err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	copy(p.content[5000:], "MERGED")
	if got, err := os.ReadFile(p.origin); err != nil || !bytes.Equal(got, p.content) {
		t.Errorf("another content than was merged (%v)", err)
	}
}

// A merge that the engine refuses leaves the base as it was used before.
func TestRefusedMergeLeavesTheBaseReadOnly(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{})
	if _, err := s.Attach(api.AttachRequest{Name: "n", COW: filepath.Join(p.dir, "scratch"), Create: true, Store: "N"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.StartMerge("n"); err == nil {
		t.Fatal("a transient snapshot was merged")
	}
	other, err := Open(p.origin, Options{})
	if err != nil {
		t.Fatalf("after the refusal: %v", err)
	}
	other.Close()
}
