package api_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
)

// A server with a control socket, and a client that takes a snapshot.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk, socket := filepath.Join(dir, "disk.img"), filepath.Join(dir, "ctl")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		log.Fatal(err)
	}
	s, err := server.Open(disk, server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	control, err := server.ListenUnix(socket)
	if err != nil {
		log.Fatal(err)
	}
	nbd, err := server.ListenUnix(filepath.Join(dir, "nbd"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	wait := s.Start(ctx, nbd, control)

	c := api.NewClient(socket)
	if _, err := c.Attach(ctx, api.AttachRequest{Name: "before", COW: filepath.Join(dir, "before.cow"), Create: true}); err != nil {
		log.Fatal(err)
	}
	status, err := c.Status(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, v := range status.Snapshots {
		fmt.Println(v.Name, v.State)
	}
	stop()
	fmt.Println(wait(), s.Close())
	// Output:
	// before ok
	// <nil> <nil>
}
