package check_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// image makes a COW device of the given number of chunks with a header and exceptions in consecutive slots.
func image(sectors uint32, chunks uint64, es ...ondisk.Exception) *block.Memory {
	l := ondisk.Layout{ChunkSectors: sectors}
	dev := block.NewMemory(int64(chunks) * l.ChunkBytes())
	var b [ondisk.SlotSize]byte
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: sectors}.Encode(b[:])
	dev.WriteAt(b[:], 0)
	for n, e := range es {
		put(dev, l, uint64(n), e)
	}
	return dev
}

// es are exceptions as pairs of origin and COW chunk.
type es [][2]uint64

func (list es) all() (all []ondisk.Exception) {
	for _, e := range list {
		all = append(all, ondisk.Exception{Old: ondisk.OriginChunk(e[0]), New: ondisk.COWChunk(e[1])})
	}
	return all
}

// put writes the n-th slot of the store.
func put(dev block.Device, l ondisk.Layout, n uint64, e ondisk.Exception) {
	var b [ondisk.SlotSize]byte
	e.Encode(b[:])
	if _, err := dev.WriteAt(b[:], l.SlotOffset(ondisk.Slot{Area: n / l.SlotsPerArea(), Index: n % l.SlotsPerArea()})); err != nil {
		panic(err)
	}
}

// inOrder is what a kernel writes: n exceptions for origin chunks from old on.
func inOrder(l ondisk.Layout, n uint64, old ondisk.OriginChunk) []ondisk.Exception {
	es := make([]ondisk.Exception, n)
	for i := range es {
		es[i] = ondisk.Exception{Old: old + ondisk.OriginChunk(i), New: l.DataChunk(uint64(i))}
	}
	return es
}

func run(t *testing.T, dev block.Device, o check.Options) *check.Report {
	t.Helper()
	r, err := check.Run(t.Context(), dev, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// codes are the codes found, each once, ascending.
func codes(r *check.Report) string {
	var list []string
	for c := range r.Found {
		list = append(list, c.String())
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

// TestFindings wants each problem, and nothing else, at its place with both sides of the story.
func TestFindings(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 1}
	full := inOrder(l, 32, 100)
	for _, c := range []struct {
		name string
		dev  *block.Memory
		want string   // codes
		say  []string // in the findings
	}{
		{"sound", image(1, 40, full...), "", nil},
		{"empty", image(8, 2), "", nil},
		{"two areas", image(1, 100, inOrder(l, 60, 5)...), "", nil},
		{"duplicate", image(8, 9, es{{5, 2}, {6, 3}, {5, 4}}.all()...), "DS015", []string{"area 0 slot 2, byte 0x1020", "COW chunk 4 here (kernel 6.12", "COW chunk 2 in area 0 slot 0, byte 0x1000 (kernel 6.1 "}},
		{"duplicate of a rejected one", image(8, 9, es{{5, 1}, {5, 2}, {5, 3}}.all()...), "DS015 DS017", []string{"chunk 2 in area 0 slot 1"}},
		{"shared", image(8, 9, es{{5, 2}, {6, 3}, {7, 3}}.all()...), "DS019", []string{"origin chunk 7 here, and origin chunk 6 in area 0 slot 1"}},
		{"past the device", image(8, 9, es{{5, 2}, {6, 77}, {7, 3}}.all()...), "DS016", []string{"area 0 slot 1", "COW chunk 77", "9 chunks"}},
		{"cut", image(8, 4, es{{5, 2}, {6, 3}, {7, 4}, {8, 5}}.all()...), "DS012", []string{"area 0 slot 2", "2 exceptions", "16384 bytes", "at least 24576"}},
		{"area", image(8, 9, es{{5, 1}}.all()...), "DS017", []string{"COW chunk 1, which is area 0"}},
		{"later area", image(1, 99, es{{5, 2}, {6, 67}}.all()...), "DS017", nil},
		{"too large", image(8, 9, es{{5, 1 << 56}, {6, 2}}.all()...), "DS018", nil},
		{"origin impossible", image(8, 9, es{{1 << 60, 2}}.all()...), "DS020", nil},
		{"hole", image(8, 20, es{{5, 10}}.all()...), "DS022", []string{"COW chunk 2, byte 0x2000", "8 chunks are", "holes: 1, chunks in this one: 8"}},
		{"hole over an area", image(1, 40, es{{5, 2}, {6, 36}}.all()...), "DS022", []string{"32 chunks are"}},
		{"out of order", image(8, 9, es{{5, 4}, {6, 3}, {7, 2}}.all()...), "DS023", []string{"area 0 slot 1", "2 slots"}},
		{"void", image(8, 9, es{{5, 2}, {}, {7, 3}, {}, {9, 4}}.all()...), "DS013", []string{"area 0 slot 2", "2 slots", "the last is slot 4", "origin chunk 7"}},
		{"header named", image(8, 9, es{{5, 2}, {6, 0}}.all()...), "DS014", []string{"area 0 slot 1", "origin chunk 6"}},
		{"no end", image(1, 34, full...), "DS010", []string{"area 1, byte 0x4400"}},
		{"area cut off", image(1, 30, full...), "DS011 DS012", []string{"area 1, byte 0x4400", "4 exceptions"}},
		{"far too small", image(8, 1), "DS006", []string{"8192 bytes; the device has 4096"}},
		{"nothing", block.NewMemory(0), "DS006", nil},
		{"zeros", block.NewMemory(8192), "DS001", nil},
		{"text", block.MemoryFrom([]byte(strings.Repeat("dear all\n", 999))), "DS002", []string{"0x72616564"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := run(t, c.dev, check.Options{})
			if got := codes(r); got != c.want {
				t.Errorf("found %q, want %q", got, c.want)
			}
			text := ""
			for _, f := range r.Findings {
				text += f.String() + "\n"
			}
			for _, s := range c.say {
				if !strings.Contains(text, s) {
					t.Errorf("%s does not say %q", text, s)
				}
			}
		})
	}
}

// An area of which only a part is on the device, as the partial chunk at its end.
func TestAreaPartlyOnTheDevice(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 2}
	b := image(2, 66, inOrder(l, 64, 0)...).Bytes()
	r := run(t, block.MemoryFrom(append(b, make([]byte, 512)...)), check.Options{})
	if codes(r) != "DS011" || !strings.Contains(r.Findings[0].Detail, "only 512 bytes of it") {
		t.Errorf("%v", r.Findings)
	}
}

func TestHeaderFindings(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*ondisk.Header)
		want   string
		slots  uint64
	}{
		{"version", func(h *ondisk.Header) { h.Version = 2 }, "DS003", 0},
		{"chunk size 0", func(h *ondisk.Header) { h.ChunkSectors = 0 }, "DS004", 0},
		{"chunk size 7", func(h *ondisk.Header) { h.ChunkSectors = 7 }, "DS004", 0},
		{"chunk size too high", func(h *ondisk.Header) { h.ChunkSectors = 1 << 22 }, "DS004", 0},
		{"chunk size above the device", func(h *ondisk.Header) { h.ChunkSectors = 1 << 21 }, "DS006", 0},
		{"invalid", func(h *ondisk.Header) { h.Valid = 0 }, "DS007", 1},
		{"odd valid word", func(h *ondisk.Header) { h.Valid = 2 }, "DS008", 1},
		{"all at once", func(h *ondisk.Header) { *h = ondisk.Header{Magic: ondisk.Magic} }, "DS003 DS004 DS007", 0},
	} {
		h := ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8}
		c.change(&h)
		dev := image(8, 9, ondisk.Exception{Old: 5, New: 2})
		var b [ondisk.HeaderSize]byte
		h.Encode(b[:])
		dev.WriteAt(b[:], 0)
		if r := run(t, dev, check.Options{}); codes(r) != c.want || r.Slots != c.slots {
			t.Errorf("%s: found %v in %d slots, want %s in %d", c.name, r.Findings, r.Slots, c.want, c.slots)
		}
		if r := run(t, dev, check.Options{ChunkSectors: 8}); r.Exceptions != 1 {
			t.Errorf("%s: with the chunk size given it found %d exceptions", c.name, r.Exceptions)
		}
	}
}

type blocks4K struct{ block.Forward }

func (blocks4K) BlockSize() int { return 4096 }

func TestBlockSize(t *testing.T) {
	if r := run(t, blocks4K{block.NewForward(image(1, 40))}, check.Options{}); codes(r) != "DS005" {
		t.Errorf("found %v", r.Findings)
	}
}

func TestOrigin(t *testing.T) {
	dev := image(8, 9, []ondisk.Exception{{Old: 5, New: 2}, {Old: 7, New: 3}, {Old: 8, New: 4}}...)
	for size, want := range map[int64]string{5 * 4096: "DS021", 8*4096 + 512: "", 1 << 20: ""} {
		r := run(t, dev, check.Options{Origin: block.NewMemory(size)})
		if codes(r) != want || r.Exceptions != 3 {
			t.Errorf("origin of %d bytes: %v", size, r.Findings)
		}
	}
	r := run(t, dev, check.Options{Origin: block.NewMemory(7 * 4096)})
	if f := r.Findings[0]; f.Count != 2 || !strings.HasPrefix(f.Place, "area 0 slot 1") {
		t.Errorf("%+v", f)
	}
}

// badSectors fails reads that touch one of them.
type badSectors struct {
	*block.Memory
	bad []int64
}

func (d badSectors) ReadAt(p []byte, off int64) (int, error) {
	for _, s := range d.bad {
		if off < (s+1)*512 && s*512 < off+int64(len(p)) {
			return 0, errors.New("input/output error")
		}
	}
	return d.Memory.ReadAt(p, off)
}

// One bad sector costs the slots in it, and the rest is looked at.
func TestUnreadable(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 8}
	dev := image(8, 300, inOrder(l, 200, 0)...)
	r := run(t, badSectors{dev, []int64{9, 10}}, check.Options{})
	if codes(r) != "DS009 DS022" || r.Exceptions != 200-64 || r.Leaked != 64 || len(r.Findings) != 2 || r.Findings[0].Count != 64 {
		t.Errorf("%d exceptions, %v", r.Exceptions, r.Findings)
	}
	if r := run(t, badSectors{dev, []int64{0}}, check.Options{}); codes(r) != "DS009" {
		t.Errorf("unreadable header: %v", r.Findings)
	}
}

// A disk of garbage gives as many findings as were asked for, and counts the rest.
func TestLimit(t *testing.T) {
	dev := image(1, 40)
	for n := range uint64(31) {
		put(dev, ondisk.Layout{ChunkSectors: 1}, n, ondisk.Exception{Old: 5, New: ondisk.COWChunk(1000 + 3*n)})
	}
	r := run(t, dev, check.Options{Limit: 4})
	if len(r.Findings) != 4 || r.Found[check.COWPastDevice] != 31 || r.Worst() != check.Error {
		t.Errorf("%d findings, %v", len(r.Findings), r.Found)
	}
}

func TestEachAndProgress(t *testing.T) {
	dev := image(1, 99, inOrder(ondisk.Layout{ChunkSectors: 1}, 40, 0)...)
	put(dev, ondisk.Layout{ChunkSectors: 1}, 3, ondisk.Exception{Old: 2, New: 5})
	var bad []store.Entry
	n, steps := 0, 0
	run(t, dev, check.Options{
		Each: func(e store.Entry, c check.Code) {
			if n++; c != 0 {
				bad = append(bad, e)
			}
		},
		Progress: func(done, total int64) { steps++ },
	})
	if n != 40 || len(bad) != 1 || bad[0].Slot.Index != 3 || steps != 2 {
		t.Errorf("%d slots, bad %v, %d steps", n, bad, steps)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := check.Run(ctx, image(8, 9), check.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := check.Run(t.Context(), image(8, 9), check.Options{ChunkSectors: 3}); err == nil {
		t.Error("a chunk size of 3 sectors was taken")
	}
}

// TestKernelCases: what a kernel wrote is sound, or invalid where it gave the snapshot up.
func TestKernelCases(t *testing.T) {
	cases := kernelcase.All(t)
	for _, c := range cases {
		if c.Header == nil {
			continue // a transient store leaves nothing to look at
		}
		cow, err := c.COW()
		if err != nil {
			t.Fatal(err)
		}
		want := ""
		if c.Header.Valid == 0 {
			want = "DS007"
		}
		r := run(t, block.MemoryFrom(cow), check.Options{Origin: block.NewMemory(c.OriginSectors * 512)})
		if codes(r) != want || r.Exceptions != uint64(len(c.Exceptions)) {
			t.Errorf("%s: %d exceptions of %d, found %v, want %q", c.Name, r.Exceptions, len(c.Exceptions), r.Findings, want)
		}
	}
}
