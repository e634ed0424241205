package check_test

import (
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A store whose first slot names a metadata chunk is found to be damaged.
func Example() {
	cow := block.NewMemory(1 << 20)
	layout, err := ondisk.NewLayout(8)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := store.Create(cow, layout, false); err != nil {
		log.Fatal(err)
	}
	var slot [ondisk.SlotSize]byte
	ondisk.Exception{Old: 7, New: 1}.Encode(slot[:])
	if _, err := cow.WriteAt(slot[:], layout.SlotOffset(ondisk.Slot{})); err != nil {
		log.Fatal(err)
	}

	report, err := check.Run(context.Background(), cow, check.Options{})
	if err != nil {
		log.Fatal(err)
	}
	for _, f := range report.Findings {
		fmt.Println(f.Code, f.Problem().Severity, f.Place)
	}
	// Output: DS017 error area 0 slot 0, byte 0x1000
}
