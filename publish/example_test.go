package publish_test

import (
	"context"
	"fmt"
	"log"
	"net/http/httptest"
	"os"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/source/remote"
)

// A disk is pushed to a registry; pushed again, nothing of it is written.
func ExamplePush() {
	s := httptest.NewServer(testremote.NewRegistry())
	defer s.Close()
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk := block.NewMemory(1 << 20)
	if _, err := disk.WriteAt([]byte("golden image"), 4096); err != nil {
		log.Fatal(err)
	}

	repository, err := remote.Open("oci://"+strings.TrimPrefix(s.URL, "http://")+"/golden/disk:1", remote.Options{})
	if err != nil {
		log.Fatal(err)
	}
	for range 2 {
		p, err := publish.Push(context.Background(), repository, disk, nil, publish.Options{Temp: dir})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(p.Written > 0)
	}
	// Output:
	// true
	// false
}
