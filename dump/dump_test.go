package dump_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/dump"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/ondisk"
)

const sample = `dmsnap store 1
size 65536
header magic 0x70416e53 valid 1 version 1 chunk-sectors 8
byte 0x10: 0badcafe000000000000000000000000
byte 0x400 x32: 4141414141414141414141414141414141414141414141414141414141414141
area 0
slot 0: 5 -> 2
slots 1-3: 20-22 -> 3-5
slot 9: 7 -> 3
# slot 4 is the end mark; what follows is void
end
`

func text(t testing.TB, dev block.Device, o dump.Options) string {
	t.Helper()
	var b bytes.Buffer
	if err := dump.Text(t.Context(), &b, dev, o); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// restore makes a device in memory of a dump.
func restore(t testing.TB, r io.Reader) (*block.Memory, dump.Restored) {
	t.Helper()
	var dev *block.Memory
	made, err := dump.Restore(t.Context(), r, func(size int64) (block.Device, error) {
		dev = block.NewMemory(size)
		return dev, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return dev, made
}

// A text that a person wrote, slots in any order, comes back in the order of the device.
func TestSample(t *testing.T) {
	dev, made := restore(t, strings.NewReader(sample))
	if made != (dump.Restored{Size: 65536, ChunkSectors: 8, Slots: 5}) {
		t.Errorf("made %+v", made)
	}
	want := strings.Replace(sample, "slot 9: 7 -> 3\n# slot 4 is the end mark; what follows is void\n", "# slot 4 is the end mark; what follows is void\nslot 9: 7 -> 3\n", 1)
	if got := text(t, dev, dump.Options{}); got != want {
		t.Errorf("dumped as\n%swant\n%s", got, want)
	}
	b := dev.Bytes()
	if string(b[:4]) != "SnAp" || b[0x11] != 0xad || b[0x7ff] != 'A' || b[0x1010] != 20 || b[0x1098] != 3 {
		t.Errorf("bytes % x …", b[:32])
	}
	if !bytes.Equal(b[0x2000:], make([]byte, 65536-0x2000)) {
		t.Error("something was written behind the area")
	}
}

// TestBothWays: dump, restore, dump gives the same text and the same metadata, whatever the device holds.
func TestBothWays(t *testing.T) {
	header := func(h ondisk.Header, size int) []byte {
		b := make([]byte, size)
		h.Encode(b)
		return b
	}
	good := ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 1}
	slots := func(b []byte, off int, es ...uint64) []byte {
		for _, n := range es {
			for i := range 8 {
				b[off+i] = byte(n >> (8 * i))
			}
			off += 8
		}
		return b
	}
	cut := slots(header(good, 512*35), 512) // area 0 full, area 1 is cut within a slot
	for i := range uint64(32) {
		slots(cut, 512+int(i)*16, i+7, i+2)
	}
	copy(cut[34*512:], bytes.Repeat([]byte{9}, 512))
	for name, b := range map[string][]byte{
		"nothing":            {},
		"three bytes":        {1, 2, 3},
		"header alone":       header(good, 16),
		"text":               []byte(strings.Repeat("dear all, ", 1000)),
		"no chunk size":      header(ondisk.Header{Magic: ondisk.Magic, Valid: 7, Version: 9, ChunkSectors: 3}, 9999),
		"wiped magic":        slots(header(ondisk.Header{ChunkSectors: 1}, 9999), 512, 1, 2),
		"end within a slot":  cut[:34*512+9*16+5],
		"end within an area": cut[:34*512+96],
		"largest numbers":    slots(header(good, 9999), 512, math.MaxUint64-1, 2, math.MaxUint64, 3, 0, 4, 5, math.MaxUint64, 6, 0),
		"zero after the end": slots(header(good, 9999), 512, 5, 2, 0, 0, 6, 0, 0, 7, 8, 9),
	} {
		t.Run(name, func(t *testing.T) {
			for _, o := range []dump.Options{{}, {ChunkSectors: 2}, {Data: true}} {
				first := text(t, block.MemoryFrom(b), o)
				dev, _ := restore(t, strings.NewReader(first))
				if second := text(t, dev, o); second != first {
					t.Errorf("first:\n%ssecond:\n%s", first, second)
				}
				if name == "end within a slot" && o.ChunkSectors == 0 && !bytes.Equal(dev.Bytes(), b) {
					t.Error("other bytes")
				}
			}
		})
	}
}

// TestKernelCases: a kernel's stores, with their data, byte for byte; packed too.
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
		first := text(t, dev, dump.Options{Data: true})
		again, made := restore(t, strings.NewReader(first))
		if text(t, again, dump.Options{Data: true}) != first || made.Slots != uint64(len(c.Exceptions)) {
			t.Errorf("%s: restored %+v, and dumped it is another text", c.Name, made)
		}
		l := ondisk.Layout{ChunkSectors: c.ChunkSectors}
		restored := again.Bytes()
		chunk := func(m ondisk.COWChunk) {
			from, to := l.COWOffset(m), l.COWOffset(m+1)
			if !bytes.Equal(restored[from:to], cow[from:to]) {
				t.Errorf("%s: COW chunk %d has other bytes", c.Name, m)
			}
		}
		chunk(0)
		for n := range uint64(len(c.Exceptions)) {
			if n%100 == 0 { // the rest is compared as text
				chunk(ondisk.COWChunk(c.Exceptions[n][1]))
				chunk(l.AreaChunk(n / l.SlotsPerArea()))
			}
		}
		var packed bytes.Buffer
		if err := dump.Pack(t.Context(), &packed, dev, dump.Options{Data: true}); err != nil {
			t.Fatal(err)
		}
		plain := text(t, dev, dump.Options{})
		if unpacked, _ := restore(t, &packed); text(t, unpacked, dump.Options{}) != plain {
			t.Errorf("%s: packed, it is another store", c.Name)
		}
	}
}

func TestPackIsSmall(t *testing.T) {
	dev, _ := restore(t, strings.NewReader("dmsnap store 1\nsize 1073741824\nheader magic 0x70416e53 valid 1 version 1 chunk-sectors 8\narea 0\nslots 0-254: 0-254 -> 2-256\nend\n"))
	var b bytes.Buffer
	if err := dump.Pack(t.Context(), &b, dev, dump.Options{}); err != nil || b.Len() > 250 {
		t.Errorf("%d bytes, %v", b.Len(), err)
	}
	if !strings.HasPrefix(b.String(), "dmsnap packed store 1\n") {
		t.Errorf("begins with %q", b.String()[:30])
	}
}

func TestJSON(t *testing.T) {
	dev, _ := restore(t, strings.NewReader(sample))
	var b bytes.Buffer
	if err := dump.JSON(t.Context(), &b, dev, dump.Options{Data: true}); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Format       string
		Version      int
		Size         int64
		ChunkSectors uint32 `json:"chunk_sectors"`
		Header       struct {
			Magic, Valid, Version uint32
			ChunkSectors          uint32 `json:"chunk_sectors"`
		}
		Bytes, Data []struct {
			Offset int64
			Count  int
			Hex    string
		}
		Areas []struct {
			Area   uint64
			Offset int64
			Slots  []struct{ Slot, Count, Old, New uint64 }
			End    *uint64 `json:"end_slot"`
			Void   bool
		}
		Unreadable []struct {
			Offset, Length int64
			Error          string
		}
	}
	d := json.NewDecoder(&b)
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Size != 65536 || got.Header.ChunkSectors != 8 || len(got.Bytes) != 2 || got.Bytes[1].Count != 32 ||
		len(got.Areas) != 1 || len(got.Areas[0].Slots) != 3 || *got.Areas[0].End != 4 || !got.Areas[0].Void || got.Areas[0].Slots[1].Count != 3 {
		t.Errorf("%+v", got)
	}
	for _, content := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("text"), 3000)} {
		b.Reset()
		if err := dump.JSON(t.Context(), &b, block.MemoryFrom(content), dump.Options{}); err != nil || !json.Valid(b.Bytes()) {
			t.Errorf("%d bytes: %v, %s", len(content), err, b.String())
		}
	}
}

func TestSyntaxErrors(t *testing.T) {
	const head = "dmsnap store 1\nsize 65536\n# a comment\n\nheader magic 0x70416e53 valid 1 version 1 chunk-sectors 8\narea 0\n"
	for text, want := range map[string]string{
		"":                                              "line 1: the text ends",
		"hello\n":                                       "line 1: not a dump",
		"dmsnap store 2\n":                              "line 1: not a dump",
		"dmsnap store 1\narea 0\n":                      `line 2: "area" before the size`,
		"dmsnap store 1\nsize -1\n":                     "line 2: \"-1\" is no number",
		"dmsnap store 1\nsize 1 2\n":                    "line 2: one number",
		head + "size 5\n":                               "line 7: a second size",
		head:                                            "line 7: the text ends without its last line",
		head + "slot 0: 5 -> 2\n":                       "line 8: the text ends without",
		head + "what is this\n":                         "line 7: \"what is this\" is not understood",
		head + "slot 0 5 -> 2\n":                        "line 7: a slot is written like",
		head + "slot 256: 5 -> 2\n":                     "line 7: an area has 256 slots",
		head + "slots 250-256: 0-6 -> 2-8":              "line 7: an area has 256 slots",
		head + "slots 1-3: 5-8 -> 2-4":                  "line 7: the ranges are of different lengths",
		head + "slots 3-1: 8-6 -> 4-2":                  "line 7: \"3-1\" is no number",
		head + "area 1\n":                               "line 7: area 1 is past the end",
		head + "area 9223372036854775807\n":             "line 7: area 9223372036854775807 is past the end",
		head + "byte 0x10000: 00\n":                     "line 7: 1 bytes at 0x10000 are past the end",
		head + "byte 0xfff0 x3: 0102030405060708090a":   "line 7: 30 bytes",
		head + "byte 0x10 x99999: 00":                   "line 7: \"x99999:\": bytes can be repeated",
		head + "byte 0x10: 0":                           "line 7: \"0\": 1 to 32 bytes",
		head + "byte 0x10: " + strings.Repeat("00", 33): "1 to 32 bytes",
		head + "byte 10: 00":                            "line 7: bytes are written like",
		head + "header magic 1\n":                       "line 7: 2 words, want 8",
		head + "chunk-sectors 3\n":                      "line 7: chunk size is not a power of two",
		head + "end\nmore\n":                            "line 8: something follows",
		head + strings.Repeat("#", 2000) + "\n":         "line 7: more than 1024 bytes",
		"dmsnap store 1\nsize 65536\narea 0\n":          "line 3: an area, and no chunk size",
		"dmsnap packed store 1\nnonsense":               "packed dump: ",
	} {
		_, err := dump.Restore(t.Context(), strings.NewReader(text), func(size int64) (block.Device, error) { return block.NewMemory(size), nil })
		var syntax *dump.SyntaxError
		if !errors.As(err, &syntax) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestRestoreStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := dump.Restore(ctx, strings.NewReader(sample), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	full := errors.New("no space")
	if _, err := dump.Restore(t.Context(), strings.NewReader(sample), func(int64) (block.Device, error) { return nil, full }); !errors.Is(err, full) {
		t.Errorf("%v", err)
	}
}

// A bad sector leaves a gap that is named, and hides nothing else.
func TestUnreadable(t *testing.T) {
	dev, _ := restore(t, strings.NewReader(strings.Replace(sample, "slot 9:", "slot 40:", 1)))
	var b bytes.Buffer
	err := dump.Text(t.Context(), &b, badSector{dev, 8}, dump.Options{})
	if !errors.Is(err, dump.ErrUnreadable) || !strings.Contains(b.String(), `# unreadable: 512 bytes at 0x1000: "bad sector"`) || !strings.Contains(b.String(), "slot 40: 7 -> 3") {
		t.Errorf("%v\n%s", err, b.String())
	}
}

type badSector struct {
	*block.Memory
	n int64
}

func (d badSector) ReadAt(p []byte, off int64) (int, error) {
	if off < (d.n+1)*512 && d.n*512 < off+int64(len(p)) {
		return 0, errors.New("bad sector")
	}
	return d.Memory.ReadAt(p, off)
}

// A writer that fails ends the dump at once.
func TestWriterFails(t *testing.T) {
	dev, _ := restore(t, strings.NewReader(sample))
	for _, form := range []func(context.Context, io.Writer, block.Device, dump.Options) error{dump.Text, dump.JSON, dump.Pack} {
		if err := form(t.Context(), failing{}, dev, dump.Options{}); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%v", err)
		}
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// FuzzRestore: no text does harm, and what is restored can be dumped and restored to the same.
func FuzzRestore(f *testing.F) {
	f.Add(sample)
	f.Add("dmsnap store 1\nsize 4000000000000\nchunk-sectors 1\narea 5\nslots 0-31: 0-31 -> 2-33\nend\n")
	f.Fuzz(func(t *testing.T, s string) {
		var dev *block.Memory
		_, err := dump.Restore(t.Context(), strings.NewReader(s), func(size int64) (block.Device, error) {
			if size > 1<<22 {
				return nil, errors.New("too large for a test")
			}
			dev = block.NewMemory(size)
			return dev, nil
		})
		if err != nil {
			return
		}
		first := text(t, dev, dump.Options{Data: true})
		again, _ := restore(t, strings.NewReader(first))
		if second := text(t, again, dump.Options{Data: true}); second != first {
			t.Fatalf("first:\n%ssecond:\n%s", first, second)
		}
	})
}

// Chunks larger than a line may stand for are more lines, and come back.
func TestLargeChunks(t *testing.T) {
	l := ondisk.Layout{ChunkSectors: 8192}
	dev := block.NewMemory(4 * l.ChunkBytes())
	var b [ondisk.HeaderSize]byte
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8192}.Encode(b[:])
	dev.WriteAt(b[:], 0)
	slots := make([]byte, l.ChunkBytes()) // a run of more slots than a line may stand for
	for i := range 100_000 {
		ondisk.Exception{Old: ondisk.OriginChunk(1000 + i), New: ondisk.COWChunk(2 + i)}.Encode(slots[i*ondisk.SlotSize:])
	}
	dev.WriteAt(slots, l.ChunkBytes())
	dev.WriteAt(bytes.Repeat([]byte("x"), int(l.ChunkBytes())), 2*l.ChunkBytes())
	again, made := restore(t, strings.NewReader(text(t, dev, dump.Options{Data: true})))
	if made.Slots != 100_000 || !bytes.Equal(again.Bytes(), dev.Bytes()) {
		t.Errorf("restored %+v, other bytes", made)
	}
}
