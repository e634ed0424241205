package cowfile_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A new COW file for a disk image, and the snapshot in it.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk, path := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		log.Fatal(err)
	}
	made, err := cowfile.Create(disk, path, cowfile.Options{})
	if err != nil {
		log.Fatal(err)
	}

	origin, err := cowfile.OpenRaw(disk, cowfile.OriginOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer origin.Close()
	cow, err := cowfile.OpenDevice(path, block.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer cow.Close()
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(made.Layout.ChunkBytes(), made.Size == cow.Size(), s.Size())
	if err := s.Close(); err != nil {
		log.Fatal(err)
	}
	// Output: 4096 true 1048576
}
