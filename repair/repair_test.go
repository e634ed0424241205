package repair_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"reflect"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/repair"
)

// image makes a COW device of slots as they stand in b, with a number in each data chunk.
func image(b []byte, sectors int64, l ondisk.Layout) *block.Memory {
	dev := block.NewMemory(sectors * 512)
	for m := ondisk.FirstDataChunk; uint64(m) < l.Chunks(dev.Size(), false); m++ {
		dev.WriteAt(binary.LittleEndian.AppendUint32(nil, uint32(m)), l.COWOffset(m))
	}
	if l.Chunks(dev.Size(), false) > 0 {
		var h [ondisk.HeaderSize]byte
		ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: l.ChunkSectors}.Encode(h[:])
		dev.WriteAt(h[:], 0)
	}
	if l.Chunks(dev.Size(), false) > 1 {
		block.Zero(dev, l.ChunkBytes(), l.ChunkBytes(), 0)
	}
	for n := uint64(0); len(b) >= ondisk.SlotSize; n, b = n+1, b[ondisk.SlotSize:] {
		dev.WriteAt(b[:ondisk.SlotSize], l.SlotOffset(ondisk.Slot{Area: n / l.SlotsPerArea(), Index: n % l.SlotsPerArea()}))
	}
	return dev
}

func slots(pairs ...uint64) (b []byte) {
	for _, n := range pairs {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return b
}

// FuzzRepair: whatever the slots say, what comes out is clean, in a new store and in place, has the data of
// the old one, and can be taken back.
func FuzzRepair(f *testing.F) {
	f.Add([]byte{}, uint8(40), uint8(0))
	f.Add(slots(5, 9, 6, 3, 7, 30, 8, 3, 9, 1, 5, 4), uint8(40), uint8(0))
	full := []byte{}
	for i := range uint64(32) {
		full = append(full, slots(i*3, i+2)...)
	}
	f.Add(full, uint8(34), uint8(0))
	f.Add(append(bytes.Clone(full), slots(1, 38, 2, 0, 9, 9)...), uint8(80), uint8(0))
	f.Add(slots(1, 2, 1<<63, 3, 4, 1<<56, 1<<53, 5), uint8(60), uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, sectors, shift uint8) {
		l := ondisk.Layout{ChunkSectors: 1 << (shift % 3)}
		dev := image(b, int64(sectors), l)
		before := dev.Bytes()
		p, err := repair.NewPlan(t.Context(), dev, repair.Options{})
		if errors.Is(err, repair.ErrNotRepairable) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		out := block.NewMemory(p.Size())
		if err := p.Fresh(t.Context(), out); err != nil {
			t.Fatal(err)
		}
		if r := checked(t, out, nil); !r.Clean() {
			t.Fatalf("a new store with %v", r.Findings)
		}
		sameData(t, damaged{}, dev, out)

		var file bytes.Buffer
		changed, err := p.InPlace(t.Context(), func(write func(io.Writer) error) error {
			return write(&file)
		})
		if err != nil {
			t.Fatal(err)
		}
		if r := checked(t, dev, nil); !r.Clean() {
			t.Fatalf("in place, with %v", r.Findings)
		}
		now := bytes.Clone(dev.Bytes()[:len(before)])
		copy(now[ondisk.ChangeLabelAt:][:ondisk.ChangeLabelBytes], before[ondisk.ChangeLabelAt:]) // but for the label
		if changed == p.Report.Clean() && !(changed && bytes.Equal(now, before)) {
			t.Fatalf("changed %v a store with %v", changed, p.Report.Findings)
		}
		sameData(t, damaged{}, block.MemoryFrom(before), dev)
		if !changed {
			return
		}
		if _, err := undo.Apply(t.Context(), bytes.NewReader(file.Bytes()), dev); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dev.Bytes()[:len(before)], before) {
			t.Fatal("taken back, it is another store")
		}
	})
}

// TestKernelCases: a sound store of a kernel's is kept whole, and nothing is done to it in place.
func TestKernelCases(t *testing.T) {
	cases := kernelcase.All(t)
	for _, c := range cases {
		if c.Header == nil {
			continue
		}
		cow, err := c.COW()
		if err != nil {
			t.Fatal(err)
		}
		dev := block.MemoryFrom(cow)
		p, err := repair.NewPlan(t.Context(), dev, repair.Options{})
		if c.Header.Valid == 0 {
			if !errors.Is(err, repair.ErrNotRepairable) {
				t.Errorf("%s: %v", c.Name, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		changed, err := p.InPlace(t.Context(), func(func(io.Writer) error) error { return errors.New("something would change") })
		if changed || err != nil || p.Len() != uint64(len(c.Exceptions)) || len(p.Lost()) > 0 {
			t.Errorf("%s: changed %v, %v, kept %d", c.Name, changed, err, p.Len())
		}
		out := block.NewMemory(p.Size())
		if err := p.Fresh(t.Context(), out); err != nil {
			t.Fatal(err)
		}
		if r := checked(t, out, nil); !r.Clean() {
			t.Errorf("%s: %v", c.Name, r.Findings)
		}
	}
}

// A data chunk that can't be read is lost, and only it; in place it ends the work with the slots untouched.
func TestUnreadableData(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 8}
	dev := disk{image(slots(5, 2, 6, 3, 7, 5, 7, 6), 160, l), damaged{bad: 5 * 8, blocks: 512}}
	p, err := repair.NewPlan(t.Context(), dev, repair.Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := dev.Bytes()
	if _, err := p.InPlace(t.Context(), func(write func(io.Writer) error) error { return write(io.Discard) }); err == nil {
		t.Error("an unreadable chunk was moved")
	}
	if !bytes.Equal(dev.Bytes()[:8192], before[:8192]) {
		t.Error("metadata was changed")
	}
	out := block.NewMemory(p.Size())
	if err := p.Fresh(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	want := []repair.Lost{{Range: block.Range{Off: 7 * 4096, Length: 4096}, Code: check.Unreadable}}
	if got := p.Lost(); !reflect.DeepEqual(got, want) || p.Len() != 2 {
		t.Errorf("lost %v, kept %d", got, p.Len())
	}
	if r := checked(t, out, nil); !r.Clean() {
		t.Error(r.Findings)
	}
}

// A save that fails, and a context that ends, leave the store as it was.
func TestNothingIsChangedBeforeItIsSaved(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 8}
	dev := image(slots(5, 9, 5, 3), 160, l)
	before := dev.Bytes()
	p, err := repair.NewPlan(t.Context(), dev, repair.Options{})
	if err != nil {
		t.Fatal(err)
	}
	full := errors.New("no space for the undo file")
	changed, err := p.InPlace(t.Context(), func(write func(io.Writer) error) error {
		var file bytes.Buffer
		if err := write(&file); err != nil {
			t.Error(err)
		}
		// The hole, the area and the first sector.
		if s, err := undo.Apply(t.Context(), bytes.NewReader(file.Bytes()), dev); err != nil || s.Bytes != 2*4096+512 || s.ChangedSize != dev.Size() {
			t.Errorf("asked to save %+v, %v", s, err)
		}
		return full
	})
	if changed || !errors.Is(err, full) || !bytes.Equal(dev.Bytes(), before) {
		t.Errorf("changed %v, %v", changed, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Fresh(ctx, block.NewMemory(p.Size())); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// A device that can't grow is left alone where it must.
func TestNoRoomInPlace(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 1}
	var b []byte
	for i := range uint64(32) {
		b = append(b, slots(i, i+2)...)
	}
	dev := image(b, 34, l)
	p, err := repair.NewPlan(t.Context(), blocktest.Plain(dev), repair.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.InPlace(t.Context(), func(func(io.Writer) error) error { t.Error("saved"); return nil }); err == nil {
		t.Error("it had no space")
	}
}
