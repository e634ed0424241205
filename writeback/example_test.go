package writeback_test

import (
	"fmt"
	"log"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/writeback"
)

// Two writes are acknowledged from memory and share one barrier and one write to the disk.
func Example() {
	var ops blocktest.Log
	disk := ops.Record("DISK", block.NewMemory(1<<20))
	barrier := func() error { fmt.Println("barrier"); return nil }
	dev := writeback.New(disk, writeback.Options{Limit: 1 << 20, Delay: time.Hour, Barrier: barrier})

	for _, off := range []int64{4096, 0} {
		if err := dev.WriteBack(make([]byte, 4096), off); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(dev.Status().Dirty, "dirty bytes")
	if err := dev.Flush(); err != nil {
		log.Fatal(err)
	}
	fmt.Print(ops.String())
	if err := dev.Finish(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// 8192 dirty bytes
	// barrier
	// DISK W 0+16
	// DISK F
}
