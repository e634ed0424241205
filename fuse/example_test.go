package fuse_test

import (
	"fmt"
	"log"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/fuse"
)

// A disk as a file. It needs /dev/fuse; cmd/dmsnap's TestFuseFiles has a test of it.
func Example() {
	const dir = "/run/disks" // empty, and owned by who calls
	s, err := fuse.Mount(dir, fuse.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if err := s.Add("vda", block.NewMemory(1<<20), false); err != nil {
		log.Fatal(err)
	}
	info, err := os.Stat(s.Path("vda"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Size()) // 1048576
	if err := s.Close(); err != nil {
		log.Fatal(err)
	}
}
