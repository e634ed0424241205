package compact_test

import (
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A dense copy of a store, without the chunk whose content equals the origin's.
func Example() {
	origin, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	vm1, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	for off, text := range map[int64]string{0: "changed", 8192: "\x00\x00", 40960: "changed"} {
		if _, err := vm1.WriteAt([]byte(text), off); err != nil {
			log.Fatal(err)
		}
	}
	if err := vm1.Close(); err != nil {
		log.Fatal(err)
	}

	plan, err := compact.NewPlan(context.Background(), cow, compact.Options{Origin: origin, DropUnchanged: true})
	if err != nil {
		log.Fatal(err)
	}
	dense := block.NewMemory(plan.Size())
	result, err := plan.Write(context.Background(), dense)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Exceptions, "exceptions,", result.Dropped, "dropped")

	st, err := store.Open(dense)
	if err != nil {
		log.Fatal(err)
	}
	for r := range st.Exceptions() {
		fmt.Println(r.Old, "->", r.New)
	}
	// Output:
	// 2 exceptions, 1 dropped
	// 0 -> 2
	// 10 -> 3
}
