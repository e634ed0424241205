package ondisk_test

import (
	"fmt"

	"github.com/dmsnap/dmsnap/ondisk"
)

// Where the slots and the data of a store are, from the bytes of its header.
func Example() {
	sector := make([]byte, 512)
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: ondisk.Version, ChunkSectors: 8}.Encode(sector)

	h := ondisk.DecodeHeader(sector)
	if err := h.Check(); err != nil {
		fmt.Println(err)
		return
	}
	l, err := ondisk.NewLayout(h.ChunkSectors)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(l.ChunkBytes(), "bytes a chunk,", l.SlotsPerArea(), "slots an area")
	fmt.Println(l.Place(ondisk.Slot{Area: 1, Index: 2}))
	fmt.Println("1000 exceptions need", l.ChunksNeeded(1000), "chunks")
	// Output:
	// 4096 bytes a chunk, 256 slots an area
	// area 1 slot 2, byte 0x102020
	// 1000 exceptions need 1005 chunks
}
