package chunkmap

import (
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

// TestUnderlay: what a map has stays, what it lacks is added, whatever forms the pages have.
func TestUnderlay(t *testing.T) {
	forms := map[int]bool{}
	for seed := range uint64(24) {
		r := rand.New(rand.NewPCG(seed, 11))
		homes := []uint64{0, 1 << 33, 1<<homeBits - 1000, 1 << 45}[seed%4]
		chunks, n, longest := uint64(1+r.IntN(6000)), 1+r.IntN(4000), 1+r.Uint64N(16)
		if seed%8 == 3 { // pages of many runs
			chunks, n, longest = 1500, 3000, 1
		}
		result := newPair(t)
		for range 1 + r.IntN(4) {
			lower := newPair(t)
			for range n - r.IntN(n/2+1) {
				old := r.Uint64N(chunks)
				if r.IntN(4) == 0 {
					old = r.Uint64()
				}
				new := ondisk.COWChunk(homes + r.Uint64N(1<<20))
				for i := range 1 + r.Uint64N(longest) {
					lower.insert(ondisk.OriginChunk(old+i), new+ondisk.COWChunk(i))
				}
			}
			if r.IntN(3) == 0 {
				result.Run(0, 1<<60) // from now on the order of the pages is kept
			}
			result.Underlay(lower.All())
			for old, new := range lower.model {
				if _, there := result.model[old]; !there {
					result.model[old] = new
				}
			}
		}
		for i := range result.shards {
			for _, p := range result.shards[i].dir.slots {
				forms[p.form()] = true
				if len(p.words) < cap(p.words) {
					t.Fatalf("a page of form %d has space for %d words, and %d", p.form(), cap(p.words), len(p.words))
				}
			}
		}
		result.check(r)
		for range 200 { // and can be changed
			result.insert(ondisk.OriginChunk(r.Uint64N(chunks)), ondisk.COWChunk(r.Uint64N(1<<20)))
			result.delete(ondisk.OriginChunk(r.Uint64N(chunks)))
		}
		result.check(r)
	}
	if len(forms) != 5 {
		t.Errorf("of the forms of pages only %v were made", forms)
	}
}
