package nbd_test

import (
	"sync/atomic"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// TestStatusOfOneExtentIsCheap: with REQ_ONE the device is asked a few times, also where each of its answers is short
// and has the flags of the one before. The client gets one descriptor, and goes on behind it.
func TestStatusOfOneExtentIsCheap(t *testing.T) {
	const size, unit = 1 << 20, 512
	var asked atomic.Int64
	alike := func(off, n int64) ([]block.Extent, error) {
		asked.Add(1)
		return []block.Extent{{Length: min(unit, n), Flags: 1}}, nil
	}
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(size), Contexts: map[string]nbd.ContextFunc{"x:alike": alike}})
	p := begin(t, uri("x"), true, "x:alike")
	p.request(wire.CmdBlockStatus, wire.FlagReqOne, 1, 0, size)
	_, ds, err := wire.DecodeBlockStatus(p.chunk(1, wire.ChunkDone, wire.ChunkBlockStatus))
	if err != nil || len(ds) != 1 || ds[0].Flags != 1 || ds[0].Length < unit || ds[0].Length > size {
		t.Errorf("descriptors %v, %v", ds, err)
	}
	if n := asked.Load(); n > 8 {
		t.Errorf("the device was asked %d times for one extent", n)
	}
}
