package offline_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/store"
)

// TestExport: what a snapshot shows, as a file, in order, and as a qcow2 overlay, whose backing file is the origin; what is no
// snapshot is refused, and no output is made then.
func TestExport(t *testing.T) {
	p := newPair(t)
	in := func(name string) string { return filepath.Join(p.dir, name) }
	names := []string{p.origin, p.cow}
	if err := offline.Export(t.Context(), names, in("old.img"), offline.ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, in("old.img"), p.shown)
	var b bytes.Buffer
	if err := offline.Export(t.Context(), names, "", offline.ExportOptions{To: &b}); err != nil || !bytes.Equal(b.Bytes(), p.shown) {
		t.Errorf("in order: %d bytes, which are others, or %v", b.Len(), err)
	}
	overlay := offline.ExportOptions{QCOW2: true, Backing: "disk.img"}
	if err := offline.Export(t.Context(), names, in("old.qcow2"), overlay); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	read := offline.ExportOptions{Source: source.Options{Follow: true}, To: &b}
	if err := offline.Export(t.Context(), []string{in("old.qcow2")}, "", read); err != nil || !bytes.Equal(b.Bytes(), p.shown) {
		t.Errorf("of the overlay: %d bytes, which are others, or %v", b.Len(), err)
	}

	for _, c := range []struct {
		names []string
		out   string
		o     offline.ExportOptions
		want  error
	}{
		{[]string{p.origin}, in("x"), offline.ExportOptions{}, offline.ErrWholeDisk},
		{names, in("old.img"), offline.ExportOptions{}, os.ErrExist},
		{names, p.dir, offline.ExportOptions{Force: true}, newfile.ErrNotRegular},
	} {
		if err := offline.Export(t.Context(), c.names, c.out, c.o); !errors.Is(err, c.want) {
			t.Errorf("%v to %s: %v, want %v", c.names, c.out, err, c.want)
		}
	}
	if _, err := os.Lstat(in("x")); err == nil {
		t.Error("a refused export left a file")
	}
	wantContent(t, p.origin, p.old)
}

// TestExportOfHoles: holes of the origin are not read, whatever is wrapped around it.
func TestExportOfHoles(t *testing.T) {
	p := newPair(t)
	const size = 1 << 40
	if err := os.Truncate(p.origin, size); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(p.dir, "old.img")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := offline.Export(ctx, []string{p.origin, p.cow}, out, offline.ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	f := open(t, out)
	defer f.Close()
	got := make([]byte, len(p.shown))
	if _, err := f.ReadAt(got, 0); err != nil || f.Size() != size || !bytes.Equal(got, p.shown) {
		t.Errorf("%d bytes, of which the first are others, or %v", f.Size(), err)
	}
}

// TestRevalidate: an invalid store is refused, its copy is valid, and so is the store itself afterwards; the undo file takes that back.
func TestRevalidate(t *testing.T) {
	p := newPair(t)
	valid, err := os.ReadFile(p.cow)
	if err != nil {
		t.Fatal(err)
	}
	invalid := bytes.Clone(valid)
	h := ondisk.DecodeHeader(invalid[:ondisk.HeaderSize])
	h.Valid = 0
	h.Encode(invalid[:ondisk.HeaderSize])
	if err := os.WriteFile(p.cow, invalid, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := offline.Export(t.Context(), []string{p.origin, p.cow}, filepath.Join(p.dir, "x"), offline.ExportOptions{}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("the export of an invalid store: %v", err)
	}
	again, undo := filepath.Join(p.dir, "again.cow"), filepath.Join(p.dir, "undo")
	if _, err := offline.Revalidate(t.Context(), p.cow, again, offline.RepairOptions{}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, again, valid)
	wantContent(t, p.cow, invalid)
	saved, explained := 0, 0
	o := offline.RepairOptions{Saved: func() {
		saved++
		wantContent(t, p.cow, invalid)
	}, Explain: func(about string) error {
		explained++
		if wantContent(t, p.cow, invalid); !strings.Contains(about, "are certain; all other ranges show the current content of the origin") {
			t.Errorf("it says %q", about)
		}
		return nil
	}}
	for _, changed := range []bool{true, false} {
		if res, err := offline.RevalidateInPlace(t.Context(), p.cow, undo, o); err != nil || res.Changed != changed || saved != 1 || explained != 1 {
			t.Fatalf("%+v, %v, saved %d times, explained %d times", res, err, saved, explained)
		}
		got, err := os.ReadFile(p.cow)
		if err != nil {
			t.Fatal(err)
		}
		clear(got[ondisk.ChangeLabelAt:][:ondisk.ChangeLabelBytes])
		if !bytes.Equal(got, valid) {
			t.Errorf("%s has other content, beside its label", p.cow)
		}
	}
	if _, err := offline.TakeBack(t.Context(), p.cow, undo); err != nil {
		t.Fatal(err)
	}
	wantContent(t, p.cow, invalid)
	if err := os.WriteFile(p.cow, valid, 0o600); err != nil { // it is checked in the end
		t.Fatal(err)
	}
}

// TestRepair: of a store with two exceptions for one chunk a sound copy, and the store itself.
func TestRepair(t *testing.T) {
	p := newPair(t)
	cow := open(t, p.cow)
	slots := make([]byte, 32)
	area := int64(ondisk.DefaultChunkSectors) * ondisk.SectorSize // the first one
	if _, err := cow.ReadAt(slots, area); err != nil {
		t.Fatal(err)
	}
	copy(slots[16:], slots[:16])
	if _, err := cow.WriteAt(slots, area); err != nil {
		t.Fatal(err)
	}
	if err := cow.Close(); err != nil {
		t.Fatal(err)
	}
	out, undo := filepath.Join(p.dir, "sound.cow"), filepath.Join(p.dir, "undo")
	made, err := offline.Repair(t.Context(), p.cow, out, offline.RepairOptions{})
	if err != nil || len(made.Found) == 0 {
		t.Fatalf("%+v, %v", made, err)
	}
	checkStore(t, out)
	saved := false
	made, err = offline.RepairInPlace(t.Context(), p.cow, undo, offline.RepairOptions{Saved: func() { saved = true }})
	if err != nil || !made.Changed || !saved {
		t.Fatalf("%+v, %v, saved: %t", made, err, saved)
	}
}
