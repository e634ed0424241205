package fleet_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/server/api"
)

// A golden image, a node that is prepared, and two that are forked from it.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	golden := filepath.Join(dir, "golden.img")
	if err := os.WriteFile(golden, make([]byte, 1<<20), 0o600); err != nil {
		log.Fatal(err)
	}

	f, err := fleet.Open(filepath.Join(dir, "fleet"), fleet.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	ctx := context.Background()
	if _, err := f.AddDisk(ctx, api.AddDiskRequest{Name: "golden", Source: golden}); err != nil {
		log.Fatal(err)
	}
	if _, err := f.Fork(ctx, api.ForkRequest{From: "golden", Name: "template"}); err != nil {
		log.Fatal(err)
	}
	if _, err := f.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"template"}, Name: "ready"}); err != nil {
		log.Fatal(err)
	}
	for _, name := range []string{"vm1", "vm2"} {
		if _, err := f.Fork(ctx, api.ForkRequest{From: "template@ready", Name: name}); err != nil {
			log.Fatal(err)
		}
	}
	for _, e := range f.Tree().Elements {
		fmt.Println(strings.TrimSpace(fmt.Sprint(e.Kind, " ", e.Name, " ", e.Parent)))
	}
	// Output:
	// disk golden
	// checkpoint template@ready golden
	// node template template@ready
	// node vm1 template@ready
	// node vm2 template@ready
}
