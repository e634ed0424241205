package nbd

import (
	"math"
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// TestRangesOfRequests: whatever offset of 64 bits and length a client sends, a request is accepted only if its range is
// inside the export, in numbers of any size.
func TestRangesOfRequests(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 0))
	commands := []wire.Command{wire.CmdRead, wire.CmdWrite, wire.CmdTrim, wire.CmdWriteZeroes, wire.CmdBlockStatus, wire.CmdCache}
	accepted := 0
	for _, size := range []int64{0, 512, 1 << 40, 1 << 62, math.MaxInt64 - 511, math.MaxInt64} {
		c := &conn{structured: true, contexts: make([]metaContext, 1), export: &export{Export: Export{Device: block.NewMemory(size), CanTrim: true}}}
		for range 20000 {
			near := []uint64{0, uint64(size), 1 << 31, 1 << 32, 1 << 63, math.MaxUint64}
			q := wire.Request{Command: commands[r.IntN(len(commands))], Offset: near[r.IntN(len(near))] + r.Uint64N(1<<14) - 1<<13}
			q.Length = []uint32{0, 1, 512, 1 << 20, math.MaxUint32, uint32(uint64(size) - q.Offset), uint32(uint64(size)-q.Offset) + 1}[r.IntN(7)]
			end := new(big.Int).Add(new(big.Int).SetUint64(q.Offset), big.NewInt(int64(q.Length)))
			inside := end.Cmp(big.NewInt(size)) <= 0
			errno, why := c.validate(q)
			if errno == 0 && !inside || errno != 0 && inside && q.Length > 0 && q.Length <= wire.MaxPayload {
				t.Fatalf("%+v of %d bytes: %v %q", q, size, errno, why)
			}
			if errno == 0 {
				accepted++
			}
		}
	}
	if accepted < 1000 {
		t.Errorf("only %d were accepted", accepted)
	}
}
