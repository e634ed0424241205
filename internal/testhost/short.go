package testhost

import (
	"os"
	"testing"
)

// longestTemp is how long the path of the directory for temporary files may be, in bytes, so that sockets in a directory
// of ShortDir have paths of less than the 108 bytes of a sockaddr_un.
const longestTemp = 40

// ShortDir returns a new, empty directory for sockets and other files, with a short path whatever TMPDIR and the name of
// the test are. It is removed when the test ends.
func ShortDir(t testing.TB) string {
	t.Helper()
	temp := os.TempDir()
	if len(temp) > longestTemp {
		temp = "/tmp"
	}
	dir, err := os.MkdirTemp(temp, "dm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
