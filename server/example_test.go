package server_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
)

// Serve a disk image and a new snapshot of it until ctx ends.
func Example() {
	dir, ctx := exampleDisk()
	defer os.RemoveAll(dir)

	s, err := server.Open(filepath.Join(dir, "disk.img"), server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	vm1, err := s.Attach(api.AttachRequest{Name: "vm1", COW: filepath.Join(dir, "vm1.cow"), Create: true})
	if err != nil {
		log.Fatal(err)
	}
	l, err := server.ListenUnix(filepath.Join(dir, "nbd.sock"))
	if err != nil {
		log.Fatal(err)
	}
	err = s.Serve(ctx, l, nil)
	fmt.Println(vm1.Name, vm1.State, err, s.Close())
	// Output: vm1 ok <nil> <nil>
}

// exampleDisk makes an empty disk of 1 MiB, and a context that has ended already.
func exampleDisk() (dir string, ctx context.Context) {
	dir, err := os.MkdirTemp("", "ex-")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "disk.img"), make([]byte, 1<<20), 0o600)
	}
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return dir, ctx
}
