package testhost

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"sync"
	"testing"
)

// A packedDisk is the content of a disk without its pieces of zeros, of which most disks of tests are made: all that a test binary
// asks for fit in memory, and a copy costs what is not zero.
type packedDisk struct {
	size   int
	pieces map[int][]byte // by offset, a multiple of pieceSize
}

const pieceSize = 64 << 10

var unpacked struct {
	mu    sync.Mutex
	disks map[string]packedDisk // by path
}

// Unpack returns the content of a gzip file, a packed disk: a copy, which a test may change.
func Unpack(t testing.TB, path string) []byte {
	t.Helper()
	u := &unpacked
	u.mu.Lock()
	defer u.mu.Unlock()
	d, found := u.disks[path]
	if !found {
		var err error
		if d, err = readPacked(path); err != nil {
			t.Fatal(err)
		}
		if u.disks == nil {
			u.disks = map[string]packedDisk{}
		}
		u.disks[path] = d
	}
	content := make([]byte, d.size)
	for off, piece := range d.pieces {
		copy(content[off:], piece)
	}
	return content
}

func readPacked(path string) (packedDisk, error) {
	d := packedDisk{pieces: map[int][]byte{}}
	f, err := os.Open(path)
	if err != nil {
		return d, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return d, err
	}
	buf, zeros := make([]byte, pieceSize), make([]byte, pieceSize)
	for {
		n, err := io.ReadFull(z, buf)
		if !bytes.Equal(buf[:n], zeros[:n]) {
			d.pieces[d.size] = append([]byte(nil), buf[:n]...)
		}
		d.size += n
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return d, nil
		}
		if err != nil {
			return d, err
		}
	}
}
