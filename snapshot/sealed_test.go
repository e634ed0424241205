package snapshot_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A sealed layer is attached on a device for reading only, and nothing changes it.
func TestSealedLayerIsNotAttachedForWriting(t *testing.T) {
	origin := block.NewMemory(1 << 20)
	path := filepath.Join(t.TempDir(), "sealed.cow")
	if err := os.WriteFile(path, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(readOnly bool) *block.File {
		t.Helper()
		f, err := block.Open(path, block.Options{ReadOnly: readOnly})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := open(false)
	s, err := snapshot.NewOrigin(origin).Attach(f, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.WriteAt([]byte("kept"), 4096); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(f)
	if err == nil {
		err = errors.Join(st.Seal(), f.Flush(), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f = open(false)
	if _, err := snapshot.NewOrigin(origin).Attach(f, snapshot.Options{}); !errors.Is(err, ondisk.ErrSealed) {
		t.Errorf("attached for writing: %v", err)
	}
	f.Close()
	f = open(true)
	if s, err = snapshot.NewOrigin(origin).Attach(f, snapshot.Options{}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := s.ReadAt(got, 4096); err != nil || string(got) != "kept" {
		t.Errorf("%q, %v", got, err)
	}
	if err := errors.Join(s.Close(), f.Close()); err != nil {
		t.Error(err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the file changed (%v)", err)
	}
}
