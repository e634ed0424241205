package main

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
)

// allocated returns how much space a file takes, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

// What takes no space in the COW device takes none in the origin after a merge, nor in a repaired, compacted or
// revalidated copy; holes of the origin take none in the COW device.
func TestSparseStaysSparse(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	const size, most = 128 << 20, 16 << 20
	p := newPair(t)
	image := make([]byte, size)
	for _, at := range []int{0, 50 << 20, size - 1<<20} {
		copy(image[at:], bytes.Repeat([]byte("data"), 256<<10))
	}
	at := func(name string) string { return filepath.Join(p.dir, name) }
	wantSparse := func(what, path string) {
		t.Helper()
		if n := allocated(t, path); n > most {
			t.Errorf("%s: %s takes %s for 3 MiB of data", what, filepath.Base(path), bytesText(n))
		}
	}
	fresh := func(args ...string) {
		t.Helper()
		os.Remove(p.origin)
		os.Remove(p.cow)
		writeFile(t, p.origin, nil)
		if err := os.Truncate(p.origin, size); err != nil {
			t.Fatal(err)
		}
		mustRun(t, append([]string{"create", p.origin, p.cow}, args...)...)
	}
	// write puts the image on an export of a server, zeros as zeros, and calls then while it runs.
	socket, control := at("s"), at("c")
	write := func(export string, then func()) {
		t.Helper()
		s := launch(t, "serve", p.origin, "disk="+p.cow, "--export-origin", "--socket", socket, "--control", control)
		if line, err := s.stdout.ReadString('\n'); err != nil {
			t.Fatalf("%q, %v; %s", line, err, &s.stderr)
		}
		c, err := nbd.Dial(t.Context(), "nbd+unix:///"+export+"?socket="+socket)
		if err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < size; off += 1 << 20 {
			part := image[off : off+1<<20]
			if bytes.Equal(part, make([]byte, len(part))) {
				err = block.Zero(c, off, int64(len(part)), 0)
			} else {
				_, err = c.WriteAt(part, off)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		c.Close()
		if then != nil {
			then()
		}
		s.Process.Signal(syscall.SIGTERM)
		if status := s.end(t); status != exitDone {
			t.Errorf("status %d, %s", status, &s.stderr)
		}
	}

	fresh()
	write("disk", nil)
	wantSparse("written with zeros", p.cow)
	mustRun(t, "repair", p.cow, at("repaired"))
	mustRun(t, "compact", p.cow, at("compacted"))
	mustRun(t, "rescue", "--revalidate", p.cow, at("revalidated"))
	for _, cow := range []string{"repaired", "compacted", "revalidated"} {
		wantSparse(cow, at(cow))
		mustRun(t, "export", p.origin, at(cow), at("image"), "--force")
		wantContent(t, at("image"), image)
		wantSparse("export", at("image"))
	}
	mustMerge(t, p.origin, p.cow, "--undo", at("undo"))
	wantContent(t, p.origin, image)
	wantSparse("merge", p.origin)
	wantSparse("merge --undo", at("undo"))

	fresh()
	write("disk", func() { mustRun(t, "merge", "--control", control, "disk", "--wait") })
	wantContent(t, p.origin, image)
	wantSparse("live merge", p.origin)

	for _, chunk := range []string{"4KiB", "64KiB", "2MiB"} {
		fresh("--chunk-size", chunk)
		write("origin", nil)
		wantSparse("copies of holes, chunks of "+chunk, p.cow)
		mustRun(t, "check", p.cow, "--origin", p.origin)
	}

	// A little of a huge chunk, whose area is huge too.
	fresh("--chunk-size", "1GiB")
	if err := os.Truncate(p.origin, 2<<30); err != nil {
		t.Fatal(err)
	}
	s := launch(t, "serve", p.origin, "disk="+p.cow, "--socket", socket)
	if line, err := s.stdout.ReadString('\n'); err != nil {
		t.Fatalf("%q, %v; %s", line, err, &s.stderr)
	}
	c, err := nbd.Dial(t.Context(), "nbd+unix:///disk?socket="+socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := block.WriteDurable(c, []byte("data"), 64<<20); err != nil {
		t.Fatal(err)
	}
	c.Close()
	s.Process.Signal(syscall.SIGTERM)
	if status := s.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
	wantSparse("4 bytes in a chunk of 1 GiB", p.cow)
	mustRun(t, "check", p.cow, "--origin", p.origin)
}
