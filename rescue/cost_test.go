package rescue_test

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/store"
)

// A sparse disk of 16 TiB is rescued by reading what has data, once, also where exceptions are doubtful and lost: the
// time depends on the runs of the store and the data, and on neither the size of the disk nor the square of anything.
func TestCostOfSparseDisk(t *testing.T) {
	const size, chunk, count = 16 << 40, 4096, 2000
	const apart = size / chunk / count // chunks, so that each exception is far from the next
	origin, cow := block.NewMemory(size), block.NewMemory(64<<20)
	st, err := store.Create(cow, ondisk.Layout{ChunkSectors: chunk / sector}, false)
	if err != nil {
		t.Fatal(err)
	}
	data := blocktest.Pattern(chunk, 1)
	for i := range uint64(count) {
		r, err := st.Reserve(ondisk.OriginChunk(i*apart), 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cow.WriteAt(data, st.Layout().COWOffset(r.New)); err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := origin.WriteAt(data, 5*chunk); err != nil {
		t.Fatal(err)
	}
	change := func(index uint64, e ondisk.Exception) {
		t.Helper()
		var b [ondisk.SlotSize]byte
		e.Encode(b[:])
		if _, err := cow.WriteAt(b[:], st.Layout().SlotOffset(ondisk.Slot{Index: index})); err != nil {
			t.Fatal(err)
		}
	}
	change(7, ondisk.Exception{Old: 0, New: st.Layout().DataChunk(7)})         // origin chunk 0 twice: doubtful
	change(9, ondisk.Exception{Old: 9 * apart, New: ondisk.COWChunk(1 << 40)}) // lost

	var log blocktest.Log
	r, err := rescue.Open(t.Context(), log.Record("origin", origin), log.Record("COW", cow), rescue.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if sum := rescue.Totals(r.Plan()); sum[rescue.Lost] != chunk || sum[rescue.Doubtful] != chunk {
		t.Errorf("planned: %v bytes of each class", sum)
	}
	log.Clear()
	out := block.NewMemory(size)
	ranges, err := r.Write(t.Context(), out, nil)
	if err != nil {
		t.Fatal(err)
	}
	reads, bytes := 0, int64(0)
	for _, op := range log.Ops() {
		reads, bytes = reads+1, bytes+op.Len
	}
	if reads > count+10 || bytes > (count+2)*chunk+1<<20 {
		t.Errorf("%d reads of %d bytes for %d chunks of data", reads, bytes, count+1)
	}
	if len(ranges) > 10 || out.Allocated() > (count+2)*chunk {
		t.Errorf("%d ranges, %d bytes written", len(ranges), out.Allocated())
	}
}
