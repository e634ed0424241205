package testhost

import (
	"compress/gzip"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
)

// unpacked are the images that were unpacked last: most are asked for several times in a row.
var unpacked struct {
	mu      sync.Mutex
	paths   []string
	content map[string][]byte
}

// Unpack returns the content of a gzip file, a packed disk: a copy, which a test may change.
func Unpack(t testing.TB, path string) []byte {
	t.Helper()
	u := &unpacked
	u.mu.Lock()
	defer u.mu.Unlock()
	if content := u.content[path]; content != nil {
		return slices.Clone(content)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if len(u.paths) == 6 {
		delete(u.content, u.paths[0])
		u.paths = u.paths[1:]
	}
	if u.content == nil {
		u.content = map[string][]byte{}
	}
	u.paths, u.content[path] = append(u.paths, path), content
	return slices.Clone(content)
}
