package snapshot_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// overFiles is a snapshot whose devices are files in the page cache, with every other chunk in the COW at a random place.
func overFiles(t *testing.T, n int64) (*snapshot.Origin, *snapshot.Snapshot) {
	open := func(name string, content []byte) *block.File {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := block.Open(path, block.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	o := snapshot.NewOrigin(open("origin", blocktest.Pattern(int(n), 1)))
	s, err := o.Attach(open("cow", make([]byte, 2*n)), snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, at := range rand.New(rand.NewPCG(1, 2)).Perm(int(n / 8192)) {
		if _, err := s.WriteAt(blocktest.Pattern(4096, uint64(at)), int64(at)*8192); err != nil {
			t.Fatal(err)
		}
	}
	return o, s
}

func TestSuiteOverFiles(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		_, s := overFiles(t, 1<<20)
		return s
	})
}

// Reads together show the snapshot while the origin is overwritten: each finds the origin's old bytes or the exception.
func TestReadsTogetherBesideOriginWrites(t *testing.T) {
	const n = 1 << 20
	o, s := overFiles(t, n)
	want := make([]byte, n)
	if _, err := s.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for _, at := range rand.New(rand.NewPCG(3, 4)).Perm(n / 4096) {
			if _, err := o.WriteAt(bytes.Repeat([]byte{0xee}, 4096), int64(at)*4096); err != nil {
				t.Error(err)
			}
		}
	})
	for w := range uint64(3) {
		all.Go(func() {
			r := rand.New(rand.NewPCG(5, w))
			for range 100 {
				reads := make([]block.Read, 32)
				for i := range reads {
					reads[i] = block.Read{P: make([]byte, 1+r.IntN(16<<10)), Off: r.Int64N(n - 16<<10)}
				}
				block.ReadCached(s, reads)
				if err := block.ReadAll(s, reads); err != nil {
					t.Error(err)
				}
				for _, x := range reads {
					if !bytes.Equal(x.P, want[x.Off:][:len(x.P)]) {
						t.Errorf("%d bytes at %d: other bytes than before the writes", len(x.P), x.Off)
						return
					}
				}
			}
		})
	}
	all.Wait()
}
