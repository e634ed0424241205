package stack_test

import (
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
)

// A snapshot that is not changed any more becomes a layer over its base.
func Example() {
	base, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	s, err := snapshot.NewOrigin(base).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := s.WriteAt([]byte("in the layer"), 4096); err != nil {
		log.Fatal(err)
	}
	if err := s.Close(); err != nil {
		log.Fatal(err)
	}

	st, err := store.Open(cow)
	if err != nil {
		log.Fatal(err)
	}
	disk := stack.New(base, base.Size()).With(stack.NewLayer(st), base.Size())
	p := make([]byte, 12)
	if _, err := disk.ReadAt(p, 4096); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d layer\n", p, len(disk.Layers()))
	// Output: in the layer, 1 layer
}
