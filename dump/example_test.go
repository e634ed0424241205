package dump_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/dump"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// The metadata of a store as text, and a store from that text.
func Example() {
	cow := block.NewMemory(64 << 10)
	layout, err := ondisk.NewLayout(8)
	if err != nil {
		log.Fatal(err)
	}
	st, err := store.Create(cow, layout, false)
	if err != nil {
		log.Fatal(err)
	}
	r, err := st.Reserve(5, 1)
	if err != nil {
		log.Fatal(err)
	}
	if err := r.Commit(); err != nil {
		log.Fatal(err)
	}
	if err := st.Sync(); err != nil {
		log.Fatal(err)
	}

	var text bytes.Buffer
	if err := dump.Text(context.Background(), &text, cow, dump.Options{}); err != nil {
		log.Fatal(err)
	}
	os.Stdout.Write(text.Bytes())

	made, err := dump.Restore(context.Background(), &text, func(size int64) (block.Device, error) {
		return block.NewMemory(size), nil
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(made.Slots, "slot in chunks of", made.ChunkSectors, "sectors")
	// Output:
	// dmsnap store 1
	// size 65536
	// header magic 0x70416e53 valid 1 version 1 chunk-sectors 8
	// area 0
	// slot 0: 5 -> 2
	// # slot 1 is the end mark
	// end
	// 1 slot in chunks of 8 sectors
}
