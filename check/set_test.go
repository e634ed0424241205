package check

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestSetModel adds numbers of all sizes, dense and scattered, and compares with a sorted list.
func TestSetModel(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var s set
	have := map[uint64]bool{}
	for _, base := range []uint64{0, 1<<segmentBits - 300, 1<<flatBits - 300, 1 << 40, 1<<55 - 300, math.MaxUint64 - 5000} {
		for range 3000 {
			n := base + r.Uint64N(4500)
			if s.add(n) == have[n] {
				t.Fatalf("%d is new: %v", n, have[n])
			}
			have[n] = true
		}
	}
	for range 300 { // scattered, and whole words
		n := r.Uint64() >> r.UintN(64) &^ 63
		for i := range uint64(64) {
			s.add(n + i)
			have[n+i] = true
		}
	}
	want := make([]uint64, 0, len(have))
	for n := range have {
		want = append(want, n)
	}
	slices.Sort(want)
	var got []uint64
	for run := range s.all() {
		for i := range run.count {
			got = append(got, run.first+i)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d numbers, want %d", len(got), len(want))
	}
}
