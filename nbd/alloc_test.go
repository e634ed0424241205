//go:build !race

package nbd_test

import (
	"io"
	"runtime"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A quick request costs no allocation. (What is counted is the process's, over many requests. The race detector makes
// sync.Pool forget things on purpose.)
func TestRequestsDontAllocate(t *testing.T) {
	const requests, length = 2000, 4096
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.MemoryFrom(blocktest.Pattern(1<<20, 1))})
	for _, structured := range []bool{false, true} {
		p := begin(t, uri("x"), structured)
		read := wire.Request{Magic: wire.MagicRequest, Command: wire.CmdRead, Length: length}.Append(nil)
		write := append(wire.Request{Magic: wire.MagicRequest, Command: wire.CmdWrite, Length: length}.Append(nil), blocktest.Pattern(length, 2)...)
		head := wire.SimpleSize
		if structured {
			head = wire.ChunkSize + 8
		}
		in := make([]byte, head+length)
		round := func() {
			p.nc.Write(read)
			io.ReadFull(p.nc, in)
			p.nc.Write(write)
			io.ReadFull(p.nc, in[:wire.SimpleSize])
		}
		round()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range requests / 2 {
			round()
		}
		runtime.ReadMemStats(&after)
		if n := after.Mallocs - before.Mallocs; n > requests/10 {
			t.Errorf("%d requests made %d allocations (structured: %v)", requests, n, structured)
		}
	}
}
