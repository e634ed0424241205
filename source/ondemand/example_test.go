package ondemand_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"time"

	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/ondemand"
)

// A disk on a web server, of which what is read is fetched and kept.
func ExampleOpen() {
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "disk.img", time.Time{}, bytes.NewReader(content))
	}))
	defer s.Close()
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

	d, err := ondemand.Open(context.Background(), s.URL+"/disk.img", ondemand.Options{Cache: c})
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, 6)
	if _, err := d.ReadAt(p, 1<<19+10); err != nil {
		log.Fatal(err)
	}
	fmt.Println(d.Size(), string(p))
	// Output: 1048576 abcdef
}
