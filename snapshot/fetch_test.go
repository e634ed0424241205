package snapshot_test

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/scratch"
	"github.com/dmsnap/dmsnap/snapshot"
)

// TestFetchOfALargeChunk: a small write over an origin that is fetched reads its chunk first, which may have 1 GiB, in pieces.
func TestFetchOfALargeChunk(t *testing.T) {
	const chunk = 8 << 20
	var log blocktest.Log
	origin := log.Record("O", block.NewMemory(2*chunk))
	cow := block.NewMemory(4 * chunk)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: chunk / 512, Fetched: true})
	if err != nil {
		t.Fatal(err)
	}
	log.Clear()
	if _, err := s.WriteAt(make([]byte, 512), chunk+512); err != nil {
		t.Fatal(err)
	}
	total := int64(0)
	for _, op := range log.Ops() {
		if op.Kind != blocktest.Read {
			continue
		}
		if total += op.Len; op.Len > scratch.Most {
			t.Errorf("a read of %d bytes", op.Len)
		}
	}
	if total < chunk {
		t.Errorf("%d bytes of the origin were read", total)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := check.Run(t.Context(), cow, check.Options{Origin: origin}); err != nil || !r.Clean() {
		t.Errorf("%+v, %v", r, err)
	}
}
