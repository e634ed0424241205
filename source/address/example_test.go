package address_test

import (
	"encoding/binary"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/address"
)

// Partition 1 of a disk, by its address.
func ExampleOpen() {
	sector := make([]byte, 512) // an MBR with one partition of 1024 sectors from sector 128 on
	sector[446+4] = 0x83
	binary.LittleEndian.PutUint32(sector[446+8:], 128)
	binary.LittleEndian.PutUint32(sector[446+12:], 1024)
	sector[510], sector[511] = 0x55, 0xaa
	disk := block.NewMemory(1 << 20)
	if _, err := disk.WriteAt(sector, 0); err != nil {
		log.Fatal(err)
	}

	a, err := address.Parse("vm.img#p1")
	if err != nil {
		log.Fatal(err)
	}
	part, err := address.Open(a, disk)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(part.Size())
	// Output: 524288
}
