package store_test

import (
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// An exception is added in four steps: reserve a COW chunk, write its data, commit, sync. A View reads the result.
func Example() {
	origin, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	layout, err := ondisk.NewLayout(8) // chunks of 8 sectors, 4 KiB
	if err != nil {
		log.Fatal(err)
	}
	st, err := store.Create(cow, layout, false)
	if err != nil {
		log.Fatal(err)
	}

	r, err := st.Reserve(5, 1) // space for origin chunk 5
	if err != nil {
		log.Fatal(err)
	}
	data := make([]byte, layout.ChunkBytes())
	copy(data, "chunk 5 of the snapshot")
	if _, err := cow.WriteAt(data, layout.COWOffset(r.New)); err != nil {
		log.Fatal(err)
	}
	if err := r.Commit(); err != nil {
		log.Fatal(err)
	}
	if err := st.Sync(); err != nil {
		log.Fatal(err)
	}

	again, err := store.Open(cow)
	if err != nil {
		log.Fatal(err)
	}
	view, err := store.NewView(origin, again)
	if err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 7)
	if _, err := view.ReadAt(p, 5*layout.ChunkBytes()); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d exception\n", p, again.Len())
	// Output: chunk 5, 1 exception
}
