package compact_test

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/snapshot"
)

// blocks4k is a device of 4 KiB blocks.
type blocks4k struct{ block.Forward }

func (blocks4k) BlockSize() int { return 4096 }

// A store of chunks that are smaller than the blocks of the devices it was copied to can be compacted, in chunks of its
// own size or of one that the devices can have: it is only read. A new size that they can't have is refused.
func TestReadsLargerBlocks(t *testing.T) {
	origin, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.WriteAt([]byte("data"), 4097); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	from, beside := blocks4k{block.NewForward(cow)}, blocks4k{block.NewForward(origin)}
	for _, sectors := range []uint32{0, 1, 8, 64, 2} {
		p, err := compact.NewPlan(t.Context(), from, compact.Options{Origin: beside, ChunkSectors: sectors})
		if (err == nil) != (sectors != 2) {
			t.Errorf("%d sectors a chunk: %v", sectors, err)
		}
		if err != nil {
			continue
		}
		out := block.NewMemory(p.Size())
		if _, err := p.Write(t.Context(), out); err != nil {
			t.Errorf("%d sectors a chunk: %v", sectors, err)
		}
		if r, err := check.Run(t.Context(), out, check.Options{}); err != nil || len(r.Findings) > 0 {
			t.Errorf("%d sectors a chunk: check: %+v, %v", sectors, r, err)
		}
	}
}
