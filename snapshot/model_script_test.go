package snapshot_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/snapshot"
)

// A scriptOp is one operation. Which device it means is decided when it runs, from what there is then, so that
// any part of a script is a script.
type scriptOp struct {
	kind string
	pick int   // which snapshot, modulo how many there are
	at   int64 // sectors, modulo what there is
	n    int64
	x    byte
	opts snapshot.Options
	cow  int64 // sectors
}

func (o scriptOp) String() string {
	switch o.kind {
	case "write", "zero", "fua", "discard", "suspended":
		return fmt.Sprintf("%-12s %d sectors %d+%d x=%d", o.kind, o.pick, o.at, o.n, o.x)
	case "origin write", "origin zero", "origin fua":
		return fmt.Sprintf("%-12s sectors %d+%d x=%d", o.kind, o.at, o.n, o.x)
	case "attach":
		return fmt.Sprintf("%-12s cow=%d %s", o.kind, o.cow, optionsText(o.opts))
	case "reopen", "back", "hand over", "load merge":
		return fmt.Sprintf("%-12s %d %s", o.kind, o.pick, optionsText(o.opts))
	case "grow":
		return fmt.Sprintf("%-12s %d by %d", o.kind, o.pick, o.cow)
	}
	return fmt.Sprintf("%-12s %d", o.kind, o.pick)
}

func optionsText(o snapshot.Options) string {
	s := fmt.Sprintf("%v chunk=%d sync=%d", o.Store, o.ChunkSectors, o.Sync)
	if o.DiscardZeroesCOW {
		s += fmt.Sprintf(" zeroes passdown=%v", o.DiscardPassdownOrigin)
	}
	if o.Size > 0 {
		s += fmt.Sprintf(" size=%d", o.Size/sector)
	}
	if o.OnFull != 0 {
		s += " fail-full"
	}
	if o.Grow.Step > 0 {
		s += fmt.Sprintf(" grow=%d..%d", o.Grow.Step/sector, o.Grow.Max/sector)
	}
	return s
}

// frequencies of the kinds of operation.
var kinds = []struct {
	kind   string
	weight int
}{
	{"write", 30}, {"zero", 5}, {"fua", 4}, {"flush", 5}, {"discard", 8},
	{"origin write", 28}, {"origin zero", 4}, {"origin fua", 3}, {"origin flush", 1}, {"suspended", 2},
	{"attach", 5}, {"drop", 1}, {"away", 4}, {"back", 5}, {"reopen", 4}, {"grow", 3}, {"hand over", 3},
	{"begin merge", 4}, {"load merge", 2}, {"step", 16}, {"end merge", 2},
}

// newScript makes a world's size and its operations from a seed.
func newScript(seed uint64) (sectors int64, ops []scriptOp) {
	r := rand.New(rand.NewPCG(seed, 1))
	sectors = 20 + r.Int64N(400)
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	for length := 40 + r.IntN(120); len(ops) < length; {
		w := r.IntN(total)
		i := 0
		for ; w >= kinds[i].weight; i++ {
			w -= kinds[i].weight
		}
		op := scriptOp{kind: kinds[i].kind, pick: r.IntN(12), at: r.Int64N(sectors), n: 1 + r.Int64N(1<<r.IntN(8)), x: byte(1 + r.IntN(255)),
			opts: randomOptions(r, sectors)}
		op.cow = randomCOW(r, int64(op.opts.ChunkSectors))
		if len(ops) == 0 {
			op.kind = "attach"
		}
		switch r.IntN(4) {
		case 0: // whole chunks of all sizes
			op.at, op.n = op.at/64*64, (op.n+63)/64*64
		case 1: // up to the end
			op.at = max(0, sectors-op.n)
		}
		ops = append(ops, op)
	}
	return sectors, ops
}

func randomOptions(r *rand.Rand, sectors int64) snapshot.Options {
	o := snapshot.Options{ChunkSectors: 1 << r.IntN(7), Store: snapshot.StoreType(r.IntN(3)), Sync: snapshot.SyncMode(r.IntN(2))}
	o.DiscardZeroesCOW = r.IntN(2) == 0
	o.DiscardPassdownOrigin = o.DiscardZeroesCOW && r.IntN(4) == 0
	if r.IntN(5) == 0 {
		o.Size = (1 + r.Int64N(sectors)) * sector
	}
	if r.IntN(4) == 0 {
		o.OnFull = snapshot.FullFail
	}
	if r.IntN(5) == 0 {
		o.Grow.Step = (1 + r.Int64N(64)) * sector
		o.Grow.Max = r.Int64N(2) * (200 + r.Int64N(400)) * sector
	}
	return o
}

// randomCOW is the size of a COW device, in sectors: large, or soon full, at an edge of a chunk or not.
func randomCOW(r *rand.Rand, chunk int64) int64 {
	switch r.IntN(4) {
	case 0:
		return chunk * (2 + r.Int64N(40))
	case 1:
		return 2*chunk + r.Int64N(300)
	}
	return 4096
}

// shrink leaves out operations as long as the script still fails.
func shrink(sectors int64, ops []scriptOp) []scriptOp {
	for size := len(ops) / 2; size > 0; {
		shorter := false
		for i := 0; i+size <= len(ops); {
			rest := append(append([]scriptOp(nil), ops[:i]...), ops[i+size:]...)
			if _, err := runScript(sectors, rest); err != nil {
				ops, shorter = rest, true
			} else {
				i += size
			}
		}
		if size > 1 || !shorter {
			size /= 2
		}
	}
	return ops
}

// scriptText has a line for each operation.
func scriptText(ops []scriptOp) string {
	var lines strings.Builder
	for i, op := range ops {
		fmt.Fprintf(&lines, "  %2d %v\n", i, op)
	}
	return lines.String()
}

// seeds returns the seeds to run: the one that was asked for, or n; many times as many in a thorough run.
func seeds(t *testing.T, n int) []uint64 {
	t.Helper()
	if text := os.Getenv("DMSNAP_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{seed}
	}
	if deep {
		n *= 200
	}
	list := make([]uint64, n)
	for i := range list {
		list[i] = uint64(i + 1)
	}
	return list
}
