package undo_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
)

// with fills a range with a byte.
func with(b byte) func(p []byte, off int64) error {
	return func(p []byte, off int64) error {
		copy(p, bytes.Repeat([]byte{b}, len(p)))
		return nil
	}
}

var changes = []undo.Change{{512, 1024, with(0xff)}, {1 << 20, 1<<20 + 512, with(0xee)}, {3<<20 - 512, 1024, with(0xdd)}}

// store is a device of 3 MiB.
func store(seed int) *block.Memory {
	b := make([]byte, 3<<20)
	for i := range b {
		b[i] = byte(i*7 + seed)
	}
	return block.MemoryFrom(b)
}

// changed keeps a change of a device, and makes the first so many steps of it.
func changed(t *testing.T, dev *block.Memory, steps int) (file []byte) {
	t.Helper()
	first := make([]byte, ondisk.SectorSize)
	dev.ReadAt(first, 0)
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8}.Encode(first)
	u := undo.New(dev, changes, first, 4<<20)
	var b bytes.Buffer
	if err := u.Save(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	do := []func(){func() {
		if err := u.Mark(); err != nil {
			t.Fatal(err)
		}
	}, func() { dev.Grow(4 << 20) }}
	for _, c := range changes {
		do = append(do, func() {
			p := make([]byte, c.Length)
			c.After(p, c.Off)
			dev.WriteAt(p[:512], c.Off)
		}, func() {
			p := make([]byte, c.Length)
			c.After(p, c.Off)
			dev.WriteAt(p, c.Off)
		})
	}
	do = append(do, func() { dev.WriteAt(first[:ondisk.HeaderSize], 0) })
	for _, step := range do[:min(steps, len(do))] {
		step()
	}
	return b.Bytes()
}

func TestTakenBack(t *testing.T) {
	for steps := range 10 {
		dev := store(0)
		before := bytes.Clone(dev.Bytes())
		file := changed(t, dev, steps)
		for range 2 { // it may be done again
			s, err := undo.Apply(t.Context(), bytes.NewReader(file), dev)
			if err != nil || s.Size != 3<<20 || s.Bytes != 1024+1<<20+512+512+512 || s.ChangedSize != 4<<20 {
				t.Fatalf("%d steps: %+v, %v", steps, s, err)
			}
			if !bytes.Equal(dev.Bytes()[:3<<20], before) {
				t.Errorf("%d steps: the old bytes are not back", steps)
			}
		}
	}
}

// An undo file is refused by every other store, of the same size too, and by its own when that was written to since.
func TestOtherStores(t *testing.T) {
	dev := store(0)
	file := changed(t, dev, 99)
	others := map[string]*block.Memory{"another store": store(1), "longer": block.NewMemory(5 << 20), "the same before it was changed, and used since": store(0)}
	others["the same before it was changed, and used since"].WriteAt([]byte("used"), 1<<20)
	twin := store(0)
	changed(t, twin, 99) // the same change of an equal store, by another repair
	others["a twin"] = twin
	since := block.MemoryFrom(dev.Bytes())
	since.WriteAt([]byte("written since"), 2<<20)
	others["written to since"] = since
	unmarked := block.MemoryFrom(dev.Bytes())
	unmarked.WriteAt(make([]byte, 36), ondisk.ChangeLabelAt)
	others["without the label"] = unmarked
	for name, other := range others {
		before := bytes.Clone(other.Bytes())
		if _, err := undo.Apply(t.Context(), bytes.NewReader(file), other); !errors.Is(err, undo.ErrOtherDevice) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(other.Bytes(), before) {
			t.Errorf("%s: it was changed", name)
		}
	}
	copied := block.MemoryFrom(dev.Bytes())
	if _, err := undo.Apply(t.Context(), bytes.NewReader(file), copied); err != nil {
		t.Errorf("a copy: %v", err)
	}
}

// Whatever is wrong with the file, nothing is written.
func TestBadFiles(t *testing.T) {
	dev := store(0)
	file := changed(t, dev, 99)
	now := bytes.Clone(dev.Bytes())
	flipped := bytes.Clone(file)
	flipped[len(flipped)/2] ^= 1
	for name, b := range map[string][]byte{
		"empty": nil, "text": []byte("dear all, this is no undo file"), "cut": file[:len(file)-1], "cut early": file[:20],
		"flipped": flipped, "no checksum": file[:len(file)-32], "huge": append([]byte("dmsnap undo 2\n{}\n"), bytes.Repeat([]byte{0x7f}, 99)...),
		"long head": append([]byte("dmsnap undo 2\n"), bytes.Repeat([]byte(" "), 9999)...),
	} {
		if _, err := undo.Apply(t.Context(), bytes.NewReader(b), dev); !errors.Is(err, undo.ErrFormat) && !errors.Is(err, undo.ErrOtherDevice) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := undo.Apply(t.Context(), strings.NewReader("dmsnap undo 1\n{}\n"), dev); !errors.Is(err, undo.ErrFormat) || !strings.Contains(err.Error(), "first format") {
		t.Errorf("the first format: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := undo.Apply(ctx, bytes.NewReader(file), dev); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if !bytes.Equal(dev.Bytes(), now) {
		t.Error("the device was changed")
	}
}
