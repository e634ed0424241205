package daemon_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/fleet/daemon"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
)

// A fleet that clients control over a unix socket.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	f, err := fleet.Open(filepath.Join(dir, "fleet"), fleet.Options{})
	if err != nil {
		log.Fatal(err)
	}
	d, err := daemon.New(f, daemon.Options{Dir: dir})
	if err != nil {
		log.Fatal(err)
	}
	socket := filepath.Join(dir, "ctl")
	control, err := daemon.ListenUnix(socket, -1, 0o600)
	if err != nil {
		log.Fatal(err)
	}
	exports, err := server.ListenUnix(filepath.Join(dir, "nbd"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, control, exports) }()

	tree, err := api.NewClient(socket).Tree(ctx)
	fmt.Println(len(tree.Elements), err)
	stop()
	fmt.Println(<-ended, f.Close())
	// Output:
	// 0 <nil>
	// <nil> <nil>
}
