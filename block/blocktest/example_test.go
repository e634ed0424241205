package blocktest_test

import (
	"fmt"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// A disk whose second operation fails, and what was done to it.
func ExampleFaulty() {
	var log blocktest.Log
	disk := log.Record("DISK", blocktest.NewFaulty(block.NewMemory(1<<20), blocktest.FailNth(2, syscall.EIO)))

	disk.WriteAt(make([]byte, 4096), 0)
	disk.Flush()
	disk.Flush() // a device that failed a flush fails every later one
	fmt.Print(log.String())
	// Output:
	// DISK W 0+8
	// DISK F error: input/output error
	// DISK F error: input/output error
}

// What Linux shows after a failed flush, and what is left after a power cut.
func ExamplePageCache() {
	cache := blocktest.NewPageCache(block.NewMemory(1<<20), blocktest.FailKind(blocktest.Flush, syscall.EIO))
	show := func() {
		p := make([]byte, 4)
		cache.Open().ReadAt(p, 0)
		fmt.Printf("%q\n", p)
	}

	f := cache.Open()
	f.WriteAt([]byte("data"), 0)
	fmt.Println(f.Flush())
	cache.Set(nil)
	fmt.Println(f.Flush()) // reported once
	show()
	cache.PowerCut()
	show()
	// Output:
	// input/output error
	// <nil>
	// "data"
	// "\x00\x00\x00\x00"
}
