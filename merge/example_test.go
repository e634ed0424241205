package merge_test

import (
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
)

// Write to a snapshot, then merge it into the origin while the origin is in use.
func Example() {
	disk, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	origin := snapshot.NewOrigin(disk)
	vm1, err := origin.Attach(cow, snapshot.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := vm1.WriteAt([]byte("upgraded"), 4096); err != nil {
		log.Fatal(err)
	}

	m, err := vm1.BeginMerge()
	if err != nil {
		log.Fatal(err)
	}
	d := merge.Start(m, merge.Options{})
	defer d.Stop()
	if err := d.Wait(context.Background()); err != nil {
		log.Fatal(err)
	}

	p := make([]byte, 8)
	if _, err := disk.ReadAt(p, 4096); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	// Output: upgraded
}

// Offline merges a store that nothing else uses.
func ExampleOffline() {
	disk, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	vm1, err := snapshot.NewOrigin(disk).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := vm1.WriteAt([]byte("upgraded"), 4096); err != nil {
		log.Fatal(err)
	}
	if err := vm1.Close(); err != nil {
		log.Fatal(err)
	}

	if _, err := merge.Offline(context.Background(), disk, cow, merge.Options{}); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 8)
	if _, err := disk.ReadAt(p, 4096); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	// Output: upgraded
}
