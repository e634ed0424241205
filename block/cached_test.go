package block_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// cachedFile is a file whose bytes are in the page cache. The test is skipped where the machine can't read such files together.
func cachedFile(t *testing.T, n int64) (*block.File, []byte) {
	path := filepath.Join(t.TempDir(), "disk")
	content := blocktest.Pattern(int(n), 3)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.Open(path, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if block.ReadCached(f, cachedReads(2, 512)) == 0 {
		t.Skip("no asynchronous I/O, or a file system without RWF_NOWAIT")
	}
	return f, content
}

func cachedReads(n int, each int64) []block.Read {
	reads := make([]block.Read, n)
	for i := range reads {
		reads[i] = block.Read{P: make([]byte, each), Off: int64(i) * each}
	}
	return reads
}

// All reads of what is in the page cache are done, also more than a queue has, and by many at once.
func TestReadCachedDoesAll(t *testing.T) {
	f, content := cachedFile(t, 1<<20)
	var all sync.WaitGroup
	for range 16 { // more than there are queues
		all.Go(func() {
			for range 5 {
				reads := cachedReads(256, 4096)
				done := block.ReadCached(f, reads)
				if done != 0 && done != len(reads) {
					t.Errorf("%d of %d", done, len(reads))
				}
				for _, r := range reads {
					if r.Done && !bytes.Equal(r.P, content[r.Off:][:4096]) {
						t.Errorf("other bytes at %d", r.Off)
					}
				}
			}
		})
	}
	all.Wait()
	if n := block.ReadCached(f, cachedReads(256, 4096)); n != 256 {
		t.Errorf("%d of 256 with nobody else", n)
	}
}

// What a file has lost is left to ReadAt, which has the error. Nothing is read of a closed file.
func TestReadCachedOfTruncatedFile(t *testing.T) {
	f, _ := cachedFile(t, 1<<20)
	if err := os.Truncate(f.Path(), 8192+100); err != nil {
		t.Fatal(err)
	}
	reads := cachedReads(8, 4096)
	if n := block.ReadCached(f, reads); n != 2 || !reads[0].Done || !reads[1].Done {
		t.Errorf("%d done, want the first two", n)
	}
	if err := block.ReadAll(f, reads); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ReadAll: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if n := block.ReadCached(f, cachedReads(2, 512)); n != 0 {
		t.Errorf("%d reads of a closed file", n)
	}
}

// Bytes that have to come from the disk are not waited for.
func TestReadCachedLeavesTheDisk(t *testing.T) {
	f, content := cachedFile(t, 8<<20)
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := block.DropCache(f, 0, f.Size()); err != nil {
		t.Fatal(err)
	}
	reads := []block.Read{{P: make([]byte, 4096), Off: 1 << 20}, {P: make([]byte, 4096), Off: 5 << 20}}
	if n := block.ReadCached(f, reads); n == 2 {
		t.Skip("the file system keeps everything in memory")
	}
	if err := block.ReadAll(f, reads); err != nil {
		t.Fatal(err)
	}
	for _, r := range reads {
		if !bytes.Equal(r.P, content[r.Off:][:4096]) {
			t.Errorf("other bytes at %d", r.Off)
		}
	}
}
