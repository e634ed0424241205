package snapshot_test

import (
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A snapshot keeps showing the old data after the origin was written.
func Example() {
	disk, cow := block.NewMemory(1<<20), block.NewMemory(1<<20)
	if _, err := disk.WriteAt([]byte("old"), 4096); err != nil {
		log.Fatal(err)
	}

	origin := snapshot.NewOrigin(disk)
	vm1, err := origin.Attach(cow, snapshot.Options{}) // creates a store in an empty COW device
	if err != nil {
		log.Fatal(err)
	}
	if _, err := origin.WriteAt([]byte("new"), 4096); err != nil {
		log.Fatal(err)
	}

	var now, then [3]byte
	if _, err := origin.ReadAt(now[:], 4096); err != nil {
		log.Fatal(err)
	}
	if _, err := vm1.ReadAt(then[:], 4096); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("origin %s, snapshot %s\n", now, then)
	if err := vm1.Close(); err != nil {
		log.Fatal(err)
	}
	if err := origin.Finish(); err != nil {
		log.Fatal(err)
	}
	// Output: origin new, snapshot old
}
