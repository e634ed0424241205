package mapped_test

import (
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/mapped"
)

// A volume of two ranges, each of another disk.
func Example() {
	first, second := block.NewMemory(8192), block.NewMemory(8192)
	volume, err := mapped.New("", []mapped.Target{
		{Length: 4096, Areas: []mapped.Area{{Dev: first, Off: 4096}}},
		{Length: 4096, Areas: []mapped.Area{{Dev: second}}},
	})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := volume.WriteAt([]byte("two disks"), 4093); err != nil {
		log.Fatal(err)
	}
	a, b := make([]byte, 3), make([]byte, 6)
	if _, err := first.ReadAt(a, 8189); err != nil {
		log.Fatal(err)
	}
	if _, err := second.ReadAt(b, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes: %q %q\n", volume.Size(), a, b)
	// Output: 8192 bytes: "two" " disks"
}
