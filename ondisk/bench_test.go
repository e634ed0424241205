package ondisk_test

import (
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

// BenchmarkDecodeArea decodes the 256 slots of an area of 4 KiB.
func BenchmarkDecodeArea(b *testing.B) {
	area := make([]byte, 4096)
	for i := range uint64(len(area) / ondisk.SlotSize) {
		ondisk.Exception{Old: ondisk.OriginChunk(i * 7), New: ondisk.COWChunk(i + 2)}.Encode(area[i*ondisk.SlotSize:])
	}
	b.SetBytes(int64(len(area)))
	sum := ondisk.COWChunk(0)
	for b.Loop() {
		for at := 0; at < len(area); at += ondisk.SlotSize {
			sum += ondisk.DecodeException(area[at:]).New
		}
	}
	if sum == 0 {
		b.Fatal("nothing decoded")
	}
}

// BenchmarkNextData finds data chunks one after the other, as the allocator does.
func BenchmarkNextData(b *testing.B) {
	l := ondisk.Layout{ChunkSectors: 8}
	m := ondisk.FirstDataChunk
	for b.Loop() {
		m = l.NextData(m + 1)
	}
}
