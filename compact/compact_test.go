package compact_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// TestSnapshotShowsTheSame: through whatever compacting makes of a store, the snapshot shows what it showed; check finds
// nothing; and compacting that again gives the same bytes.
func TestSnapshotShowsTheSame(t *testing.T) {
	rounds := 48
	if testing.Short() {
		rounds = 6
	}
	r := rand.New(rand.NewPCG(1, 1))
	for i := range rounds {
		p := past{sectors: 1 << r.IntN(7), kind: snapshot.Persistent, holes: i%3 == 1, halfMerged: i%4 == 2, disk: 512 * (200 + r.Int64N(400))}
		if i%2 == 1 {
			p.kind = snapshot.PersistentOverflow
		}
		w := newWorld(t, r, p)
		o := compact.Options{Origin: w.origin, DropUnchanged: i%5 > 1, ChunkSectors: 1 << r.IntN(8)}
		before, origin := w.cow.Bytes(), w.origin.Bytes()
		out, res := made(t, w.cow, o)
		if !bytes.Equal(w.cow.Bytes(), before) || !bytes.Equal(w.origin.Bytes(), origin) {
			t.Fatal("the old store or the origin was changed")
		}
		wantClean(t, out, w.origin)
		st := wantDense(t, out)
		if st.Len() != res.Exceptions || st.Layout().ChunkSectors != o.ChunkSectors {
			t.Errorf("%d exceptions of %d sectors, want %d of %d", st.Len(), st.Layout().ChunkSectors, res.Exceptions, o.ChunkSectors)
		}
		if o.DropUnchanged {
			wantChanged(t, st, w)
		}
		if got := shown(t, w.origin, out); !bytes.Equal(got, w.view) {
			t.Fatalf("round %d, %+v, %+v: the snapshot shows something else", i, p, o.ChunkSectors)
		}
		again, res2 := made(t, out, o)
		if !bytes.Equal(again.Bytes(), out.Bytes()) {
			t.Fatalf("round %d: the second time it is another store (%+v, %+v)", i, res, res2)
		}
		if t.Failed() {
			t.Fatalf("round %d: %+v, %+v", i, p, o)
		}
	}
}

// wantChanged wants every stored chunk to differ from the origin, and all others to be the same.
func wantChanged(t *testing.T, st *store.Store, w world) {
	t.Helper()
	l, origin := st.Layout(), w.origin.Bytes()
	for n := range l.Chunks(int64(len(origin)), true) {
		off := l.OriginOffset(ondisk.OriginChunk(n))
		end := min(off+l.ChunkBytes(), int64(len(origin)))
		_, stored := st.Lookup(ondisk.OriginChunk(n))
		if differs := !bytes.Equal(w.view[off:end], origin[off:end]); differs != stored {
			t.Errorf("chunk %d: differs %v, stored %v", n, differs, stored)
		}
	}
}

// Chunks of more than a piece are compared and copied in pieces.
func TestLargeChunks(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	r := rand.New(rand.NewPCG(2, 2))
	for _, to := range []uint32{1 << 12, 1 << 13} { // 2 MiB, 4 MiB
		w := newWorld(t, r, past{sectors: 64, kind: snapshot.Persistent, holes: true, disk: 4<<20 + 512})
		out, _ := made(t, w.cow, compact.Options{Origin: w.origin, DropUnchanged: true, ChunkSectors: to})
		wantClean(t, out, w.origin)
		wantChanged(t, wantDense(t, out), w)
		if !bytes.Equal(shown(t, w.origin, out), w.view) {
			t.Errorf("%d sectors: the snapshot shows something else", to)
		}
		back, _ := made(t, out, compact.Options{Origin: w.origin, DropUnchanged: true, ChunkSectors: 1})
		wantChanged(t, wantDense(t, back), w)
		if !bytes.Equal(shown(t, w.origin, back), w.view) {
			t.Errorf("%d sectors and back: the snapshot shows something else", to)
		}
	}
}

// Without an origin: the same chunks, smaller ones, larger ones that are stored whole.
func TestWithoutOrigin(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	for _, to := range []uint32{8, 1, 4} {
		w := newWorld(t, r, past{sectors: 8, kind: snapshot.Persistent, holes: true, disk: 1 << 20})
		out, res := made(t, w.cow, compact.Options{ChunkSectors: to})
		wantClean(t, out, w.origin)
		if res.Filled != 0 || !bytes.Equal(shown(t, w.origin, out), w.view) {
			t.Errorf("%d sectors: the snapshot shows something else (%+v)", to, res)
		}
	}
	origin, cow := block.NewMemory(1<<20), block.NewMemory(2<<20)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	write := func(off, n int64) {
		if _, err := s.WriteAt(blocktest.Pattern(int(n), uint64(off)), off); err != nil {
			t.Fatal(err)
		}
	}
	write(3*65536, 65536)
	write(7*65536, 2*65536)
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	out, res := made(t, cow, compact.Options{ChunkSectors: 128})
	if res.Exceptions != 3 || !bytes.Equal(shown(t, origin, out), shown(t, origin, cow)) {
		t.Errorf("%+v", res)
	}
	write(0, 4096) // a part of a larger chunk
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := compact.NewPlan(t.Context(), cow, compact.Options{ChunkSectors: 128}); !errors.Is(err, compact.ErrNeedsOrigin) {
		t.Errorf("larger chunks that are stored in part: %v", err)
	}
	if _, err := compact.NewPlan(t.Context(), cow, compact.Options{DropUnchanged: true}); !errors.Is(err, compact.ErrNeedsOrigin) {
		t.Errorf("dropping without an origin: %v", err)
	}
}

// The last chunk of a disk that ends within it gives no smaller chunks after the end, where the origin is known;
// otherwise EndUnknown is set.
func TestShortLastChunk(t *testing.T) {
	origin, cow := block.NewMemory(65536+1024), block.NewMemory(1<<20)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 16})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range [][2]int{{8192, 8192}, {65536, 1024}} {
		if _, err := s.WriteAt(bytes.Repeat([]byte{7}, w[1]), int64(w[0])); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// What a kernel leaves behind the end of the disk is anything.
	if _, err := cow.WriteAt(bytes.Repeat([]byte{9}, 8192-1024), 3*8192+1024); err != nil {
		t.Fatal(err)
	}
	out, res := made(t, cow, compact.Options{Origin: origin, ChunkSectors: 1})
	wantClean(t, out, origin)
	if res.Exceptions != 16+2 {
		t.Errorf("%+v", res)
	}
	out, _ = made(t, cow, compact.Options{Origin: origin, ChunkSectors: 16})
	if tail := out.Bytes()[3*8192+1024 : 4*8192]; !bytes.Equal(tail, make([]byte, len(tail))) {
		t.Error("behind the end of the disk there is something")
	}
	p, err := compact.NewPlan(t.Context(), cow, compact.Options{ChunkSectors: 1})
	if err != nil || !p.EndUnknown() {
		t.Errorf("%v", err)
	}
	if off, n := p.LastStored(); off != 65536 || n != 8192 {
		t.Errorf("%d, %d", off, n)
	}
	for _, o := range []compact.Options{{}, {Origin: origin, ChunkSectors: 1}} {
		if p, err := compact.NewPlan(t.Context(), cow, o); err != nil || p.EndUnknown() {
			t.Errorf("%+v: the end is said to matter (%v)", o, err)
		}
	}
}

// A COW device that could never overflow can't afterwards, whatever the chunks.
func TestRoomStays(t *testing.T) {
	for from := uint32(1); from <= 64; from *= 2 {
		for to := uint32(1); to <= 64; to *= 2 {
			const disk = 1<<20 + 512
			a, b := ondisk.Layout{ChunkSectors: from}, ondisk.Layout{ChunkSectors: to}
			cow := block.NewMemory(int64(a.ChunksNeeded(a.Chunks(disk, true))) * a.ChunkBytes())
			if _, err := store.Create(cow, a, true); err != nil {
				t.Fatal(err)
			}
			out, _ := made(t, cow, compact.Options{ChunkSectors: to})
			if room, all := b.Room(b.Chunks(out.Size(), false)), b.Chunks(disk, true); room < all || out.Size() < cow.Size() {
				t.Errorf("%d to %d sectors: space for %d chunks of %d", from, to, room, all)
			}
		}
	}
}

// The size of the device is kept; zeros take no space. An odd valid word is a problem of the old store (DS008) that the
// new one does not have.
func TestKept(t *testing.T) {
	origin, cow := block.NewMemory(1<<22), block.NewMemory(8<<20)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{1 << 20, 3 << 20} {
		if _, err := s.WriteAt(make([]byte, 256<<10), off); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.WriteAt([]byte("data"), 2<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := cow.WriteAt([]byte{0xff, 0xff, 0xff, 0xff}, 4); err != nil {
		t.Fatal(err)
	}
	p, err := compact.NewPlan(t.Context(), cow, compact.Options{})
	if err != nil {
		t.Fatal(err)
	}
	out := block.NewMemory(p.Size())
	if _, err := p.Write(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	if h, err := store.ReadHeader(out); err != nil || h.Valid != 1 {
		t.Errorf("%+v, %v", h, err)
	}
	if r, err := check.Run(t.Context(), out, check.Options{}); err != nil || len(r.Findings) > 0 {
		t.Errorf("check: %v, %v", r, err)
	}
	if out.Size() != cow.Size() || out.Allocated() > 64<<10 {
		t.Errorf("%d bytes, of which %d take space", out.Size(), out.Allocated())
	}
}

// Whatever fails, the error comes out; and a signal ends the work.
func TestFailures(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	w := newWorld(t, rand.New(rand.NewPCG(4, 4)), past{sectors: 8, kind: snapshot.Persistent, disk: 1 << 20})
	boom := errors.New("the disk fails")
	compactOn := func(cow, origin, out block.Device) error {
		p, err := compact.NewPlan(t.Context(), cow, compact.Options{Origin: origin, DropUnchanged: true, ChunkSectors: 16})
		if err == nil {
			_, err = p.Write(t.Context(), out)
		}
		return err
	}
	for which := range 3 {
		devs := [3]block.Device{w.cow, w.origin, block.NewMemory(4 << 20)}
		faults := blocktest.NewFaulty(devs[which], nil)
		devs[which] = faults
		if err := compactOn(devs[0], devs[1], devs[2]); err != nil {
			t.Fatal(err)
		}
		n, want := faults.Count(), shown(t, w.origin, devs[2])
		for i := range n {
			devs[2] = block.NewMemory(4 << 20)
			if which == 2 {
				faults = blocktest.NewFaulty(devs[2], nil)
				devs[2] = faults
			}
			faults.Set(blocktest.FailNth(faults.Count()+1+i, boom))
			err := compactOn(devs[0], devs[1], devs[2])
			faults.Set(nil)
			if err == nil && which == 0 && bytes.Equal(shown(t, w.origin, devs[2]), want) {
				continue // an area was read again, sector by sector
			}
			if !errors.Is(err, boom) && !errors.Is(err, compact.ErrDamaged) {
				t.Fatalf("device %d, operation %d of %d: %v", which, i, n, err)
			}
		}
	}
	full := blocktest.NewQuota(block.NewMemory(4<<20), 64<<10, true)
	if err := compactOn(w.cow, w.origin, full); !block.IsNoSpace(err) {
		t.Errorf("without space: %v", err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	p, err := compact.NewPlan(ctx, w.cow, compact.Options{})
	if err != nil {
		t.Fatal(err)
	}
	stop(boom)
	if _, err := p.Write(ctx, block.NewMemory(p.Size())); !errors.Is(err, boom) {
		t.Errorf("when its context ends: %v", err)
	}
}

// What is invalid or damaged is refused, by both.
func TestRefused(t *testing.T) {
	for what, c := range map[string]struct {
		off   int64
		bytes []byte
		want  error
		punch error // where it differs
	}{
		"invalid":        {4, []byte{0}, store.ErrInvalid, nil},
		"no store":       {0, []byte{0, 0, 0, 0}, compact.ErrDamaged, nil},
		"chunk twice":    {4096, []byte{1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3}, compact.ErrDamaged, nil},
		"void slots":     {8192 - 16, []byte{1, 0, 0, 0, 0, 0, 0, 0, 200}, nil, compact.ErrDamaged},
		"past the end":   {4096 + 8, []byte{0, 0, 0, 1}, compact.ErrDamaged, nil},
		"another origin": {4096, []byte{0, 0, 0, 0, 1}, nil, nil},
	} {
		w := newWorld(t, rand.New(rand.NewPCG(5, 5)), past{sectors: 8, kind: snapshot.Persistent, disk: 1 << 20})
		if _, err := w.cow.WriteAt(c.bytes, c.off); err != nil {
			t.Fatal(err)
		}
		before := w.cow.Bytes()
		_, err := compact.NewPlan(t.Context(), w.cow, compact.Options{Origin: w.origin})
		if what == "another origin" {
			if err == nil {
				t.Error("an exception behind the end of the origin")
			}
			continue
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
		if c.punch == nil {
			c.punch = c.want
		}
		if _, err := compact.Punch(t.Context(), w.cow, nil); !errors.Is(err, c.punch) {
			t.Errorf("%s: punch: %v", what, err)
		}
		if !bytes.Equal(w.cow.Bytes(), before) {
			t.Errorf("%s: the store was touched", what)
		}
	}
}
