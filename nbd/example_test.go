package nbd_test

import (
	"context"
	"fmt"
	"log"
	"net"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
)

// Serve a device, and use it through a client.
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	s := nbd.NewServer(nbd.Options{})
	if err := s.Add(nbd.Export{Name: "disk", Device: block.NewMemory(1 << 20)}); err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()

	c, err := nbd.Dial(ctx, "nbd://"+l.Addr().String()+"/disk")
	if err != nil {
		log.Fatal(err)
	}
	if err := block.WriteDurable(c, []byte("over the network"), 512); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 16)
	if _, err := c.ReadAt(p, 512); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes\n", p, c.Size())
	if err := c.Close(); err != nil {
		log.Fatal(err)
	}
	stop()
	fmt.Println(<-ended)
	// Output:
	// over the network, 1048576 bytes
	// <nil>
}
