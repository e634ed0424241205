package remote_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/dmsnap/dmsnap/source/remote"
)

// A range of a file on a web server.
func ExampleOpenFile() {
	disk := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "disk.img", time.Time{}, bytes.NewReader(disk))
	}))
	defer s.Close()

	ctx := context.Background()
	f, err := remote.OpenFile(ctx, s.URL+"/disk.img", remote.Options{})
	if err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 6)
	if err := f.ReadRange(ctx, p, 1<<19+10); err != nil {
		log.Fatal(err)
	}
	fmt.Println(f.Size(), string(p))
	// Output: 1048576 abcdef
}
