package rescue_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

const sector = 512

// rescued writes a snapshot out.
func rescued(t *testing.T, origin, cow block.Device) ([]byte, []rescue.Range) {
	t.Helper()
	r, err := rescue.Open(t.Context(), origin, cow, rescue.Options{})
	if err != nil {
		t.Fatal(err)
	}
	out := block.NewMemory(r.Size())
	var progress int64
	ranges, err := r.Write(t.Context(), out, func(done int64) { progress = done })
	if err != nil {
		t.Fatal(err)
	}
	if progress != r.Size() {
		t.Errorf("progress ended at %d of %d", progress, r.Size())
	}
	end := int64(0)
	for _, x := range ranges {
		if x.Off != end || x.Length <= 0 {
			t.Fatalf("ranges with a gap: %v", ranges)
		}
		end += x.Length
	}
	if end != r.Size() {
		t.Fatalf("ranges end at %d of %d", end, r.Size())
	}
	return out.Bytes(), ranges
}

// overflowed makes a snapshot, writes to both sides until it is full and a while longer, and returns what it
// showed before it became invalid.
func overflowed(t *testing.T, seed uint64, c uint32) (origin, cow *block.Memory, before []byte) {
	t.Helper()
	const sectors = 2000
	origin, cow = block.MemoryFrom(blocktest.Pattern(sectors*sector, seed)), block.NewMemory(400*sector)
	o := snapshot.NewOrigin(origin)
	s, err := o.Attach(cow, snapshot.Options{ChunkSectors: c})
	if err != nil {
		t.Fatal(err)
	}
	for i := int64(0); ; i++ {
		at := (i*37 + int64(seed)) % (sectors - 3)
		if s.Status().State == snapshot.StateInvalid {
			break
		}
		before = make([]byte, sectors*sector)
		if _, err := s.ReadAt(before, 0); err != nil {
			t.Fatal(err)
		}
		if i%5 == 4 {
			// One sector: a request that is cut short by the overflow would leave a part of itself.
			if _, err := s.WriteAt(bytes.Repeat([]byte{byte(i)}, sector), at*sector); err == nil {
				copy(before[at*sector:], bytes.Repeat([]byte{byte(i)}, sector))
			}
		} else if _, err := o.WriteAt(bytes.Repeat([]byte{0xee}, 3*sector), at*sector); err != nil {
			t.Fatal(err)
		}
	}
	for i := range int64(50) { // the origin goes on, and nobody keeps what it overwrites
		if _, err := o.WriteAt(bytes.Repeat([]byte{0xdd}, 2*sector), (i*91)%(sectors-2)*sector); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return origin, cow, before
}

// What is called certain is what the snapshot showed; what was overwritten is never called so.
func TestOverflowedSnapshot(t *testing.T) {
	for seed, c := range []uint32{1, 2, 8, 16} {
		origin, cow, before := overflowed(t, uint64(seed), c)
		image := bytes.Clone(cow.Bytes())
		got, ranges := rescued(t, origin, cow)
		sum := rescue.Totals(ranges)
		if sum[rescue.Certain] == 0 || sum[rescue.Doubtful] == 0 || sum[rescue.Lost] != 0 {
			t.Errorf("chunk size %d: %v bytes certain, doubtful and lost", c, sum)
		}
		for _, x := range ranges {
			if x.Class == rescue.Certain && !bytes.Equal(got[x.Off:x.Off+x.Length], before[x.Off:x.Off+x.Length]) {
				t.Errorf("chunk size %d: %v is called certain and is not what the snapshot showed", c, x)
			}
			if x.Class == rescue.Doubtful && !bytes.Equal(got[x.Off:x.Off+x.Length], origin.Bytes()[x.Off:x.Off+x.Length]) {
				t.Errorf("chunk size %d: %v is not the origin's", c, x)
			}
		}
		if bytes.Equal(got, before) {
			t.Error("nothing was overwritten: the test shows nothing")
		}
		if !bytes.Equal(cow.Bytes(), image) {
			t.Error("the COW device was touched")
		}

		// Revalidated, it loads and shows the same.
		out := block.NewMemory(cow.Size())
		v, err := rescue.NewRevalidation(t.Context(), cow)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Copy(t.Context(), out); err != nil {
			t.Fatal(err)
		}
		s, err := snapshot.NewOrigin(origin).Attach(out, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		view := make([]byte, len(got))
		if _, err := s.ReadAt(view, 0); err != nil || !bytes.Equal(view, got) {
			t.Errorf("revalidated: %v, or another view", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if again, err := store.Open(out); err != nil || again.Err() != nil {
			t.Errorf("revalidated: %v, %v", err, again.Err())
		}
	}
}

// In place one sector changes, and nothing before its content is kept; what was kept brings it back.
func TestRevalidateInPlace(t *testing.T) {
	origin, cow := block.NewMemory(64*sector), block.NewMemory(64*sector)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.WriteAt(bytes.Repeat([]byte("kept"), sector), 3*sector); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	sound := cow.Bytes()
	if _, err := cow.WriteAt(make([]byte, 4), 4); err != nil {
		t.Fatal(err)
	}
	invalid := cow.Bytes()
	var log blocktest.Log
	v, err := rescue.NewRevalidation(t.Context(), log.Record("COW", cow))
	if err != nil {
		t.Fatal(err)
	}
	if v.Valid() || v.KeptBytes() != 8*sector {
		t.Errorf("valid %v, %d bytes kept", v.Valid(), v.KeptBytes())
	}
	failed := errors.New("no space")
	if _, err := v.InPlace(t.Context(), func(func(io.Writer) error) error { return failed }); !errors.Is(err, failed) || !bytes.Equal(cow.Bytes(), invalid) {
		t.Errorf("nothing was kept: %v, or the store was touched", err)
	}
	var kept bytes.Buffer
	log.Clear()
	changed, err := v.InPlace(t.Context(), func(write func(io.Writer) error) error { return write(&kept) })
	unlabelled := bytes.Clone(cow.Bytes()) // without the label that the undo file has too
	clear(unlabelled[ondisk.ChangeLabelAt:][:ondisk.ChangeLabelBytes])
	if err != nil || !changed || !bytes.Equal(unlabelled, sound) {
		t.Errorf("%v, changed %v, or not the store of before", err, changed)
	}
	if ops := log.Ops(); len(ops) != 5 || ops[3].Kind != blocktest.WriteDurable || ops[4].Kind != blocktest.WriteDurable {
		t.Errorf("it did %v", blocktest.Lines(ops))
	}
	if _, err := undo.Apply(t.Context(), bytes.NewReader(kept.Bytes()), cow); err != nil || !bytes.Equal(cow.Bytes(), invalid) {
		t.Errorf("taken back: %v, or not as it was", err)
	}
	again, err := rescue.NewRevalidation(t.Context(), block.MemoryFrom(sound))
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := again.InPlace(t.Context(), nil); changed || err != nil {
		t.Errorf("a valid store: changed %v, %v", changed, err)
	}
}

// Of a store in use nothing is certain but what has an exception.
func TestLive(t *testing.T) {
	origin, cow := block.NewMemory(64*sector), block.NewMemory(64*sector)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.WriteAt(make([]byte, sector), 8*sector); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	for live, certain := range map[bool]int64{false: 64 * sector, true: 8 * sector} {
		r, err := rescue.Open(t.Context(), origin, cow, rescue.Options{Live: live})
		if err != nil {
			t.Fatal(err)
		}
		if got := rescue.Totals(r.Plan())[rescue.Certain]; got != certain {
			t.Errorf("live %v: %d bytes certain, want %d", live, got, certain)
		}
	}
}

func TestKernelCases(t *testing.T) {
	cases := kernelcase.All(t)
	invalid := 0
	for _, c := range cases {
		if c.Store == "N" {
			continue
		}
		originImage, err := c.Origin()
		if err != nil {
			t.Fatal(err)
		}
		cowImage, err := c.COW()
		if err != nil {
			t.Fatal(err)
		}
		before := kernelcase.Stream(c.OriginSeed, 0, c.OriginSectors*sector)
		got, ranges := rescued(t, block.MemoryFrom(originImage), block.MemoryFrom(cowImage))
		if c.Header.Valid != 0 {
			if len(ranges) != 1 || ranges[0].Class != rescue.Certain || kernelcase.Digest(got) != c.Kernel.Snap {
				t.Errorf("%s: %v, digest %s, want all certain and %s", c.Name, ranges, kernelcase.Digest(got), c.Kernel.Snap)
			}
			continue
		}
		// An overflowed store: what the origin wrote over is certain to be what stood there before, unless the
		// snapshot was written there.
		invalid++
		touched := make([]bool, c.OriginSectors)
		for _, s := range c.Steps {
			for at := s.Off / sector; s.Target == "snap" && at < (s.Off+s.N+sector-1)/sector; at++ {
				touched[at] = true
			}
		}
		changed := 0
		for _, x := range ranges {
			for at := x.Off / sector; at < (x.Off+x.Length)/sector; at++ {
				was, is := before[at*sector:(at+1)*sector], got[at*sector:(at+1)*sector]
				if x.Class == rescue.Certain && !touched[at] && !bytes.Equal(was, is) {
					t.Fatalf("%s: sector %d is called certain and differs from what was there", c.Name, at)
				}
				if x.Class == rescue.Doubtful && !bytes.Equal(was, is) {
					changed++
				}
			}
		}
		t.Logf("%s: %v bytes certain, doubtful, lost; %d doubtful sectors were overwritten", c.Name, rescue.Totals(ranges), changed)
	}
	if invalid == 0 {
		t.Error("no invalid case")
	}
}

// hurt fails reads of a range.
type hurt struct {
	block.Forward
	at, n int64
}

func (hurt) ReadCached([]block.Read) int { return 0 } // all by ReadAt

func (h hurt) ReadAt(p []byte, off int64) (int, error) {
	if off < h.at+h.n && h.at < off+int64(len(p)) {
		return 0, errors.New("bad sector")
	}
	return h.Forward.ReadAt(p, off)
}

func TestDamage(t *testing.T) {
	disk := blocktest.Pattern(256*sector, 1)
	build := func() (*block.Memory, *block.Memory) {
		origin, cow := block.MemoryFrom(bytes.Clone(disk)), block.NewMemory(512*sector)
		s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
		if err != nil {
			t.Fatal(err)
		}
		for i := range int64(10) {
			if _, err := s.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 8*sector), i*16*sector); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return origin, cow
	}
	l := ondisk.Layout{ChunkSectors: 8}
	put := func(cow *block.Memory, i uint64, e ondisk.Exception) {
		b := make([]byte, ondisk.SlotSize)
		e.Encode(b)
		if _, err := cow.WriteAt(b, l.SlotOffset(ondisk.Slot{Index: i})); err != nil {
			t.Fatal(err)
		}
	}

	origin, cow := build()
	if _, ranges := rescued(t, origin, hurt{block.NewForward(cow), 16*sector + 8*sector*3 + 1024, 600}); len(ranges) != 3 ||
		ranges[1] != (rescue.Range{Off: 3*16*sector + 1024, Length: 1024, Class: rescue.Lost}) {
		t.Errorf("two bad sectors in the data: %v", ranges)
	}
	_, ranges := rescued(t, origin, hurt{block.NewForward(cow), 8*sector + 512, 1}) // slots 32 to 63: none in use, but who knows
	if sum := rescue.Totals(ranges); sum[rescue.Certain] != 10*8*sector {
		t.Errorf("a bad sector behind the slots: %v", sum)
	}

	// An exception whose data is past the end.
	origin, cow = build()
	put(cow, 2, ondisk.Exception{Old: 4, New: 1 << 20})
	if _, ranges := rescued(t, origin, cow); rescue.Totals(ranges)[rescue.Lost] != 8*sector {
		t.Errorf("data past the end: %v", ranges)
	}
	// Two for one origin chunk.
	origin, cow = build()
	put(cow, 3, ondisk.Exception{Old: 2, New: 5})
	if _, ranges := rescued(t, origin, cow); rescue.Totals(ranges)[rescue.Doubtful] != 8*sector {
		t.Errorf("two exceptions for one chunk: %v", ranges)
	}
	// The origin chunks of these exceptions are unknown, so that chunks without an exception may have had one.
	for name, e := range map[string]ondisk.Exception{"no such chunk": {Old: 1 << 60, New: 4}, "in the header": {Old: 4, New: 0}} {
		origin, cow = build()
		put(cow, 9, e)
		if _, ranges := rescued(t, origin, cow); rescue.Totals(ranges)[rescue.Certain] != 9*8*sector {
			t.Errorf("%s: %v", name, ranges)
		}
	}
	origin, cow = build()
	if _, ranges := rescued(t, origin, block.MemoryFrom(cow.Bytes()[:8*sector])); rescue.Totals(ranges)[rescue.Doubtful] != origin.Size() {
		t.Errorf("cut behind the header: %v", ranges)
	}
	// No header any more.
	origin, cow = build()
	if _, err := cow.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := rescue.Open(t.Context(), origin, cow, rescue.Options{}); err == nil || !strings.Contains(err.Error(), "DS001") {
		t.Errorf("no header: %v", err)
	}
	if _, err := rescue.NewRevalidation(t.Context(), cow); err == nil {
		t.Error("no header was revalidated")
	}
	r, err := rescue.Open(t.Context(), origin, cow, rescue.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	if sum := rescue.Totals(r.Plan()); sum[rescue.Certain] != 10*8*sector || sum[rescue.Lost] != 0 {
		t.Errorf("no header, but the chunk size: %v", sum)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Write(ctx, block.NewMemory(r.Size()), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A server that gives no answer has lost nothing: the rescue ends, and says so.
func TestUnavailable(t *testing.T) {
	origin, cow, _ := overflowed(t, 5, 8)
	reads := 0
	away := blocktest.NewFaulty(origin, func(op blocktest.Op) error {
		if op.Kind == blocktest.Read {
			reads++
			return block.ErrUnavailable
		}
		return nil
	})
	r, err := rescue.Open(t.Context(), away, cow, rescue.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Write(t.Context(), block.NewMemory(r.Size()), nil); !errors.Is(err, block.ErrUnavailable) || reads != 1 {
		t.Errorf("%d reads, %v", reads, err)
	}
}
