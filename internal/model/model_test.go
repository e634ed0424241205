package model

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

// world is an origin whose sector i is full of i+1, and one snapshot.
func world(sectors int64, c Config) (*Origin, *Snapshot) {
	var b []byte
	for i := range sectors {
		b = append(b, fill(1, byte(i+1))...)
	}
	if c.Size == 0 {
		c.Size = sectors
	}
	o := New(b)
	return o, o.Attach(c)
}

func fill(n int64, x byte) []byte { return bytes.Repeat([]byte{x}, int(n*Sector)) }

// shows returns the first byte of each sector.
func shows(b []byte) string {
	s := ""
	for i := 0; i < len(b); i += Sector {
		s += fmt.Sprintf("%d ", b[i])
	}
	return s
}

func want(t *testing.T, what string, got, want any) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// TestStatusTexts: the table of docs/spec/dm-snapshot.md §6.6, observed on a kernel.
func TestStatusTexts(t *testing.T) {
	for _, c := range []struct {
		store      string
		chunk, cow int64
		exceptions int64
		status     string
	}{
		{"P", 8, 1024, 0, "16/1024 16"},
		{"P", 8, 1024, 1, "24/1024 16"},
		{"P", 8, 1024, 7, "72/1024 16"},
		{"P", 8, 40, 3, "40/40 16"},
		{"P", 1, 400, 31, "33/400 2"},
		{"P", 1, 400, 32, "35/400 3"},
		{"P", 1, 400, 33, "36/400 3"},
		{"P", 1, 400, 64, "68/400 4"},
		{"P", 1, 400, 70, "74/400 4"},
		{"P", 8, 2072, 256, "2072/2072 24"},
		{"N", 8, 40, 5, "40/40 0"},
	} {
		_, s := world(3000, Config{Store: c.store, Chunk: c.chunk, COW: c.cow})
		want(t, "write", s.Write(0, fill(c.exceptions*c.chunk, 1)), OK)
		want(t, "status", s.Status(), c.status)
	}
}

// TestWhenFull: the table of docs/spec/dm-snapshot.md §2.8, but that what needs an area past the end is refused (H10).
func TestWhenFull(t *testing.T) {
	for sectors, fit := range map[int64]int{33: 31, 34: 31, 35: 32, 36: 33} {
		for store, then := range map[string]string{"P": "Invalid", "PO": "Overflow"} {
			_, s := world(100, Config{Store: store, Chunk: 1, COW: sectors})
			for i := range int64(fit) {
				want(t, "write", s.Write(i, fill(1, 1)), OK)
			}
			if r := s.Write(99, fill(1, 1)); r == OK {
				t.Errorf("%d sectors: exception %d fits", sectors, fit)
			}
			want(t, "status", s.Status(), then)
		}
	}
}

func TestSlots(t *testing.T) {
	_, s := world(100, Config{Store: "P", Chunk: 1, COW: 400})
	for i := range int64(70) {
		s.Write(99-i, fill(1, 1))
	}
	slots, synced := s.Slots()
	want(t, "the 1st", slots[0], [2]int64{99, 2})
	want(t, "the 32nd", slots[31], [2]int64{68, 33})
	want(t, "the 33rd", slots[32], [2]int64{67, 35})
	want(t, "the 70th", slots[69], [2]int64{30, 73})
	want(t, "on disk", synced, 0)
	s.Flush()
	_, synced = s.Slots()
	want(t, "on disk", synced, 70)
}

// TestMergeExampleA: docs/spec/dm-snapshot.md §4.3 A, and C for the numbers across an area.
func TestMergeExampleA(t *testing.T) {
	o, s := world(400, Config{Store: "P", Chunk: 8, COW: 1024})
	for _, chunk := range []int64{10, 11, 12, 20, 30, 29, 28, 40, 41} {
		s.Write(8*chunk, fill(8, 200))
	}
	want(t, "begin", o.BeginMerge(s), true)
	var steps []string
	for {
		n, r := o.Step(0)
		want(t, "step", r, OK)
		if n == 0 {
			break
		}
		steps = append(steps, fmt.Sprintf("%d: %s", n, s.Status()))
	}
	want(t, "steps", steps, "[2: 72/1024 16 1: 64/1024 16 1: 56/1024 16 1: 48/1024 16 1: 40/1024 16 3: 16/1024 16]")

	o, s = world(100, Config{Store: "P", Chunk: 1, COW: 400})
	s.Write(0, fill(40, 1))
	o.BeginMerge(s)
	var status []string
	for range 10 {
		status = append(status, s.Status())
		o.Step(1)
	}
	want(t, "status", status, "[43/400 3 42/400 3 41/400 3 40/400 3 39/400 3 38/400 3 37/400 3 36/400 3 35/400 3 33/400 2]")
}

func TestSnapshotAndOriginApart(t *testing.T) {
	o, s := world(7, Config{Store: "P", Chunk: 4, COW: 400})
	want(t, "origin write", o.Write(5, fill(2, 100)), OK)
	want(t, "write", s.Write(1, fill(1, 200)), OK)
	b, _ := s.Read(0, 7)
	want(t, "snapshot", shows(b), "1 200 3 4 5 6 7 ")
	want(t, "origin", shows(o.Read(0, 7)), "1 2 3 4 5 100 100 ")
	want(t, "exceptions", s.order, "[1 0]")
}

func TestMergeWithAnotherSnapshot(t *testing.T) {
	o, s := world(8, Config{Store: "P", Chunk: 2, COW: 400})
	other := o.Attach(Config{Store: "P", Chunk: 4, COW: 400, Size: 8})
	s.Write(1, fill(1, 200))
	o.BeginMerge(s)
	want(t, "write to the COW device", o.Write(0, fill(1, 210)), OK)
	want(t, "write to the disk", o.Write(6, fill(1, 220)), OK)
	want(t, "origin", shows(o.Read(0, 8)), "210 200 3 4 5 6 220 8 ")
	want(t, "disk", shows(o.Raw), "1 2 3 4 5 6 220 8 ")
	want(t, "exceptions", other.order, "[1]")
	n, _ := o.Step(9)
	want(t, "step", n, 1)
	o.EndMerge()
	want(t, "disk", shows(o.Raw), "210 200 3 4 5 6 220 8 ")
	b, _ := other.Read(0, 8)
	want(t, "other", shows(b), "1 2 3 4 5 6 7 8 ")
	want(t, "exceptions", other.order, "[1 0]")
}

func TestWhatIsNotPreserved(t *testing.T) {
	o, s := world(8, Config{Store: "P", Chunk: 2, COW: 400, Size: 5, Zeroes: true, Passdown: true})
	o.Write(5, fill(2, 100)) // past the end of s
	s.Write(2, fill(1, 200))
	want(t, "exceptions", s.order, "[1]")
	want(t, "discard", s.Discard(1, 2), OK)
	b, _ := s.Read(0, 5)
	want(t, "snapshot", shows(b), "1 0 0 4 5 ")
	s.Detach()
	o.Write(0, fill(4, 110)) // while it is away
	s.Reattach()
	b, _ = s.Read(0, 5)
	want(t, "snapshot", shows(b), "110 110 0 4 5 ")
	o.BeginMerge(s)
	want(t, "origin", shows(o.Read(0, 8)), "110 110 0 4 5 100 100 8 ")
}

func TestPolicies(t *testing.T) {
	o, s := world(20, Config{Store: "PO", Chunk: 2, COW: 4 * 2, FailFull: true})
	want(t, "write", s.Write(0, fill(6, 200)), NoRoom)
	b, _ := s.Read(0, 6)
	want(t, "snapshot", shows(b), "200 200 200 200 5 6 ")
	want(t, "origin write", o.Write(3, fill(2, 100)), NoRoom)
	want(t, "origin", shows(o.Read(3, 2)), "4 5 ")
	want(t, "status", s.Status(), "8/8 4")
	s.GrowStep, s.GrowMax = 1, 7*2
	want(t, "origin write", o.Write(3, fill(9, 100)), NoRoom)
	want(t, "status", s.Status(), "14/14 4")
	want(t, "exceptions", s.order, "[0 1 2 3 4]")
}

// TestUnexceptedChunksAreTheDisks: whatever happens, a valid snapshot differs from the disk in chunks with
// exceptions only. It is what joins the copy to the exceptions.
func TestUnexceptedChunksAreTheDisks(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		o, s := world(20+r.Int64N(60), Config{Store: "P", Chunk: 1 << r.IntN(4), COW: 60 + r.Int64N(100)})
		away := false
		for range 60 {
			at := r.Int64N(o.sectors())
			p := fill(1+r.Int64N(min(9, o.sectors()-at)), byte(r.Int()))
			n := int64(len(p)) / Sector
			switch k := r.IntN(10); {
			case k < 4:
				o.Write(at, p)
			case k < 6 && !away:
				s.Write(at, p)
			case k == 6 && !away:
				s.Zeroes, s.Passdown = true, r.IntN(2) == 0
				s.Discard(at, n)
			case k == 7 && o.Merging == nil && !away:
				s.Detach()
				away = true
			case k == 7 && o.Merging == nil:
				s.Reattach()
				away = false
			case k == 8 && o.Merging == nil:
				o.BeginMerge(s)
				away = true
			case k == 8 && r.IntN(3) == 0:
				o.EndMerge()
			case o.Merging != nil:
				o.Step(r.Int64N(5))
			}
			for i := range o.sectors() {
				if s.Valid() && !s.InCOW(i) && !bytes.Equal(s.view[i*Sector:(i+1)*Sector], o.Raw[i*Sector:(i+1)*Sector]) {
					t.Fatalf("seed %d: sector %d has no exception and shows %d, the disk %d", seed, i, s.view[i*Sector], o.Raw[i*Sector])
				}
			}
		}
	}
}
