package source_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/source"
)

// A disk image by its name, for reading.
func ExampleOpen() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(name, make([]byte, 1<<20), 0o600); err != nil {
		log.Fatal(err)
	}

	d, err := source.Open(name, source.Options{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	fmt.Println(d.Size(), source.Path("vm.img#vg0/root"))
	// Output: 1048576 vm.img
}
