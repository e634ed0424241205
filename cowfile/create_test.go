package cowfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// TestCreateUnsynced: the file is complete, sparse and locked, and what the store keeps after its first Sync is there.
func TestCreateUnsynced(t *testing.T) {
	const size = 1 << 30
	path := filepath.Join(t.TempDir(), "a.cow")
	f, st, err := cowfile.CreateUnsynced(path, size, cowfile.Options{ChunkSectors: 16, Format: "qcow2"})
	if err != nil {
		t.Fatal(err)
	}
	l := ondisk.Layout{ChunkSectors: 16}
	if full, err := cowfile.FullSize(l, size); err != nil || f.Size() != full {
		t.Errorf("%d bytes, want %d, %v", f.Size(), full, err)
	}
	if info, err := os.Stat(path); err != nil || info.Sys().(*syscall.Stat_t).Blocks > 256 {
		t.Errorf("%v, or more than 128 KiB are allocated", err)
	}
	if _, err := cowfile.OpenDevice(path, block.Options{}); !errors.Is(err, block.ErrInUse) {
		t.Errorf("a second open: %v", err)
	}
	r, err := st.Reserve(7, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Commit(), st.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := cowfile.CreateUnsynced(path, size, cowfile.Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	dev, err := cowfile.OpenDevice(path, block.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	again, err := store.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	if again.Layout() != l || again.Len() != 1 || again.OriginFormat() != "qcow2" {
		t.Errorf("%+v, %d exceptions, format %s", again.Layout(), again.Len(), again.OriginFormat())
	}
}

// TestCreateUnsyncedRefused: no file is left.
func TestCreateUnsyncedRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.cow")
	for name, o := range map[string]cowfile.Options{
		"chunk size": {ChunkSectors: 3},
		"size":       {Size: 4096},
	} {
		if _, _, err := cowfile.CreateUnsynced(path, 1<<20, o); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: a file is left: %v", name, err)
		}
	}
}
