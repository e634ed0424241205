package undo_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/undo"
)

// changed saves two ranges of a device and overwrites them.
func changed(t *testing.T) (before []byte, dev *block.Memory, file []byte) {
	before = make([]byte, 3<<20)
	for i := range before {
		before[i] = byte(i * 7)
	}
	dev = block.MemoryFrom(before)
	var b bytes.Buffer
	ranges := []undo.Range{{Off: 512, Length: 100}, {Off: 1 << 20, Length: 1<<20 + 5}, {Off: 3<<20 - 10, Length: 100}}
	if err := undo.Save(t.Context(), &b, dev, ranges, 4<<20); err != nil {
		t.Fatal(err)
	}
	dev.Grow(4 << 20)
	for _, r := range ranges {
		dev.WriteAt(bytes.Repeat([]byte{0xff}, int(r.Length)), r.Off)
	}
	return before, dev, b.Bytes()
}

func TestTakenBack(t *testing.T) {
	before, dev, file := changed(t)
	for range 2 { // it may be done again
		s, err := undo.Apply(t.Context(), bytes.NewReader(file), dev)
		if err != nil || s.Size != 3<<20 || s.Bytes != 100+1<<20+5+10 || s.ChangedSize != 4<<20 {
			t.Fatalf("%+v, %v", s, err)
		}
		if !bytes.Equal(dev.Bytes()[:3<<20], before) {
			t.Error("the old bytes are not back")
		}
	}
}

// Whatever is wrong with the file, nothing is written.
func TestBadFiles(t *testing.T) {
	_, dev, file := changed(t)
	now := dev.Bytes()
	flipped := bytes.Clone(file)
	flipped[len(flipped)/2] ^= 1
	for name, b := range map[string][]byte{
		"empty": nil, "text": []byte("dear all, this is no undo file"), "cut": file[:len(file)-1], "cut early": file[:20],
		"flipped": flipped, "no checksum": file[:len(file)-32], "huge": append([]byte("dmsnap undo 1\n{}\n"), bytes.Repeat([]byte{0x7f}, 99)...),
		"long head": append([]byte("dmsnap undo 1\n"), bytes.Repeat([]byte(" "), 9999)...),
	} {
		if _, err := undo.Apply(t.Context(), bytes.NewReader(b), dev); !errors.Is(err, undo.ErrFormat) && !errors.Is(err, undo.ErrOtherDevice) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := undo.Apply(t.Context(), bytes.NewReader(file), block.NewMemory(5<<20)); !errors.Is(err, undo.ErrOtherDevice) {
		t.Errorf("another device: %v", err)
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
