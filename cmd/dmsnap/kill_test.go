package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A killWriter writes numbers to sectors of its own until the server is killed, and knows which may be there
// afterwards.
type killWriter struct {
	uri     string
	sectors []int64
	durable map[int64]uint64   // at the last flush that returned
	later   map[int64][]uint64 // written since, acknowledged or not
	next    uint64
	acked   int
}

func sectorOf(n uint64) []byte {
	b := make([]byte, 512)
	for i := 0; i < 512; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], n)
	}
	return b
}

// run writes until the connection ends.
func (w *killWriter) run(t *testing.T, r *rand.Rand) {
	c, err := nbd.Dial(t.Context(), w.uri)
	if err != nil {
		return // killed before it was ready
	}
	defer c.Close()
	for {
		at := w.sectors[r.IntN(len(w.sectors))]
		w.next++
		w.later[at] = append(w.later[at], w.next)
		if r.IntN(8) == 0 {
			err = c.WriteDurableAt(sectorOf(w.next), at*512)
			if err == nil {
				w.durable[at], w.later[at] = w.next, nil
			}
		} else {
			_, err = c.WriteAt(sectorOf(w.next), at*512)
		}
		if err != nil {
			return
		}
		w.acked++
		if r.IntN(30) == 0 {
			if c.Flush() != nil {
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
func (w *killWriter) settle(dev block.Device) error {
	b := make([]byte, 512)
	for _, at := range w.sectors {
		if _, err := dev.ReadAt(b, at*512); err != nil {
			return err
		}
		n := binary.LittleEndian.Uint64(b)
		ok := n == w.durable[at]
		for _, l := range w.later[at] {
			ok = ok || n == l
		}
		if !ok || !bytes.Equal(b, sectorOf(n)) {
			return fmt.Errorf("sector %d holds write %d; flushed was %d, written since %v", at, n, w.durable[at], w.later[at])
		}
		w.durable[at] = n
	}
	clear(w.later)
	return nil
}

// TestKillLoop kills a server that two clients of the snapshot and two of the origin keep busy, again and again,
// and looks at what is on disk each time: every flushed write is there, and the snapshot shows nothing of what
// was written to the origin. DMSNAP_DEEP=1 makes it hundreds of times.
func TestKillLoop(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	rounds := 6
	if os.Getenv("DMSNAP_DEEP") != "" {
		rounds = 400
	}
	const sectors = 8192
	p := newPair(t)
	writeFile(t, p.origin, make([]byte, sectors*512))
	mustRun(t, "create", p.origin, p.cow, "--chunk-size", "2KiB")
	socket := filepath.Join(p.dir, "kill.sock")
	var ws []*killWriter
	for i := range 4 {
		name := []string{"disk", "origin"}[i%2]
		w := &killWriter{uri: "nbd+unix:///" + name + "?socket=" + socket, durable: map[int64]uint64{}, later: map[int64][]uint64{}, next: uint64(i) << 32}
		for at := int64(i); at < sectors; at += 4 { // neighbours of all four share chunks
			w.sectors = append(w.sectors, at)
		}
		ws = append(ws, w)
	}
	r := rand.New(rand.NewPCG(7, 7))
	acked := 0
	for round := range rounds {
		mode := []string{"flush", "always"}[round%2]
		s := launch(t, "serve", p.origin, p.cow, "--export-origin", "--socket", socket, "--sync", mode)
		for range 2 {
			if _, err := s.stdout.ReadString('\n'); err != nil {
				t.Fatalf("%v: %s", err, &s.stderr)
			}
		}
		var load sync.WaitGroup
		for i, w := range ws {
			seed := rand.New(rand.NewPCG(uint64(round), uint64(i)))
			load.Go(func() { w.run(t, seed) })
		}
		time.Sleep(time.Duration(r.IntN(150)) * time.Millisecond) // a moment is what this test is about
		s.Process.Kill()
		if status := s.end(t); status != -1 {
			t.Fatalf("it ended by itself, with %d: %s", status, &s.stderr)
		}
		load.Wait()
		lookAtKilled(t, p, ws, round)
		acked = 0
		for _, w := range ws {
			acked += w.acked
		}
	}
	if acked < rounds { // on a busy machine a kill may come before the first write
		t.Errorf("only %d writes in %d rounds", acked, rounds)
	}
	t.Logf("%d kills, %d writes acknowledged", rounds, acked)
	// What is left is a store like any other.
	mustRun(t, "merge", p.origin, p.cow)
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions != 0 || !st.Valid {
		t.Errorf("merged: %+v", st)
	}
}

func lookAtKilled(t *testing.T, p pair, ws []*killWriter, round int) {
	t.Helper()
	origin, cow := openFile(t, p.origin, true), openFile(t, p.cow, true)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatalf("round %d: %v", round, err)
	}
	for i, w := range ws {
		dev := block.Device(snap)
		if strings.Contains(w.uri, "/origin?") {
			dev = origin
		}
		if err := w.settle(dev); err != nil {
			t.Fatalf("round %d, writer %d: %v", round, i, err)
		}
		if dev != origin {
			continue
		}
		// The snapshot shows these sectors as they were when it was made.
		b := make([]byte, 512)
		for _, at := range w.sectors {
			if _, err := snap.ReadAt(b, at*512); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b, make([]byte, 512)) {
				t.Fatalf("round %d: the snapshot shows an origin write in sector %d", round, at)
			}
		}
	}
	for _, err := range []error{snap.Close(), cow.Close(), origin.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
}
