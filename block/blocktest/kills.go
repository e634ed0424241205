package blocktest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// Kills is a server of an origin and of a snapshot of it that [RunKills] kills again and again. The origin has sectors of zeros when it
// begins.
type Kills struct {
	Rounds  int
	Sectors int64

	// Start starts the server of a round and returns when clients may connect. kill kills it and waits until it is gone.
	Start func(t *testing.T, round int) (kill func())

	// Connect opens the origin or the snapshot as a client. An error means that the server is gone.
	Connect func(origin bool) (dev block.Device, disconnect func(), err error)

	// Look opens what a killed server has left.
	Look func(t *testing.T) (origin, snapshot block.Device, done func())
}

// RunKills keeps a server busy by two clients of the snapshot and two of the origin, kills it, and looks at what is left, round after
// round: every flushed write is there, and the snapshot shows nothing of what was written to the origin.
func RunKills(t *testing.T, k Kills) {
	t.Helper()
	var list []*stamper
	for i := range int64(4) {
		w := &stamper{origin: i%2 == 1, durable: map[int64]uint64{}, later: map[int64][]uint64{}, next: uint64(i) << 32}
		for at := i; at < k.Sectors; at += 4 { // neighbours of all four share chunks
			w.sectors = append(w.sectors, at)
		}
		list = append(list, w)
	}
	r := rand.New(rand.NewPCG(7, 7))
	for round := range k.Rounds {
		kill := k.Start(t, round)
		var load sync.WaitGroup
		for i, w := range list {
			seed := rand.New(rand.NewPCG(uint64(round), uint64(i)))
			load.Go(func() {
				if dev, disconnect, err := k.Connect(w.origin); err == nil {
					w.run(dev, seed)
					disconnect()
				}
			})
		}
		time.Sleep(time.Duration(r.IntN(150)) * time.Millisecond) // a moment is what this test is about
		kill()
		load.Wait()
		k.look(t, list, round)
	}
	acked := 0
	for _, w := range list {
		acked += w.acked
	}
	if acked < k.Rounds { // on a busy machine a kill may come before the first write
		t.Errorf("only %d writes in %d rounds", acked, k.Rounds)
	}
	t.Logf("%d kills, %d writes acknowledged", k.Rounds, acked)
}

// look checks what is left after a round.
func (k Kills) look(t *testing.T, list []*stamper, round int) {
	t.Helper()
	origin, snapshot, done := k.Look(t)
	defer done()
	zeros, b := make([]byte, block.SectorSize), make([]byte, block.SectorSize)
	for i, w := range list {
		dev := snapshot
		if w.origin {
			dev = origin
		}
		if err := w.settle(dev); err != nil {
			t.Fatalf("round %d, writer %d: %v", round, i, err)
		}
		if !w.origin {
			continue
		}
		// The snapshot shows these sectors as they were when it was made.
		for _, at := range w.sectors {
			if _, err := snapshot.ReadAt(b, at*block.SectorSize); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b, zeros) {
				t.Fatalf("round %d: the snapshot shows an origin write in sector %d", round, at)
			}
		}
	}
}

// A stamper writes numbers to sectors of its own until the server is killed, and knows which may be there afterwards.
type stamper struct {
	origin  bool
	sectors []int64
	durable map[int64]uint64   // at the last flush that returned
	later   map[int64][]uint64 // written since, acknowledged or not
	next    uint64
	acked   int
}

// stamp is a sector full of a number.
func stamp(n uint64) []byte {
	b := make([]byte, block.SectorSize)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], n)
	}
	return b
}

// run writes until there is an error.
func (w *stamper) run(dev block.Device, r *rand.Rand) {
	for {
		at := w.sectors[r.IntN(len(w.sectors))]
		w.next++
		w.later[at] = append(w.later[at], w.next)
		var err error
		if r.IntN(8) == 0 {
			if err = block.WriteDurable(dev, stamp(w.next), at*block.SectorSize); err == nil {
				w.durable[at], w.later[at] = w.next, nil
			}
		} else {
			_, err = dev.WriteAt(stamp(w.next), at*block.SectorSize)
		}
		if err != nil {
			return
		}
		w.acked++
		if r.IntN(30) == 0 {
			if dev.Flush() != nil {
				return
			}
			for at, l := range w.later {
				if len(l) > 0 {
					w.durable[at] = l[len(l)-1]
				}
			}
			clear(w.later)
		}
	}
}

// settle compares what a device holds with what it may, and takes it over.
func (w *stamper) settle(dev block.Device) error {
	b := make([]byte, block.SectorSize)
	for _, at := range w.sectors {
		if _, err := dev.ReadAt(b, at*block.SectorSize); err != nil {
			return err
		}
		n := binary.LittleEndian.Uint64(b)
		ok := n == w.durable[at]
		for _, l := range w.later[at] {
			ok = ok || n == l
		}
		if !ok || !bytes.Equal(b, stamp(n)) {
			return fmt.Errorf("sector %d holds write %d; flushed was %d, written since %v", at, n, w.durable[at], w.later[at])
		}
		w.durable[at] = n
	}
	clear(w.later)
	return nil
}
