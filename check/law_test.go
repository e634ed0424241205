package check_test

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// FuzzCleanOpens: what check calls clean opens, and every chunk it names can be read. The other way
// round, what opens has nothing that check calls an error (but for what opening does not look at), and what
// does not open has.
func FuzzCleanOpens(f *testing.F) {
	f.Add([]byte{}, uint16(40), uint8(0))
	for _, es := range [][]ondisk.Exception{
		{{Old: 5, New: 2}, {Old: 6, New: 3}}, {{Old: 5, New: 4}, {Old: 5, New: 3}}, {{Old: 1, New: 2}, {Old: 2, New: 2}}, {{Old: 1, New: 34}},
		{{Old: 1, New: 9}, {Old: 7}, {Old: 1, New: 3}}, {{Old: 1, New: 1 << 60}},
	} {
		b := []byte{'S', 'n', 'A', 'p', 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}
		for _, e := range es {
			b = binary.LittleEndian.AppendUint64(b, uint64(e.Old))
			b = binary.LittleEndian.AppendUint64(b, uint64(e.New))
		}
		f.Add(b, uint16(40), uint8(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, sectors uint16, shift uint8) {
		dev := block.NewMemory(int64(sectors) * 512)
		header := min(len(b), ondisk.HeaderSize)
		if dev.Size() >= 512 {
			dev.WriteAt(b[:header], 0)
		}
		l := ondisk.Layout{ChunkSectors: 1 << (shift % 4)}
		for n, b := uint64(0), b[header:]; len(b) >= ondisk.SlotSize; n, b = n+1, b[ondisk.SlotSize:] {
			dev.WriteAt(b[:ondisk.SlotSize], l.SlotOffset(ondisk.Slot{Area: n / l.SlotsPerArea(), Index: n % l.SlotsPerArea()}))
		}
		r := run(t, dev, check.Options{})
		st, err := store.Open(dev)
		sound := err == nil && st.Err() == nil
		if r.Clean() && !sound {
			t.Fatalf("clean, and does not open: %v", errors.Join(err))
		}
		refuses := false
		for c := range r.Found {
			refuses = refuses || c.Problem().Severity == check.Error && c != check.OriginImpossible
		}
		if sound == refuses {
			t.Fatalf("opening says %v, check %v", err, r.Findings)
		}
		if !sound {
			return
		}
		if _, odd := r.Found[check.OriginImpossible]; !odd && st.Len() != r.Exceptions {
			t.Fatalf("%d exceptions in the store, %d counted", st.Len(), r.Exceptions)
		}
		p := make([]byte, st.Layout().ChunkBytes())
		for run := range st.Exceptions() {
			for i := range run.Count {
				if _, err := dev.ReadAt(p, st.Layout().COWOffset(run.New+ondisk.COWChunk(i))); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// BenchmarkRun checks 16 Mi exceptions in a file of the page cache, over an origin of 1 TiB.
func BenchmarkRun(b *testing.B) {
	const n = 16 << 20
	for _, order := range []struct {
		name string
		old  func(i uint64) uint64
	}{
		{"sequential", func(i uint64) uint64 { return i }},
		{"scattered", func(i uint64) uint64 { return i * 0x9E3779B1 % (1 << 28) }}, // odd, so no chunk comes twice
	} {
		b.Run(order.name, func(b *testing.B) {
			dev := writeLarge(b, n, order.old)
			before := processorTime(b)
			for b.Loop() {
				r, err := check.Run(b.Context(), dev, check.Options{})
				if err != nil || r.Slots != n {
					b.Fatal(r, err)
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds()/1e6, "Mexceptions/s")
			// On a machine that does other work too this is the figure that means something.
			b.ReportMetric(float64(n)*float64(b.N)/(processorTime(b)-before).Seconds()/1e6, "Mexceptions/cpu-s")
		})
	}
}

// processorTime is what this process has used so far.
func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// writeLarge makes a sparse COW file with n exceptions in order.
func writeLarge(b *testing.B, n uint64, old func(uint64) uint64) block.Device {
	l := ondisk.Layout{ChunkSectors: 8}
	dev, err := block.Create(b.TempDir()+"/cow", int64(l.ChunksNeeded(n))*l.ChunkBytes())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { dev.Close() })
	p := make([]byte, l.ChunkBytes())
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 8}.Encode(p)
	dev.WriteAt(p, 0)
	e := l.SlotsPerArea()
	for i := range n {
		ondisk.Exception{Old: ondisk.OriginChunk(old(i)), New: l.DataChunk(i)}.Encode(p[i%e*ondisk.SlotSize:])
		if i%e == e-1 {
			dev.WriteAt(p, l.COWOffset(l.AreaChunk(i/e)))
		}
	}
	return dev
}
