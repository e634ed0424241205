package figures_test

import (
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/figures"
	"github.com/dmsnap/dmsnap/snapshot"
)

// The status of a snapshot, as the control API reports it.
func ExampleOf() {
	s, err := snapshot.NewOrigin(block.NewMemory(1<<20)).Attach(block.NewMemory(1<<20), snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	f := figures.Of(s.Status())
	fmt.Println(f.State, f.ChunkSectors)
	if err := s.Close(); err != nil {
		log.Fatal(err)
	}
	// Output: ok 8
}
