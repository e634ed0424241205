package inspect_test

import (
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/snapshot"
)

// The state and the fill level of a store.
func ExampleStatusOf() {
	origin, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := s.WriteAt(make([]byte, 8192), 0); err != nil {
		log.Fatal(err)
	}
	if err := s.Close(); err != nil {
		log.Fatal(err)
	}

	st, err := inspect.StatusOf("disk.cow", cow, false)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(st.State, st.Exceptions)
	// Output: ok 2
}
