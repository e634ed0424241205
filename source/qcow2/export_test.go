package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// randomDisk returns a disk with zeros, noise and text.
func randomDisk(r *rand.Rand, size int) []byte {
	b := make([]byte, size)
	for i := 0; i < size; {
		n := min(size-i, 1+r.IntN(1<<(4+r.IntN(16))))
		switch r.IntN(4) {
		case 0:
			for j := range n {
				b[i+j] = byte(r.Uint32())
			}
		case 1:
			word := fmt.Sprintf("word %d ", r.IntN(100))
			copy(b[i:i+n], strings.Repeat(word, n/len(word)+1))
		}
		i += n
	}
	return b
}

// exportTo writes an image to a new file.
func exportTo(t testing.TB, path string, src block.Device, o ExportOptions) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Export(f, src, o); err != nil {
		t.Fatal(err)
	}
}

// checkImage holds an image that Export wrote against what it must show, by this package and by qemu where it is.
func checkImage(t *testing.T, path string, want []byte, follow bool, qemu bool) {
	t.Helper()
	f, err := OpenFile(path, FileOptions{Follow: follow})
	if err != nil {
		t.Fatal(err)
	}
	compareReads(t, f, want, 1)
	checkExtents(t, f)
	if err := f.Close(); err != nil || !qemu {
		return
	}
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
	if got := rawOf(t, path); !bytes.Equal(got, want) {
		t.Error("qemu reads something else")
	}
}

// randomOptions returns how a random image is to be written.
func randomOptions(r *rand.Rand) ExportOptions {
	return ExportOptions{ClusterSize: 1 << (9 + r.IntN(13)), Compress: r.IntN(2) == 0, Compression: Compression(r.IntN(2))}
}

// TestInteropExport writes stand-alone images, which qemu finds sound and reads the same.
func TestInteropExport(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	need(t, "qemu-img", "qemu-io")
	for seed := range seeds() {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			want := randomDisk(r, 512*(1+r.IntN(12<<10)))
			o := randomOptions(r)
			path := filepath.Join(t.TempDir(), "out.qcow2")
			exportTo(t, path, memory(t, want), o)
			checkImage(t, path, want, false, true)
			if t.Failed() {
				t.Logf("%d bytes, %+v", len(want), o)
			}
			// What qemu then does to it works.
			run(t, "qemu-img", "snapshot", "-c", "one", path)
			run(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 5 0 %d", min(len(want), 70000)), path)
			run(t, "qemu-img", "resize", "-q", path, "+1M")
			run(t, "qemu-img", "check", "-q", path)
		})
	}
}

// TestInteropOverlay writes overlays of random stores and imports them again: the same exceptions, and qemu sees data only
// where the store has some.
func TestInteropOverlay(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	need(t, "qemu-img")
	for seed := range seeds() {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 3))
			size := 512 * (1 + r.IntN(4<<10))
			origin := randomDisk(r, size)
			l, err := ondisk.NewLayout(1 << r.IntN(9))
			if err != nil {
				t.Fatal(err)
			}
			cow := block.NewMemory(64 << 20)
			st, err := store.Create(cow, l, false)
			if err != nil {
				t.Fatal(err)
			}
			fill, want := store.NewFiller(st, 1<<20), bytes.Clone(origin)
			chunks := l.Chunks(int64(size), true)
			var have []bool
			for c := range chunks {
				have = append(have, r.IntN(5) == 0)
				if !have[c] {
					continue
				}
				content := randomDisk(r, int(l.ChunkBytes()))
				if r.IntN(3) == 0 {
					clear(content)
				}
				copy(want[int(c)<<l.Shift():], content)
				if err := fill.Add(ondisk.OriginChunk(c), 1, func(p []byte, off int64) error {
					copy(p, content[off-int64(c)<<l.Shift():])
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(fill.Flush(), st.Sync()); err != nil {
				t.Fatal(err)
			}
			view, err := store.NewView(memory(t, origin), st)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "base"), origin, 0o600); err != nil {
				t.Fatal(err)
			}
			o := randomOptions(r)
			if r.IntN(2) == 0 {
				o.ClusterSize = min(2<<20, l.ChunkBytes())
			}
			o.Backing, o.BackingFormat, o.BackingSize = "base", "raw", int64(size)
			o.Stored = func(off, n int64) (bool, int64) {
				_, _, follow, stored := view.Place(off, n)
				return stored, follow
			}
			path := filepath.Join(dir, "out.qcow2")
			exportTo(t, path, view, o)
			checkImage(t, path, want, true, true)
			checkMap(t, path, int64(size), o.ClusterSize, o.Stored)

			f, err := OpenFile(path, FileOptions{Follow: true})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			back := block.NewMemory(64 << 20)
			st2, err := store.Create(back, l, false)
			if err != nil {
				t.Fatal(err)
			}
			n, err := Import(context.Background(), st2, f.Image, nil)
			if err != nil {
				t.Fatal(err)
			}
			if st2, err = store.OpenToRead(back); err != nil {
				t.Fatal(err)
			}
			imported := uint64(0)
			for c := range chunks {
				_, is := st2.Lookup(ondisk.OriginChunk(c))
				if is {
					imported++
				}
				// A cluster larger than a chunk is filled up: the way back has more exceptions.
				if have[c] && !is || is && !have[c] && o.ClusterSize <= l.ChunkBytes() {
					t.Fatalf("chunk %d: in the store %v, imported %v", c, have[c], is)
				}
			}
			if imported != n {
				t.Errorf("%d exceptions, reported %d", imported, n)
			}
			again, err := store.NewView(memory(t, origin), st2)
			if err != nil {
				t.Fatal(err)
			}
			compareReads(t, again, want, seed)
			checkSound(t, cow)
			checkSound(t, back)
			if t.Failed() {
				t.Logf("%d bytes, chunks of %d, %+v", size, l.ChunkBytes(), o)
			}
		})
	}
}

// checkSound checks a store.
func checkSound(t *testing.T, cow block.Device) {
	t.Helper()
	report, err := check.Run(t.Context(), cow, check.Options{})
	if err != nil || !report.Clean() {
		t.Errorf("check: %v, %v", err, report)
	}
}

// checkMap holds qemu-img map against what the store holds: an overlay has clusters only where a part is stored.
func checkMap(t *testing.T, path string, size, cs int64, stored func(off, n int64) (bool, int64)) {
	t.Helper()
	var all []struct {
		Start, Length int64
		Depth         int
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "qcow2", path)), &all); err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		for off := m.Start; off < m.Start+m.Length; off += cs {
			any := false
			for at := off &^ (cs - 1); at < min(size, off&^(cs-1)+cs); {
				is, n := stored(at, min(size, off&^(cs-1)+cs)-at)
				any, at = any || is, at+n
			}
			if any != (m.Depth == 0) {
				t.Errorf("byte %d: stored %v, depth %d by qemu", off, any, m.Depth)
				return
			}
		}
	}
}

// TestExportSizes: special sizes, and disks far larger than what they hold.
func TestExportSizes(t *testing.T) {
	for _, c := range []struct{ size, cs int64 }{
		{0, 512}, {0, 64 << 10}, {512, 512}, {512, 2 << 20}, {1 << 40, 64 << 10}, {1 << 40, 2 << 20}, {128 << 30, 512}, {1<<40 - 512, 4096},
	} {
		src := &sparse{size: c.size, at: c.size - 512}
		for _, compress := range []bool{false, true} {
			path := filepath.Join(t.TempDir(), "out.qcow2")
			exportTo(t, path, src, ExportOptions{ClusterSize: c.cs, Compress: compress})
			f, err := OpenFile(path, FileOptions{})
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, min(512, c.size))
			if _, err := f.ReadAt(p, c.size-int64(len(p))); f.Size() != c.size || err != nil || !bytes.Equal(p, bytes.Repeat([]byte{0x5a}, len(p))) {
				t.Errorf("size %d, clusters of %d: size %d, %v", c.size, c.cs, f.Size(), err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if info, err := os.Stat(path); err != nil || info.Size() > 40<<20 {
				t.Errorf("size %d, clusters of %d: a file of %d bytes", c.size, c.cs, info.Size())
			}
			if _, err := os.Stat("/usr/bin/qemu-img"); err == nil && c.size < 1<<37 {
				run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
			}
		}
	}
}

// A sparse is a disk of zeros with one sector of 0x5a.
type sparse struct {
	block.Device // nil: it is only read
	size, at     int64
}

func (s *sparse) Size() int64 { return s.size }

func (s *sparse) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = 0
		if b := off + int64(i); b >= s.at && b < s.at+512 {
			p[i] = 0x5a
		}
	}
	return len(p), nil
}

func (s *sparse) Extents(off, n int64) ([]block.Extent, error) {
	zero := block.Hole | block.ReadsZero
	if off < s.at {
		return []block.Extent{{Length: min(n, s.at-off), Flags: zero}}, nil
	}
	return []block.Extent{{Length: n}}, nil
}

// TestExportRefused: options that can't be.
func TestExportRefused(t *testing.T) {
	dst := newTarget(t)
	for name, c := range map[string]struct {
		size int64
		o    ExportOptions
		want string
	}{
		"cluster size":      {512, ExportOptions{ClusterSize: 3 << 10}, "power of two"},
		"small clusters":    {512, ExportOptions{ClusterSize: 256}, "power of two"},
		"large clusters":    {512, ExportOptions{ClusterSize: 4 << 20}, "power of two"},
		"size":              {513, ExportOptions{}, "whole sectors"},
		"too large":         {129 << 30, ExportOptions{ClusterSize: 512}, "too large"},
		"scheme":            {512, ExportOptions{Backing: "nbd:x", BackingFormat: "raw"}, "unsuitable name"},
		"long name":         {512, ExportOptions{Backing: strings.Repeat("x", 1024), BackingFormat: "raw"}, "unsuitable name"},
		"name and clusters": {512, ExportOptions{ClusterSize: 512, Backing: strings.Repeat("x", 400), BackingFormat: "raw"}, "unsuitable name"},
		"no format":         {512, ExportOptions{Backing: "x"}, "format"},
	} {
		if err := Export(dst, &sparse{size: c.size}, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if info, err := dst.Stat(); err != nil || info.Size() != 0 {
		t.Errorf("something was written: %v", info.Size())
	}
	stop := errors.New("stop")
	err := Export(dst, memory(t, bytes.Repeat([]byte{1}, 5<<20)), ExportOptions{Progress: func(n int64) error {
		if n > 3<<20 {
			return stop
		}
		return nil
	}})
	if !errors.Is(err, stop) {
		t.Error(err)
	}
	b, err := os.ReadFile(dst.Name())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadInfo(memory(t, b)); err == nil {
		t.Error("an incomplete file is an image")
	}
}

func newTarget(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
