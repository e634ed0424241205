package block_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// TestWriteLastPassesAFailedFlush: the last write is made whatever failed before, and the failure stays.
func TestWriteLastPassesAFailedFlush(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	f := create(t, path, 8192)
	f.Synced(func() error { return syscall.EIO })
	if err := block.WriteLast(f, []byte("mark"), 4096); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got[4096:4100], []byte("mark")) {
		t.Errorf("the file has %q, %v", got[4096:4100], err)
	}
	if err := f.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush after it: %v", err)
	}
	var outside *block.RangeError
	if err := block.WriteLast(f, []byte("mark"), 8190); !errors.As(err, &outside) {
		t.Errorf("past the end: %v", err)
	}
}

// TestWriteLastOnFaulty: each of its two operations can fail; an earlier failed flush alone does not fail it.
func TestWriteLastOnFaulty(t *testing.T) {
	memory := block.NewMemory(4096)
	f := blocktest.NewFaulty(memory, blocktest.FailNth(1, syscall.EIO))
	if err := f.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	var log blocktest.Log
	dev := log.Record("", f)
	if err := block.WriteLast(dev, []byte("mark"), 0); err != nil {
		t.Fatal(err)
	}
	if got := string(memory.Bytes()[:4]); got != "mark" {
		t.Errorf("the device has %q", got)
	}
	for _, kind := range []blocktest.Kind{blocktest.Write, blocktest.Flush} {
		f.Set(blocktest.FailKind(kind, syscall.ENOSPC))
		if err := block.WriteLast(dev, []byte("more"), 0); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("with a failing %v: %v", kind, err)
		}
	}
}
