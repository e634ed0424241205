package nbd

import (
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// TestBudgetLeavesAShare: whatever many connections to a few exports take and keep, the first one to another export
// gets a payload of a mebibyte, and the sum stays within the total. So does one more connection to the same export,
// beside as many as would once have taken everything.
func TestBudgetLeavesAShare(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		b := &budget{total: 1 << 30}
		classes := make([]class, 1+rnd.IntN(3))
		for range 100 {
			a := &account{class: &classes[rnd.IntN(len(classes))]}
			for range 2 {
				n := int64(wire.MaxPayload)
				if rnd.IntN(4) == 0 {
					n = smallPayload + 1 + rnd.Int64N(wire.MaxPayload-smallPayload)
				}
				if b.fits(n, a) {
					b.move(n, a)
				}
			}
		}
		if b.used > b.total {
			t.Fatalf("seed %d: %d of %d bytes are used", seed, b.used, b.total)
		}
		if !b.fits(1<<20, &account{class: new(class)}) {
			t.Errorf("seed %d: no space for a mebibyte; %d bytes of %d used", seed, b.used, b.total)
		}
		if b.used < b.total/4 {
			t.Errorf("seed %d: only %d bytes of %d can be used", seed, b.used, b.total)
		}
	}
	b, c := &budget{total: 1 << 30}, new(class)
	for range 18 {
		a := &account{class: c}
		for range 2 {
			if b.fits(wire.MaxPayload, a) {
				b.move(wire.MaxPayload, a)
			}
		}
	}
	if !b.fits(1<<20, &account{class: c}) {
		t.Errorf("no space for a mebibyte beside 18 connections; %d bytes used", b.used)
	}
}
