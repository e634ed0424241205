package snapshot_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
)

const (
	benchBlock  = 4096
	benchBlocks = 16 << 10 // of the origin: 64 MiB
)

// scattered is where the i-th of benchBlocks accesses goes: each block once, in no order.
func scattered(i int) int64 { return int64(i*0x9E3779B1%benchBlocks) * benchBlock }

// bench is an origin in memory with the given number of snapshots, of which the first is returned.
func bench(b *testing.B, snapshots int, opts ...snapshot.OriginOption) (o *snapshot.Origin, first *snapshot.Snapshot, end func()) {
	b.Helper()
	o = snapshot.NewOrigin(block.NewMemory(benchBlocks*benchBlock), opts...)
	var all []*snapshot.Snapshot
	for range snapshots {
		// Header, areas and data of as many chunks as the origin has, and some to spare.
		cow := block.NewMemory((benchBlocks + benchBlocks/128 + 4) * benchBlock)
		s, err := o.Attach(cow, snapshot.Options{ChunkSectors: benchBlock / sector})
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, s)
	}
	return o, all[0], func() {
		for _, s := range all {
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// write4K writes to a block of dev.
func write4K(b *testing.B, dev block.Device, p []byte, i int) {
	if _, err := dev.WriteAt(p, scattered(i)); err != nil {
		b.Fatal(err)
	}
}

// afresh measures what can be done once to each block: do(i) with i from 0 to benchBlocks-1, then everything from the
// beginning with what set returns.
func afresh(b *testing.B, set func() (do func(i int), end func())) {
	var do func(int)
	var end func()
	b.SetBytes(benchBlock)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if n%benchBlocks == 0 {
			b.StopTimer()
			if end != nil {
				end()
			}
			do, end = set()
			b.StartTimer()
		}
		do(n % benchBlocks)
	}
	end()
}

func BenchmarkFirstWrite(b *testing.B) {
	p := make([]byte, benchBlock)
	afresh(b, func() (func(int), func()) {
		_, s, end := bench(b, 1)
		return func(i int) { write4K(b, s, p, i) }, end
	})
}

// BenchmarkOriginWrite writes to the origin beneath the given number of snapshots, each of which keeps each block
// first.
func BenchmarkOriginWrite(b *testing.B) {
	p := make([]byte, benchBlock)
	for _, k := range []int{1, 4, 16} {
		b.Run(fmt.Sprintf("snapshots=%d", k), func(b *testing.B) {
			afresh(b, func() (func(int), func()) {
				o, _, end := bench(b, k)
				return func(i int) { write4K(b, o, p, i) }, end
			})
		})
	}
}

// BenchmarkOriginWriteBack is BenchmarkOriginWrite with writes that stay in memory for a while.
func BenchmarkOriginWriteBack(b *testing.B) {
	p := make([]byte, benchBlock)
	for _, k := range []int{1, 4} {
		b.Run(fmt.Sprintf("snapshots=%d", k), func(b *testing.B) {
			afresh(b, func() (func(int), func()) {
				o, _, end := bench(b, k, snapshot.WriteBack(64<<20, 100*time.Millisecond))
				return func(i int) { write4K(b, o, p, i) }, end
			})
		})
	}
}

// halfMapped is a snapshot of which every other block is in the COW device.
func halfMapped(b *testing.B) (s *snapshot.Snapshot, end func()) {
	b.Helper()
	_, s, end = bench(b, 1)
	for i := 0; i < benchBlocks; i += 2 {
		if _, err := s.WriteAt(make([]byte, benchBlock), int64(i)*benchBlock); err != nil {
			b.Fatal(err)
		}
	}
	return s, end
}

func BenchmarkRewrite(b *testing.B) {
	s, end := halfMapped(b)
	defer end()
	p := make([]byte, benchBlock)
	b.SetBytes(benchBlock)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := s.WriteAt(p, scattered(i%benchBlocks)&^(2*benchBlock-1)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRead reads blocks at random, as often from the origin as from the COW device; and long ranges, in which the
// two take turns.
func BenchmarkRead(b *testing.B) {
	for _, n := range []int{benchBlock, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", n>>10), func(b *testing.B) {
			s, end := halfMapped(b)
			defer end()
			p := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := s.ReadAt(p, scattered(i%benchBlocks)/int64(n)*int64(n)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
