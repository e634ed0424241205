package snapshot_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

func TestC001HeaderOfNewStore(t *testing.T) {
	_, c, _ := standard(t, 1024, 1024)
	if got := hex.EncodeToString(c.memory.Bytes()[:16]); got != "536e4170010000000100000008000000" {
		t.Errorf("header %s", got)
	}
}

// prefilled is a COW device full of 0xaa but for a zero magic, with a new store on it.
func prefilled(t *testing.T) []byte {
	r := newRig(t, 1024)
	c := r.cowOf("COW", setHeader(fill(1024, 0xaa), 0, 0))
	r.attach(c, snapshot.Options{ChunkSectors: 8})
	return c.memory.Bytes()
}

func TestC002HeaderChunkIsZeroBehindTheHeader(t *testing.T) {
	if len(bytes.Trim(prefilled(t)[16:8*sector], "\x00")) > 0 {
		t.Error("bytes behind the header")
	}
}

func TestC003FirstAreaIsZero(t *testing.T) {
	if len(bytes.Trim(prefilled(t)[8*sector:16*sector], "\x00")) > 0 {
		t.Error("bytes in area 0")
	}
}

func TestC004RestUntouchedByCreate(t *testing.T) {
	if len(bytes.Trim(prefilled(t)[16*sector:], "\xaa")) > 0 {
		t.Error("bytes behind area 0 were changed")
	}
}

func TestC005ZeroMagicIsANewStoreWhateverElse(t *testing.T) {
	r := newRig(t, 1024)
	b := make([]byte, 1024*sector)
	for field, v := range map[int]uint32{1: 0, 2: 9, 3: 64} {
		setHeader(b, field, v)
	}
	c := r.cowOf("COW", b)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8})
	wantStatus(t, s, "16/1024 16")
	if h := ondisk.DecodeHeader(c.memory.Bytes()); h.Version != 1 || h.ChunkSectors != 8 || h.Valid != 1 {
		t.Errorf("header %+v", h)
	}
}

func TestC006FreshStatus(t *testing.T) {
	_, _, s := standard(t, 1024, 1024)
	wantStatus(t, s, "16/1024 16")
}

func TestC007ChunkArgumentZeroOnFreshDevice(t *testing.T) {
	r := newRig(t, 1024)
	c := r.cow("COW", 1024)
	s := r.attach(c, snapshot.Options{})
	if got := s.Status().Table("7:0", "7:1"); got != "0 1024 snapshot 7:0 7:1 P 32" {
		t.Errorf("table %q", got)
	}
	if h := ondisk.DecodeHeader(c.memory.Bytes()); h.ChunkSectors != 32 {
		t.Errorf("header has %d", h.ChunkSectors)
	}
}

func TestC008ChunkArgumentZeroTakesTheHeaders(t *testing.T) {
	r, _, s := loads(t, image(8, 1024))
	if got := s.Status().ChunkSectors; got != 8 || len(r.events) != 0 {
		t.Errorf("chunk size %d, events %v", got, r.events)
	}
}

func TestC009HeaderOverridesChunkArgument(t *testing.T) {
	r := newRig(t, 1024)
	s := r.attach(r.cowOf("COW", image(8, 1024, pair{3, 2})), snapshot.Options{ChunkSectors: 16})
	if got := s.Status().Table("7:0", "7:1"); got != "0 1024 snapshot 7:0 7:1 P 8" {
		t.Errorf("table %q", got)
	}
	if len(r.events) != 1 || r.events[0].Text != "chunk size 8 in device metadata overrides table chunk size of 16." {
		t.Errorf("events %v", r.events)
	}
	wantRead(t, s, 24, content(8, 2))
}

func TestC010ChunkArguments(t *testing.T) {
	for arg, want := range map[string]uint32{"+8": 8, "08": 8, "8": 8, "0": 0, "2097152": 2097152} {
		if got, err := kernelcase.ParseChunkArgument(arg); got != want || err != nil {
			t.Errorf("%q: %d, %v", arg, got, err)
		}
	}
	for _, arg := range []string{"3", "24", "4194304", "abc", "-8", "0x10", "", "++8", "8 ", "4294967296"} {
		if got, err := kernelcase.ParseChunkArgument(arg); err == nil {
			t.Errorf("%q: accepted as %d", arg, got)
		}
	}
}

func TestC011LargestChunk(t *testing.T) {
	r := newRig(t, 1024)
	c := &cow{memory: block.NewMemory(3 << 30)}
	c.dev = r.log.Record("COW", c.memory)
	s, err := r.origin.Attach(c.dev, snapshot.Options{ChunkSectors: 2097152})
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, 5, 3, 7)
	wantRead(t, s, 4, slices.Concat(r.old(4, 1), fill(3, 7), r.old(8, 1)))
	wantStatus(t, s, "6291456/6291456 4194304")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// A gibibyte of area is not looked at here: nothing but its first block was ever written.
	if s, err = r.origin.Attach(c.dev, snapshot.Options{}); err != nil {
		t.Fatal(err)
	}
	wantRead(t, s, 5, fill(3, 7))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// blocks4k is a device with logical blocks of 4096 bytes.
type blocks4k struct{ block.Forward }

func (blocks4k) BlockSize() int { return 4096 }

func TestC012ChunkIsAMultipleOfTheBlock(t *testing.T) {
	for _, large := range []string{"origin", "COW"} {
		for chunk, ok := range map[uint32]bool{1: false, 4: false, 8: true} {
			disk, cow := block.Device(block.NewMemory(1024*sector)), block.Device(block.NewMemory(1024*sector))
			if large == "origin" {
				disk = blocks4k{block.NewForward(disk)}
			} else {
				cow = blocks4k{block.NewForward(cow)}
			}
			s, err := snapshot.NewOrigin(disk).Attach(cow, snapshot.Options{ChunkSectors: chunk})
			if ok != (err == nil) || !ok && !errors.Is(err, ondisk.ErrChunkNotBlocks) {
				t.Errorf("4 KiB blocks on the %s, chunk %d: %v", large, chunk, err)
			}
			if s != nil {
				s.Close()
			}
		}
	}
}

func TestC013WrongMagic(t *testing.T) {
	refuses(t, setHeader(image(8, 1024), 0, ondisk.Magic+1), "not a snapshot store")
}

func TestC014OtherVersions(t *testing.T) {
	for _, v := range []uint32{0, 2} {
		for _, valid := range []uint32{0, 1} {
			refuses(t, setHeader(setHeader(image(8, 1024), 2, v), 1, valid), fmt.Sprintf("version %d of the format is not supported", v))
		}
	}
}

func TestC015ChunkSizesOnDisk(t *testing.T) {
	for chunk, why := range map[uint32]string{0: "power of two", 7: "power of two", 24: "power of two", 4194304: "too large"} {
		refuses(t, setHeader(image(8, 1024), 3, chunk), fmt.Sprintf("invalid chunk size %d: chunk size is ", chunk))
		refuses(t, setHeader(image(8, 1024), 3, chunk), why)
	}
}

func TestC016InvalidStoreLoads(t *testing.T) {
	img := setHeader(image(8, 9), 1, 0) // not even area 0 is there
	r := newRig(t, 1024)
	c := r.cowOf("COW", img)
	s := r.attach(c, snapshot.Options{})
	wantStatus(t, s, "Invalid")
	if _, err := s.ReadAt(make([]byte, sector), 0); !isInvalid(err) {
		t.Errorf("read: %v", err)
	}
	if err := fails(t, s, 0, 1); !isInvalid(err) {
		t.Errorf("write: %v", err)
	}
	write(t, r.origin, 0, 8, 1)
	if !bytes.Equal(c.memory.Bytes(), img) {
		t.Error("COW device was touched")
	}
}

func TestC017ValidIsAnythingButZero(t *testing.T) {
	for _, v := range []uint32{2, 0xffffffff} {
		_, c, s := loads(t, setHeader(image(8, 1024), 1, v))
		wantStatus(t, s, "16/1024 16")
		write(t, s, 0, 8, 1)
		flush(t, s)
		if h := ondisk.DecodeHeader(c.memory.Bytes()); h.Valid != v {
			t.Errorf("valid was %d and is %d", v, h.Valid)
		}
	}
}

func TestC018SmallestDevices(t *testing.T) {
	r := newRig(t, 1024)
	if _, err := r.origin.Attach(r.cow("COW", 8).dev, snapshot.Options{ChunkSectors: 8}); err == nil {
		t.Error("a COW device of one chunk was accepted")
	}
	s := r.attach(r.cow("COW", 16), snapshot.Options{ChunkSectors: 8})
	wantStatus(t, s, "16/16 16")
	if err := fails(t, s, 0, 8); !isInvalid(err) {
		t.Errorf("first exception in two chunks: %v", err)
	}
	s = r.attach(r.cow("COW", 24), snapshot.Options{ChunkSectors: 8})
	write(t, s, 0, 8, 1)
	wantStatus(t, s, "24/24 16")
	fails(t, s, 8, 8)
	wantStatus(t, s, "Invalid")
}

// withChunk1 is a rig with a snapshot of chunk size 1, on which every second sector from 1000 on was
// written n times.
func withChunk1(t *testing.T, n int64) (*cow, *snapshot.Snapshot) {
	r := newRig(t, 4096)
	c := r.cow("COW", 400)
	s := r.attach(c, snapshot.Options{ChunkSectors: 1})
	for i := range n {
		write(t, s, 1000+2*i, 1, byte(i))
	}
	flush(t, s)
	return c, s
}

func TestC019DataChunksOfChunkSize1(t *testing.T) {
	c, _ := withChunk1(t, 101)
	b := c.memory.Bytes()
	for n := range uint64(101) {
		if got, want := slot(b, 1, n/32, n%32), (pair{1000 + 2*n, n + 2 + n/32}); got != want {
			t.Errorf("exception %d is %v, want %v", n, got, want)
		}
	}
}

func TestC020AreasOfChunkSize1(t *testing.T) {
	c, s := withChunk1(t, 70)
	b := c.memory.Bytes()
	if got := ondisk.DecodeException(b[34*sector:]); got != (ondisk.Exception{Old: 1064, New: 35}) {
		t.Errorf("area 1 begins with %v", got)
	}
	if got := ondisk.DecodeException(b[67*sector:]); got != (ondisk.Exception{Old: 1128, New: 68}) {
		t.Errorf("area 2 begins with %v", got)
	}
	wantStatus(t, s, "74/400 4")
}

func TestC021SlotBytes(t *testing.T) {
	_, c, s := standard(t, 8*0x200, 1024)
	for _, chunk := range []int64{2, 4, 0x123} {
		write(t, s, 8*chunk, 8, 1)
	}
	flush(t, s)
	want := "02000000000000000200000000000000" + "04000000000000000300000000000000" + "23010000000000000400000000000000" + strings.Repeat("00", 16)
	if got := hex.EncodeToString(c.memory.Bytes()[8*sector:][:64]); got != want {
		t.Errorf("area 0 is %s", got)
	}
	l := ondisk.Layout{ChunkSectors: 8}
	if got := l.SlotOffset(ondisk.Slot{Area: 3, Index: 17}); got != 4096*(1+3*257)+16*17 {
		t.Errorf("slot 17 of area 3 is at %d", got)
	}
}

func TestC022StatusAfterOrderedExceptions(t *testing.T) {
	for _, d := range []int64{0, 1, 31, 32, 33, 64, 70} {
		_, s := withChunk1(t, d)
		want := fmt.Sprintf("%d/400 %d", d+2+d/32, 2+d/32)
		wantStatus(t, s, want)
	}
}

func TestC023ReloadAtAreaEdges(t *testing.T) {
	for _, d := range []uint64{31, 32, 33, 64} {
		r := newRig(t, 4096)
		c := r.cow("COW", 400)
		s := r.attach(c, snapshot.Options{ChunkSectors: 1})
		for i := range int64(d) {
			write(t, s, 2*i, 1, 1)
		}
		want := s.Status().Text()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = r.attach(c, snapshot.Options{})
		wantStatus(t, s, want)
		write(t, s, 4000, 1, 2)
		flush(t, s)
		if got := slot(c.memory.Bytes(), 1, d/32, d%32); got != (pair{4000, d + 2 + d/32}) {
			t.Errorf("after %d the next exception is %v", d, got)
		}
	}
}

func TestC024NextAreaIsZeroedFirst(t *testing.T) {
	r := newRig(t, 4096)
	c := r.cowOf("COW", setHeader(fill(400, 0xaa), 0, 0))
	s := r.attach(c, snapshot.Options{ChunkSectors: 1})
	for i := range int64(31) {
		write(t, s, i, 1, 1)
	}
	flush(t, s)
	r.log.Clear()
	write(t, s, 31, 1, 1)
	flush(t, s)
	r.wantOps("COW W 33+1; COW Z 34+1; COW F; COW W 1+1; COW F")
}

func TestC025EdgeOfTheDevice(t *testing.T) {
	// The 32nd exception with 34 sectors: the kernel fails it when it zeroes the next area, we when we
	// reserve (H10). Both invalidate.
	for sectors, fits := range map[int64]int64{33: 31, 34: 31, 35: 32, 36: 33} {
		r := newRig(t, 4096)
		s := r.attach(r.cow("COW", sectors), snapshot.Options{ChunkSectors: 1})
		for i := range fits {
			write(t, s, i, 1, 1)
		}
		flush(t, s)
		wantStatus(t, s, fmt.Sprintf("%d/%d %d", fits+2+fits/32, sectors, 2+fits/32))
		if err := fails(t, s, fits, 1); !isInvalid(err) {
			t.Errorf("%d sectors: %v", sectors, err)
		}
		wantStatus(t, s, "Invalid")
	}
}

func TestC026SmallestDeviceForAllChunks(t *testing.T) {
	for _, d := range []uint64{1, 31, 32, 33, 64, 100} {
		l := ondisk.Layout{ChunkSectors: 1}
		for _, less := range []uint64{0, 1} {
			r := newRig(t, int64(d))
			s := r.attach(r.cow("COW", int64(l.ChunksNeeded(d)-less)), snapshot.Options{ChunkSectors: 1})
			for i := range int64(d) {
				if _, err := s.WriteAt(fill(1, 1), i*sector); err != nil {
					break
				}
			}
			if valid := s.Status().State == snapshot.StateOK; valid != (less == 0) {
				t.Errorf("%d exceptions, %d chunks less than needed: %s", d, less, s.Status().Text())
			}
		}
	}
}

func TestC027PartOfAChunkAtTheEndIsNotUsed(t *testing.T) {
	_, c, s := standard(t, 1024, 24+7)
	write(t, s, 0, 8, 1)
	fails(t, s, 8, 8)
	if len(bytes.Trim(c.memory.Bytes()[24*sector:], "\x00")) > 0 {
		t.Error("the device's end was written to")
	}
}
