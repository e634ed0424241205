package repair_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/dump"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/store"
)

var update = flag.Bool("update", false, "write the golden outputs anew")

const catalogue = "../check/testdata"

// A damaged is a store of the catalogue: the text of its directory, and what comments in it ask for.
type damaged struct {
	text   string
	blocks int          // of the device
	bad    int64        // a sector that can't be read, or -1
	origin block.Device // nil: check without one
	repair repair.Options
}

func readDamaged(t *testing.T, folder string) damaged {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(folder, "store.txt"))
	if err != nil {
		t.Fatal(err)
	}
	d := damaged{text: string(b), blocks: 512, bad: -1}
	for line := range strings.Lines(d.text) {
		var n int64
		if k, _ := fmt.Sscanf(line, "# device with blocks of %d", &n); k == 1 {
			d.blocks = int(n)
		}
		if k, _ := fmt.Sscanf(line, "# device with a bad sector %d", &n); k == 1 {
			d.bad = n
		}
		if k, _ := fmt.Sscanf(line, "# origin of %d bytes", &n); k == 1 {
			d.origin = block.NewMemory(n)
		}
		if k, _ := fmt.Sscanf(line, "# repair --chunk-size %d", &n); k == 1 {
			d.repair.ChunkSectors = uint32(n)
		}
	}
	return d
}

// disk is a device with blocks of some size and a sector that can't be read.
type disk struct {
	*block.Memory
	d damaged
}

func (d disk) BlockSize() int { return d.d.blocks }

func (d disk) ReadAt(p []byte, off int64) (int, error) {
	if s := d.d.bad * 512; s >= 0 && off < s+512 && s < off+int64(len(p)) {
		return 0, errors.New("input/output error")
	}
	return d.Memory.ReadAt(p, off)
}

func (d damaged) device(t *testing.T) disk {
	t.Helper()
	var m *block.Memory
	_, err := dump.Restore(t.Context(), strings.NewReader(d.text), func(size int64) (block.Device, error) {
		m = block.NewMemory(size)
		return m, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return disk{m, d}
}

func checked(t *testing.T, dev block.Device, origin block.Device) *check.Report {
	t.Helper()
	r, err := check.Run(t.Context(), dev, check.Options{Origin: origin})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// print is what the golden file has of a check.
func print(b *bytes.Buffer, r *check.Report) {
	status := 0
	if !r.Clean() {
		status = 1
	}
	fmt.Fprintf(b, "check: exit %d, %d of %d exceptions are sound\n", status, r.Exceptions, r.Slots)
	for _, f := range r.Findings {
		fmt.Fprintf(b, "  %v\n", f)
	}
}

// TestDamageCatalogue: every problem of the table has a directory of its name. The first check finds it, repair repairs
// it as the table states, the second check finds nothing. Golden: golden.txt.
func TestDamageCatalogue(t *testing.T) {
	for _, problem := range check.Problems() {
		t.Run(problem.Code.String(), func(t *testing.T) {
			folder := filepath.Join(catalogue, problem.Code.String())
			d := readDamaged(t, folder)
			dev := d.device(t)
			before := dev.Bytes()
			var golden bytes.Buffer
			first := checked(t, dev, d.origin)
			print(&golden, first)
			if !first.Has(problem.Code) {
				t.Errorf("%v is not found", problem.Code)
			}
			if problem.Repair == check.WithChunkSize {
				if _, err := repair.NewPlan(t.Context(), dev, repair.Options{}); !errors.Is(err, repair.ErrNotRepairable) {
					t.Errorf("without the chunk size: %v", err)
				}
			}
			if out := d.repaired(t, &golden, dev); out != nil {
				second := checked(t, out, d.origin)
				print(&golden, second)
				if repairable := problem.Repair != check.NotRepairable; repairable != second.Clean() {
					t.Errorf("the table says that this is repairable: %s; then check finds %v", problem.Repair, second.Findings)
				}
				if st, err := store.Open(out); err != nil || st.Err() != nil {
					t.Errorf("the repaired store does not open: %v", err)
				}
			} else if problem.Repair != check.NotRepairable {
				t.Error("the table says that this is repairable")
			}
			if !bytes.Equal(dev.Bytes(), before) {
				t.Error("the damaged store was changed")
			}
			compare(t, filepath.Join(folder, "golden.txt"), golden.String())
			if problem.Repair != check.NotRepairable {
				d.repairInPlace(t, dev)
			}
		})
	}
}

func compare(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || got != string(want) {
		t.Errorf("got\n%swant (%s, %v)\n%s", got, path, err, want)
	}
}

// repaired repairs into a new device, or returns nil where that is refused.
func (d damaged) repaired(t *testing.T, golden *bytes.Buffer, dev block.Device) *block.Memory {
	t.Helper()
	p, err := repair.NewPlan(t.Context(), dev, d.repair)
	if errors.Is(err, repair.ErrNotRepairable) {
		fmt.Fprintf(golden, "repair: exit 2\n  %v\n", err)
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	out := block.NewMemory(p.Size())
	if err := p.Fresh(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(golden, "repair: %d bytes\n", p.Size())
	for _, r := range p.Kept() {
		fmt.Fprintf(golden, "  kept %d+%d\n", r.Off, r.Length)
	}
	for _, r := range p.Lost() {
		fmt.Fprintf(golden, "  lost %d+%d: %v\n", r.Off, r.Length, r.Code)
	}
	for _, f := range p.Missing() {
		fmt.Fprintf(golden, "  missing: %v\n", f)
	}
	sameData(t, d, dev, out)
	return out
}

// sameData: every chunk that the repaired store has is one that a slot of the damaged store named first, with
// its bytes.
func sameData(t *testing.T, d damaged, dev, out block.Device) {
	t.Helper()
	fixed, err := store.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	l := fixed.Layout()
	n := uint64(0)
	_, err = check.Run(t.Context(), dev, check.Options{ChunkSectors: d.repair.ChunkSectors, Each: func(e store.Entry, c check.Code) {
		if c != 0 {
			return
		}
		n++
		new, ok := fixed.Lookup(e.Old)
		want, got := make([]byte, l.ChunkBytes()), make([]byte, l.ChunkBytes())
		if _, err := dev.ReadAt(want, l.COWOffset(e.New)); err != nil {
			t.Fatal(err)
		}
		if _, err := out.ReadAt(got, l.COWOffset(new)); err != nil || !ok || !bytes.Equal(got, want) {
			t.Errorf("origin chunk %d: other bytes in the repaired store (%v)", e.Old, err)
		}
	}})
	if err != nil || n != fixed.Len() {
		t.Errorf("%d exceptions, want %d (%v)", fixed.Len(), n, err)
	}
}

// repairInPlace repairs a copy in place and reverts that.
func (d damaged) repairInPlace(t *testing.T, dev disk) {
	t.Helper()
	copied := disk{block.MemoryFrom(dev.Bytes()), d}
	p, err := repair.NewPlan(t.Context(), copied, d.repair)
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	changed, err := p.InPlace(t.Context(), func(write func(io.Writer) error) error { return write(&file) })
	if d.bad >= 0 || d.blocks > 512 {
		if err == nil || !bytes.Equal(copied.Bytes(), dev.Bytes()) {
			t.Errorf("in place on such a device: %v", err)
		}
		return
	}
	if err != nil || !changed {
		t.Fatalf("in place: changed %v, %v", changed, err)
	}
	if r := checked(t, copied, d.origin); !r.Clean() {
		t.Errorf("in place: then check finds %v", r.Findings)
	}
	sameData(t, d, dev, copied)
	if _, err := undo.Apply(t.Context(), bytes.NewReader(file.Bytes()), copied); err != nil {
		t.Fatal(err)
	}
	back, before := copied.Bytes(), dev.Bytes()
	if !bytes.Equal(back[:len(before)], before) {
		t.Error("taken back, it is another store")
	}
}
