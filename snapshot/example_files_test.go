package snapshot_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
)

// Write to a snapshot and to its origin, then merge the snapshot into the origin.
func Example_files() {
	leave := enterExampleFolder()
	defer leave()
	if _, err := cowfile.Create("disk.img", "vm1.cow", cowfile.Options{}); err != nil {
		log.Fatal(err)
	}
	if err := useAndMerge(context.Background()); err != nil {
		log.Fatal(err)
	}
	disk, err := os.ReadFile("disk.img")
	if err != nil {
		log.Fatal(err)
	}
	// The merged disk has the content of the snapshot, without later writes to the origin.
	fmt.Printf("%q %q\n", disk[:8], disk[4096:4098])
	// Output: "snapshot" "\x00\x00"
}

// useAndMerge is the code in README.md.
func useAndMerge(ctx context.Context) error {
	disk, err := block.Open("disk.img", block.Options{})
	if err != nil {
		return err
	}
	defer disk.Close()
	cow, err := block.Open("vm1.cow", block.Options{})
	if err != nil {
		return err
	}
	defer cow.Close()

	origin := snapshot.NewOrigin(disk)
	vm1, err := origin.Attach(cow, snapshot.Options{}) // loads the store
	if err != nil {
		return err
	}
	vm1.WriteAt([]byte("snapshot"), 0)     // origin and snapshot are devices:
	origin.WriteAt([]byte("origin"), 4096) // ReadAt, WriteAt, Flush, Size
	if err := vm1.Flush(); err != nil {
		return err
	}

	merging, err := vm1.BeginMerge()
	if err != nil {
		return err
	}
	return merge.Run(ctx, merging, merge.Options{})
}

// enterExampleFolder changes to a new directory with a disk of 1 MiB. leave removes it.
func enterExampleFolder() (leave func()) {
	was, err := os.Getwd()
	if err != nil {
		log.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "example-")
	if err == nil {
		err = os.Chdir(dir)
	}
	if err == nil {
		err = os.WriteFile("disk.img", make([]byte, 1<<20), 0o600)
	}
	if err != nil {
		log.Fatal(err)
	}
	return func() {
		os.Chdir(was)
		os.RemoveAll(dir)
	}
}
