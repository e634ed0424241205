package block_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
)

// countingDevice counts reads. Everything else goes to the underlying device, the abilities included.
type countingDevice struct {
	block.Forward
	reads atomic.Int64
}

func (c *countingDevice) ReadAt(p []byte, off int64) (int, error) {
	c.reads.Add(1)
	return c.Forward.ReadAt(p, off)
}

// ReadCached is another way to read, and so counts too.
func (c *countingDevice) ReadCached(reads []block.Read) int {
	n := c.Forward.ReadCached(reads)
	c.reads.Add(int64(n))
	return n
}

// A device over another one embeds a Forward and overrides what it changes.
func ExampleForward() {
	disk := block.NewMemory(1 << 20)
	dev := &countingDevice{Forward: block.NewForward(disk)}

	if _, err := dev.ReadAt(make([]byte, 512), 0); err != nil {
		log.Fatal(err)
	}
	if err := block.Grow(dev, 2<<20); err != nil { // an ability of the disk
		log.Fatal(err)
	}
	fmt.Println(dev.reads.Load(), disk.Size(), block.Same(dev, disk))
	// Output: 1 2097152 true
}

// Open takes the lock of a writer: another one is refused.
func ExampleOpen() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		log.Fatal(err)
	}

	dev, err := block.Open(path, block.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	if err := block.WriteDurable(dev, []byte("on the disk"), 512); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 11)
	if _, err := dev.ReadAt(p, 512); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes\n", p, dev.Size())
	// Output: on the disk, 4096 bytes
}

// A copy leaves holes where the source has some.
func ExampleCopy() {
	from, to := block.NewMemory(1<<40), block.NewMemory(1<<40)
	if _, err := from.WriteAt([]byte("far out"), 1<<39); err != nil {
		log.Fatal(err)
	}
	if err := block.Copy(to, 0, from, 0, from.Size(), block.AllHoles, nil); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 7)
	if _, err := to.ReadAt(p, 1<<39); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes allocated\n", p, to.Allocated())
	// Output: far out, 4096 bytes allocated
}
