package rescue_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// Recover an image of a snapshot that was marked invalid. What the store holds is certain, the rest is doubtful.
func Example() {
	origin, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	vm1, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := vm1.WriteAt(make([]byte, 4096), 0); err != nil {
		log.Fatal(err)
	}
	if err := vm1.Close(); err != nil {
		log.Fatal(err)
	}
	st, err := store.Open(cow)
	if err != nil {
		log.Fatal(err)
	}
	if err := st.Invalidate(errors.New("no space")); err != nil {
		log.Fatal(err)
	}

	r, err := rescue.Open(context.Background(), origin, cow, rescue.Options{})
	if err != nil {
		log.Fatal(err)
	}
	image := block.NewMemory(r.Size())
	ranges, err := r.Write(context.Background(), image, nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, part := range ranges {
		fmt.Println(part.Off, part.Length, part.Class)
	}
	// Output:
	// 0 4096 certain
	// 4096 1044480 doubtful
}
