package diff_test

import (
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// Extents reads the exceptions only. Verified compares the bytes, exact to the sector.
func Example() {
	origin, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	vm1, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := vm1.WriteAt([]byte("changed"), 8192); err != nil {
		log.Fatal(err)
	}
	if err := vm1.Close(); err != nil {
		log.Fatal(err)
	}

	st, err := store.OpenToRead(cow)
	if err != nil {
		log.Fatal(err)
	}
	d, err := diff.New(origin, st)
	if err != nil {
		log.Fatal(err)
	}
	for e := range d.Extents() {
		fmt.Println("may differ:", e.Off, e.Length)
	}
	for e, err := range d.Verified(context.Background()) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(e.Class, e.Off, e.Length)
	}
	// Output:
	// may differ: 8192 4096
	// changed 8192 512
	// copied 8704 3584
}
