package partition_test

import (
	"encoding/binary"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/partition"
)

// The first partition of a disk with an MBR, as a device.
func Example() {
	disk := block.NewMemory(1 << 20)
	if _, err := disk.WriteAt(exampleMBR(), 0); err != nil {
		log.Fatal(err)
	}

	table, err := partition.Read(disk, 0)
	if err != nil {
		log.Fatal(err)
	}
	for _, p := range table.Partitions {
		fmt.Println(table.Scheme, p.Number, p.Start, p.Size, p.Type)
	}
	first, err := table.Open(1)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(first.Size())
	// Output:
	// mbr 1 65536 524288 0x83
	// 524288
}

// exampleMBR has one partition of 1024 sectors from sector 128 on.
func exampleMBR() []byte {
	sector := make([]byte, 512)
	entry := sector[446:]
	entry[4] = 0x83
	binary.LittleEndian.PutUint32(entry[8:], 128)
	binary.LittleEndian.PutUint32(entry[12:], 1024)
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}
