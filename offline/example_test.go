package offline_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/offline"
)

// A snapshot is merged; what is overwritten is kept in an undo store, which another merge takes back.
func ExampleMerge() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk, cow, undo := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow"), filepath.Join(dir, "before.cow")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		log.Fatal(err)
	}
	if _, err := cowfile.Create(disk, cow, cowfile.Options{}); err != nil {
		log.Fatal(err)
	}

	res, err := offline.Merge(context.Background(), []string{disk, cow}, offline.MergeOptions{Undo: undo})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(res.Chunks, "chunks merged")
	// Output: 0 chunks merged
}

// What a snapshot shows is written to a new image.
func ExampleExport() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk, cow, out := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow"), filepath.Join(dir, "old.img")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		log.Fatal(err)
	}
	if _, err := cowfile.Create(disk, cow, cowfile.Options{}); err != nil {
		log.Fatal(err)
	}

	err = offline.Export(context.Background(), []string{disk, cow}, out, offline.ExportOptions{
		Progress: func(done, total int64) { fmt.Println(done, "of", total) },
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: 1048576 of 1048576
}
