package stream_test

import (
	"bytes"
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/stream"
)

// What a snapshot changed is sent to a copy of its origin.
func Example() {
	origin, cow, replica := block.NewMemory(1<<20), block.NewMemory(1<<20), block.NewMemory(1<<20)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := s.WriteAt([]byte("changed"), 8192); err != nil {
		log.Fatal(err)
	}
	if err := s.Close(); err != nil {
		log.Fatal(err)
	}
	st, err := store.Open(cow)
	if err != nil {
		log.Fatal(err)
	}

	ctx, wire := context.Background(), new(bytes.Buffer)
	from, err := stream.Between(origin, nil, st)
	if err != nil {
		log.Fatal(err)
	}
	sent, err := stream.Send(ctx, wire, from, stream.SendOptions{})
	if err != nil {
		log.Fatal(err)
	}
	r, err := stream.NewReader(wire)
	if err != nil {
		log.Fatal(err)
	}
	got, err := r.Apply(ctx, replica, stream.ApplyOptions{})
	if err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 7)
	if _, err := replica.ReadAt(p, 8192); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes sent, %d written: %s\n", sent.Data, got.Written, p)
	// Output: 4096 bytes sent, 4096 written: changed
}
