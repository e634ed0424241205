package image_test

import (
	"errors"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// Before something new is put on a device: what does it hold, and may it be overwritten?
func Example() {
	dev := block.NewMemory(1 << 20)
	fmt.Println(image.CheckEmpty(dev))

	layout, err := ondisk.NewLayout(8)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := store.Create(dev, layout, false); err != nil {
		log.Fatal(err)
	}
	c, err := image.Probe(dev)
	if err != nil {
		log.Fatal(err)
	}
	var notEmpty *image.NotEmptyError
	fmt.Println(c.Kind.Name, errors.As(image.CheckEmpty(dev), &notEmpty))
	// Output:
	// <nil>
	// store true
}
