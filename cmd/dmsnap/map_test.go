package main

import (
	"github.com/dmsnap/dmsnap/inspect"

	"bytes"
	"encoding/xml"
	"errors"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMap(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	before := digests(t, p.dir)
	m := mustJSON[inspect.Map](t, "map", p.cow, "--origin", p.origin)
	if m.DiskBytes != int64(len(p.content)) || !m.DiskKnown || m.StoredBytes != 4*4096+2048 || m.UnusedChunks != 0 || m.Exceptions != 5 {
		t.Errorf("figures %+v", m)
	}
	// Chunks 24 and 25 are the one pair of neighbours, side by side in COW too.
	if want := (inspect.Fragmentation{Runs: 4, MeanBytes: 5120, LongestBytes: 8192, Neighbours: 1}); m.Fragmentation != want {
		t.Errorf("fragmentation %+v, want %+v", m.Fragmentation, want)
	}
	if len(m.DiskCells) != jsonCells || m.DiskCells[0] != 1 || m.DiskCells[500] != 0 || m.DiskCells[jsonCells-1] != 1 {
		t.Errorf("%d cells, %v %v %v", len(m.DiskCells), m.DiskCells[0], m.DiskCells[500], m.DiskCells[len(m.DiskCells)-1])
	}
	if m.COWCells[0] != 1 || m.COWCells[jsonCells/2] != 0 {
		t.Errorf("cells of COW begin with %v, in the middle %v", m.COWCells[0], m.COWCells[jsonCells/2])
	}
	text := mustRun(t, "map", p.cow, "--origin", p.origin)
	for _, w := range []string{"disk, 1.0 MiB\n", "c in COW 1.8 %", "0 bytes  MdDDDDD.", "0 %: 0 of 1 neighbouring", "the longest 8 KiB", "/2080 16"} {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in\n%s", w, text)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Error("colours where there is no terminal")
	}
	if text := mustRun(t, "map", p.cow, "--color", "always"); !strings.Contains(text, "\x1b[") || !strings.Contains(text, "or more") {
		t.Errorf("--color always, size unknown:\n%s", text)
	}
	wantSame(t, p.dir, before)
}

// A store whose COW device has chunks that nobody names, and neighbours that are apart.
func TestMapOfAFragmentedStore(t *testing.T) {
	p := newPair(t)
	p.withStore(t) // COW chunks 2, 3 and 4, 5, 6 for origin chunks 0, 24 and 25, 122, 256
	patch(4096+3*16, 26)(t, &p)
	patch(4096+4*16+8, 20)(t, &p)
	m := mustJSON[inspect.Map](t, "map", p.cow)
	if want := (inspect.Fragmentation{Runs: 3, MeanBytes: 6826, LongestBytes: 12288, Neighbours: 2}); m.Fragmentation != want {
		t.Errorf("fragmentation %+v, want %+v", m.Fragmentation, want)
	}
	if m.UnusedChunks != 14 { // 6 to 19
		t.Errorf("%d unused chunks", m.UnusedChunks)
	}
	patch(4096+2*16, 27)(t, &p)
	m = mustJSON[inspect.Map](t, "map", p.cow)
	if want := (inspect.Fragmentation{Runs: 5, MeanBytes: 4096, LongestBytes: 4096, Neighbours: 1, Jumps: 1, Percent: 100}); m.Fragmentation != want {
		t.Errorf("fragmentation %+v, want %+v", m.Fragmentation, want)
	}
	if text := mustRun(t, "map", p.cow); !strings.Contains(text, "14 chunks allocated and used by no exception") || !strings.Contains(text, "U") {
		t.Errorf("it draws\n%s", text)
	}
}

// An area between two chunks is no jump: the next chunk had no other place.
func TestMapAcrossAnArea(t *testing.T) {
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow, "--chunk-size", "512")
	p.write(t, 512, make([]byte, 40*512))
	m := mustJSON[inspect.Map](t, "map", p.cow)
	if want := (inspect.Fragmentation{Runs: 2, MeanBytes: 10240, LongestBytes: 32 * 512, Neighbours: 39}); m.Fragmentation != want {
		t.Errorf("fragmentation %+v, want %+v", m.Fragmentation, want)
	}
}

func TestMapOfAnEmptyStore(t *testing.T) {
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow)
	m := mustJSON[inspect.Map](t, "map", p.cow)
	if m.DiskBytes != 0 || m.DiskKnown || m.Fragmentation != (inspect.Fragmentation{}) || len(m.DiskCells) != 1 {
		t.Errorf("%+v", m)
	}
	mustRun(t, "map", p.cow)
	mustRun(t, "map", p.cow, "--origin", p.origin)
}

func TestMapPictures(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	svg, img := filepath.Join(p.dir, "map.svg"), filepath.Join(p.dir, "map.png")
	before := digests(t, p.dir)
	mustRun(t, "map", p.cow, "--origin", p.origin, "--svg", svg, "--png", img)
	if _, err := png.Decode(bytes.NewReader(readFile(t, img))); err != nil {
		t.Error(err)
	}
	d := xml.NewDecoder(bytes.NewReader(readFile(t, svg)))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	made := digests(t, p.dir)
	// Nothing is overwritten unasked, and the other picture isn't written either.
	dmsnap("map", p.cow, "--svg", svg).wantRefused(t, svg, "exists", "--force")
	dmsnap("map", p.cow, "--svg", filepath.Join(p.dir, "new.svg"), "--png", img).wantRefused(t, img, "exists", "--force")
	wantSame(t, p.dir, made)
	mustRun(t, "map", p.cow, "--force", "--svg", svg)
	if bytes.Equal(readFile(t, svg), nil) || digests(t, p.dir)["map.svg"] == made["map.svg"] {
		t.Error("--force did not replace the picture")
	}
	os.Remove(svg)
	os.Remove(img)
	for _, in := range []string{p.origin, p.cow} {
		dmsnap("map", "--force", p.cow, "--origin", p.origin, "--png", in).wantRefused(t, in, "same file")
	}
	dmsnap("map", p.cow, "--svg", svg, "--png", svg).wantRefused(t, svg, "both")
	dmsnap("map", p.cow, "--svg", filepath.Join(p.dir, "missing", "a.svg")).wantRefused(t, "missing")
	os.Truncate(p.origin, 1<<19)
	before["disk.img"] = digests(t, p.dir)["disk.img"]
	dmsnap("map", p.cow, "--origin", p.origin, "--svg", svg).wantRefused(t, "too small")
	wantSame(t, p.dir, before)
}
