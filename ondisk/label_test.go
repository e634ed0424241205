package ondisk_test

import (
	"errors"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

// The labels and the header do not overlap, and a label with one damaged byte is not recognised.
func TestLabels(t *testing.T) {
	sector := make([]byte, ondisk.SectorSize)
	if _, ok := ondisk.DecodeUndoLabel(sector); ok {
		t.Error("a label of zeros")
	}
	undo := ondisk.UndoLabel{ID: [16]byte{1, 15: 2}, Exceptions: 1 << 40, OriginSize: 1 << 50, Merged: true, Undo: true}
	change := ondisk.ChangeLabel{ID: [16]byte{3, 15: 4}}
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8}.Encode(sector)
	header := string(sector[:ondisk.HeaderSize])
	undo.Encode(sector)
	change.Encode(sector)
	if got, ok := ondisk.DecodeUndoLabel(sector); !ok || got != undo {
		t.Errorf("%+v, %v", got, ok)
	}
	if got, ok := ondisk.DecodeChangeLabel(sector); !ok || got != change {
		t.Errorf("%+v, %v", got, ok)
	}
	if string(sector[:ondisk.HeaderSize]) != header || string(sector[256:272]) != "dmsnap undo id 1" {
		t.Error("a label is not where disks have it")
	}
	for _, at := range []int{256, 275, 315, 320, 340, 355} {
		sector[at] ^= 1
		_, isUndo := ondisk.DecodeUndoLabel(sector)
		_, isChange := ondisk.DecodeChangeLabel(sector)
		if isUndo == (at < 320) || isChange == (at >= 320) {
			t.Errorf("byte %d damaged: %v, %v", at, isUndo, isChange)
		}
		sector[at] ^= 1
	}
}

// An origin's label is beside the others; raw has none; damaged it is an error, since an origin in another format shows other bytes.
func TestOriginLabel(t *testing.T) {
	sector := make([]byte, ondisk.SectorSize)
	ondisk.OriginLabel{Format: ondisk.RawFormat}.Encode(sector)
	ondisk.OriginLabel{}.Encode(sector)
	if string(sector) != string(make([]byte, ondisk.SectorSize)) {
		t.Error("a raw origin has a label")
	}
	if got, err := ondisk.DecodeOriginLabel(sector); err != nil || got.Format != ondisk.RawFormat {
		t.Errorf("%+v, %v", got, err)
	}
	undo, merge := ondisk.UndoLabel{ID: [16]byte{1}}, ondisk.MergeLabel{ID: [16]byte{2}}
	ondisk.OriginLabel{Format: "qcow2"}.Encode(sector)
	undo.Encode(sector)
	merge.Encode(sector)
	if got, err := ondisk.DecodeOriginLabel(sector); err != nil || got.Format != "qcow2" || string(sector[464:469]) != "qcow2" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, ok := ondisk.DecodeMergeLabel(sector); !ok || got != merge {
		t.Errorf("%+v, %v", got, ok)
	}
	for at := 464; at < 484; at++ {
		sector[at] ^= 0x40
		if got, err := ondisk.DecodeOriginLabel(sector); err == nil {
			t.Errorf("byte %d damaged: %+v", at, got)
		}
		sector[at] ^= 0x40
	}
}

// A sealed store's label is beside all others, and is one only in a store.
func TestSealedLabel(t *testing.T) {
	sector := make([]byte, ondisk.SectorSize)
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: ondisk.Version, ChunkSectors: 8}.Encode(sector)
	undo, change, merge := ondisk.UndoLabel{ID: [16]byte{1}}, ondisk.ChangeLabel{ID: [16]byte{2}}, ondisk.MergeLabel{ID: [16]byte{3}}
	undo.Encode(sector)
	change.Encode(sector)
	merge.Encode(sector)
	ondisk.OriginLabel{Format: "qcow2"}.Encode(sector)
	if err := ondisk.CheckUnsealed(sector); err != nil {
		t.Error(err)
	}
	ondisk.SealedLabel{}.Encode(sector)
	if err := ondisk.CheckUnsealed(sector); !errors.Is(err, ondisk.ErrSealed) {
		t.Errorf("sealed: %v", err)
	}
	if got, ok := ondisk.DecodeUndoLabel(sector); !ok || got != undo {
		t.Errorf("%+v, %v", got, ok)
	}
	if got, ok := ondisk.DecodeChangeLabel(sector); !ok || got != change {
		t.Errorf("%+v, %v", got, ok)
	}
	if got, ok := ondisk.DecodeMergeLabel(sector); !ok || got != merge {
		t.Errorf("%+v, %v", got, ok)
	}
	if got, err := ondisk.DecodeOriginLabel(sector); err != nil || got.Format != "qcow2" {
		t.Errorf("%+v, %v", got, err)
	}
	if h := ondisk.DecodeHeader(sector); h.Check() != nil || h.ChunkSectors != 8 {
		t.Errorf("%+v", h)
	}
	sector[0] = 0
	if err := ondisk.CheckUnsealed(sector); err != nil {
		t.Errorf("no store: %v", err)
	}
}

// A label of a version has it, and is damaged where any of its bytes is; programs that don't know versions find a format that they don't know.
func TestOriginVersion(t *testing.T) {
	sector := make([]byte, ondisk.SectorSize)
	format := ondisk.OriginVersion(ondisk.RawFormat, [32]byte{1, 2, 23: 0xff, 24: 7})
	ondisk.OriginLabel{Format: format}.Encode(sector)
	if got, err := ondisk.DecodeOriginLabel(sector); err != nil || got.Format != format || string(sector[464:470]) != "raw+id" {
		t.Fatalf("%+v, %v", got, err)
	}
	if name, version := ondisk.CutOriginVersion(format); name != ondisk.RawFormat || len(version) != 48 || version[:4] != "0102" {
		t.Errorf("%q, %q", name, version)
	}
	for at := 464; at < 512; at++ {
		sector[at] ^= 0x40
		if got, err := ondisk.DecodeOriginLabel(sector); err == nil {
			t.Errorf("byte %d damaged: %+v", at, got)
		}
		sector[at] ^= 0x40
	}
}
