package vhost_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/vhost"
)

// A disk for virtual machines: QEMU opens it with -chardev socket,path=DIR/vda.sock and -device vhost-user-blk-pci.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(context.Background())

	s := vhost.NewServer(dir, vhost.Options{})
	if err := s.Add(vhost.Export{Name: "vda", Device: block.NewMemory(1 << 20)}); err != nil {
		log.Fatal(err)
	}
	fmt.Println(s.Names())
	cancel() // a server has SIGTERM do it
	fmt.Println(s.Serve(ctx))
	// Output:
	// [vda]
	// <nil>
}
