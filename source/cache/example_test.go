package cache_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/source/cache"
)

// A unit is fetched by the first one that claims it, and read by all others.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	c, err := cache.Open(dir, cache.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	b, err := c.Blob(cache.Data, layer.DigestOf([]byte("a blob")), "oci://host/disk")
	if err != nil {
		log.Fatal(err)
	}

	fetched := []byte("the content of unit 7")
	digest, p := layer.DigestOf(fetched), make([]byte, len(fetched))
	release, err := b.Claim(context.Background(), 7, 1)
	if err != nil {
		log.Fatal(err)
	}
	if !b.Read(p, 7, 0, len(p), digest) {
		err = b.Put(7, fetched, digest)
	}
	release()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(b.Read(p, 7, 0, len(p), digest), string(p))
	// Output: true the content of unit 7
}
