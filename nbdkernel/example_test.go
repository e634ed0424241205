package nbdkernel_test

import (
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/nbdkernel"
)

// An export as a block device. It needs the kernel module nbd and CAP_SYS_ADMIN; test/kernel.TestAttach has a test of it.
func Example() {
	ctx := context.Background()
	d, err := nbdkernel.Attach(ctx, "nbd+unix:///disk?socket=/run/nbd.sock", nbdkernel.Options{Index: nbdkernel.AnyIndex})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(d.Path) // /dev/nbd0
	if err := nbdkernel.Detach(ctx, d.Path, false); err != nil {
		log.Fatal(err)
	}
}
