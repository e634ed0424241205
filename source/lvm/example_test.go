package lvm_test

import (
	"compress/gzip"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/lvm"
)

// List the volumes in a disk image and open one.
func Example() {
	file, err := os.Open("testdata/single/disk0.gz")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	z, err := gzip.NewReader(file)
	if err != nil {
		log.Fatal(err)
	}
	content, err := io.ReadAll(z)
	if err != nil {
		log.Fatal(err)
	}
	disk := block.MemoryFrom(content)

	set, err := lvm.Scan([]lvm.Disk{{Name: "disk.img", Dev: disk}}, 0)
	if err != nil {
		log.Fatal(err)
	}
	for _, group := range set.Groups {
		for _, v := range group.Volumes {
			fmt.Println(group.Name, v.Name)
		}
	}
	volume, err := set.Groups[0].Volume("snap")
	if err != nil {
		log.Fatal(err)
	}
	dev, err := volume.Open(lvm.Active) // the content of the snapshot
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(dev.Size(), "bytes")
	// Output:
	// vg base
	// vg plain
	// vg snap
	// 8388608 bytes
}
