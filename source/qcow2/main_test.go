package qcow2

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/dmsnap/dmsnap/block"
)

// A fixture is a case of testdata/cases.json: an image that qemu 7.2 wrote.
type fixture struct {
	Name  string
	Files []struct{ File, SHA256 string }

	RawSize   int64  `json:"raw_size"`
	RawSHA256 string `json:"raw_sha256"`
	Follow    bool
	Refuse    string
	Snapshots []struct {
		ID, Name  string
		Size      int64
		RawSHA256 string `json:"raw_sha256"`
	}
}

// fixtures returns the cases, and a folder with their files.
func fixtures(t testing.TB) ([]fixture, string) {
	t.Helper()
	b, err := os.ReadFile("testdata/cases.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []fixture
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	packed, err := filepath.Glob("testdata/*.zst")
	if err != nil || len(packed) < 12 {
		t.Fatalf("%d packed images, %v", len(packed), err)
	}
	for _, p := range packed {
		name := filepath.Base(p)
		if err := os.WriteFile(filepath.Join(dir, name[:len(name)-4]), unpack(t, p), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return all, dir
}

func unpack(t testing.TB, path string) []byte {
	t.Helper()
	in, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	r, err := zstd.NewReader(in)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// digest returns the SHA-256 of the disk, read in pieces of n bytes.
func digest(t testing.TB, dev block.Device, n int64) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{io.NewSectionReader(dev, 0, dev.Size())}, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// checkExtents holds what the extents say against what is read.
func checkExtents(t testing.TB, dev block.Device) {
	t.Helper()
	for off := int64(0); off < dev.Size(); {
		all, err := block.Extents(dev, off, dev.Size()-off)
		if err != nil || len(all) == 0 {
			t.Fatalf("extents at byte %d: %v, %v", off, all, err)
		}
		for _, e := range all {
			if e.Length <= 0 || e.Length > dev.Size()-off {
				t.Fatalf("extent of %d bytes at byte %d of %d", e.Length, off, dev.Size())
			}
			if e.Flags&block.ReadsZero != 0 {
				p := make([]byte, e.Length)
				p[0] = 1
				if _, err := dev.ReadAt(p, off); err != nil {
					t.Fatal(err)
				}
				for i, b := range p {
					if b != 0 {
						t.Fatalf("byte %d is %d, the extents say zero", off+int64(i), b)
					}
				}
			}
			off += e.Length
		}
	}
}

// need skips the test, with the reason, where a program is not installed.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("SKIPPED: no %s (Debian: apt-get install qemu-utils)", p)
		}
	}
}

// run runs a program that must succeed, and returns what it printed.
func run(t testing.TB, program string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, out)
	}
	return string(out)
}

// deflated returns a raw deflate stream.
func deflated(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, 6)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// zstdFrame returns a frame.
func zstdFrame(p []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer w.Close()
	return w.EncodeAll(p, nil)
}
