package store_test

import (
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// benchChunks is how many exceptions a benchmark's store takes before it is made again.
const benchChunks = 256 << 10

// room is a COW device in memory with space for n exceptions of 4 KiB; only what is written is there.
func room(n uint64) *block.Memory {
	l := ondisk.Layout{ChunkSectors: 8}
	return block.NewMemory(int64(l.ChunksNeeded(n)) * l.ChunkBytes())
}

// fillStore makes n exceptions, scattered, without data, and makes them durable.
func fillStore(b *testing.B, dev block.Device, n uint64) {
	b.Helper()
	s, err := store.Create(dev, ondisk.Layout{ChunkSectors: 8}, true)
	if err != nil {
		b.Fatal(err)
	}
	for i := range n {
		reserveAndCommit(b, s, i*0x9E3779B1%(4*n), 1)
	}
	if err := s.Sync(); err != nil {
		b.Fatal(err)
	}
}

func reserveAndCommit(b *testing.B, s *store.Store, old, n uint64) {
	r, err := s.Reserve(ondisk.OriginChunk(old), n)
	if err != nil {
		b.Fatal(err)
	}
	r.Commit()
}

// BenchmarkReserveCommitSync makes exceptions one by one and syncs after so many. The time is of one exception.
func BenchmarkReserveCommitSync(b *testing.B) {
	for _, batch := range []int{1, 16, 4096} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			dev := room(benchChunks)
			var s *store.Store
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				n := i % benchChunks
				if n == 0 {
					b.StopTimer()
					var err error
					if s, err = store.Create(dev, ondisk.Layout{ChunkSectors: 8}, true); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				reserveAndCommit(b, s, uint64(n)*0x9E3779B1%(4*benchChunks), 1)
				if (n+1)%batch == 0 {
					if err := s.Sync(); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkOpen loads a store of a quarter of a million scattered exceptions from memory.
func BenchmarkOpen(b *testing.B) {
	dev := room(benchChunks)
	fillStore(b, dev, benchChunks)
	b.ReportAllocs()
	for b.Loop() {
		s, err := store.Open(dev)
		if err != nil {
			b.Fatal(err)
		}
		if s.Len() != benchChunks {
			b.Fatalf("%d exceptions", s.Len())
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/benchChunks, "ns/exception")
}
