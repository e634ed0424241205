package qcow2_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/qcow2"
)

// Write a disk to a qcow2 image, and read it from there.
func Example() {
	dir, err := os.MkdirTemp("", "qcow2")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.qcow2")
	disk := block.NewMemory(1 << 30)
	if _, err := disk.WriteAt([]byte("content"), 1<<20); err != nil {
		log.Fatal(err)
	}

	out, err := os.Create(path)
	if err != nil {
		log.Fatal(err)
	}
	defer out.Close()
	if err := qcow2.Export(out, disk, qcow2.ExportOptions{}); err != nil {
		log.Fatal(err)
	}

	image, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer image.Close()
	p := make([]byte, 7)
	if _, err := image.ReadAt(p, 1<<20); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes, %s\n", image.Size(), p)
	// Output: 1073741824 bytes, content
}
