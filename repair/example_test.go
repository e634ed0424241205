package repair_test

import (
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A slot that names a metadata chunk is dropped, and the valid exception before it is kept.
func Example() {
	origin, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	vm1, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := vm1.WriteAt([]byte("kept"), 0); err != nil {
		log.Fatal(err)
	}
	if err := vm1.Close(); err != nil {
		log.Fatal(err)
	}
	layout, err := ondisk.NewLayout(8)
	if err != nil {
		log.Fatal(err)
	}
	var slot [ondisk.SlotSize]byte
	ondisk.Exception{Old: 7, New: 1}.Encode(slot[:]) // chunk 1 is an area
	if _, err := cow.WriteAt(slot[:], layout.SlotOffset(ondisk.Slot{Index: 1})); err != nil {
		log.Fatal(err)
	}

	plan, err := repair.NewPlan(context.Background(), cow, repair.Options{})
	if err != nil {
		log.Fatal(err)
	}
	for _, r := range plan.Lost() {
		fmt.Println("lost:", r.Off, r.Length, r.Code)
	}
	repaired := block.NewMemory(plan.Size())
	if err := plan.Fresh(context.Background(), repaired); err != nil {
		log.Fatal(err)
	}
	st, err := store.Open(repaired)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("kept:", st.Len(), "exception")
	// Output:
	// lost: 28672 4096 DS017
	// kept: 1 exception
}
