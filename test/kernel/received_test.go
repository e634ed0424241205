package kernel_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/stream"
)

// TestReceivedStores: the kernel loads a store that was made of a stream over a copy of the base, shows what the sender's snapshot
// shows, and takes writes and a merge as dmsnap does. The chunks of the two stores have different sizes.
func TestReceivedStores(t *testing.T) {
	need(t)
	for _, chunk := range []int64{1, 8, 128} {
		t.Run(fmt.Sprintf("c=%d", chunk), func(t *testing.T) {
			s := script{originSectors: 4096 + chunk/2, snaps: []snapConf{{store: "P", chunk: chunk, cowSectors: 8192}}}
			s.snaps[0].length = s.originSectors
			base := block.MemoryFrom(s.before().disk)
			delta, want := deltaOver(t, base)
			r, err := stream.NewReader(delta)
			if err != nil {
				t.Fatal(err)
			}
			cow := block.NewMemory(s.snaps[0].cowSectors * block.SectorSize)
			if _, err := r.ApplyOver(t.Context(), base, cow, uint32(chunk), stream.ApplyOptions{}); err != nil {
				t.Fatal(err)
			}
			k := newKernel(t, sharedMachine(t))
			b := images{disk: base.Bytes(), cows: [][]byte{cow.Bytes()}}
			newTheirs(k, s, &b)
			if got := k.get("snap0", 0, base.Size()); !bytes.Equal(got, want) {
				t.Errorf("the kernel shows other content, from byte %d on", firstDifference(got, want))
			}
			k.clear()
			handedOver(t, k, s, b)
		})
	}
}

// writtenOver writes to a snapshot of base, and returns its store with what the snapshot shows.
func writtenOver(t *testing.T, base *block.Memory, chunk uint32) (st *store.Store, want []byte) {
	t.Helper()
	cow := block.NewMemory(8 << 20)
	snap, err := snapshot.NewOrigin(base).Attach(cow, snapshot.Options{ChunkSectors: chunk})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(60) {
		p := blocktest.Pattern(int(512*(1+i%9)), uint64(i))
		if i%7 == 0 {
			clear(p)
		}
		if _, err := snap.WriteAt(p, i*61%4000*512); err != nil {
			t.Fatal(err)
		}
	}
	want = make([]byte, base.Size())
	if _, err := snap.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err = store.OpenToRead(cow); err != nil {
		t.Fatal(err)
	}
	return st, want
}

// deltaOver is writtenOver with the stream of the store.
func deltaOver(t *testing.T, base *block.Memory) (delta *bytes.Buffer, want []byte) {
	t.Helper()
	st, want := writtenOver(t, base, 16)
	from, err := stream.Between(base, nil, st)
	if err != nil {
		t.Fatal(err)
	}
	delta = new(bytes.Buffer)
	if _, err := stream.Send(t.Context(), delta, from, stream.SendOptions{}); err != nil {
		t.Fatal(err)
	}
	return delta, want
}
