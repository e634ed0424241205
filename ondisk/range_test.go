package ondisk

import (
	"math"
	"math/big"
	"testing"
)

// FuzzLayout: the positions of chunks and slots on disks of any size agree with big integers, which can't overflow.
func FuzzLayout(f *testing.F) {
	for _, size := range []int64{0, 1, 512, 16 << 40, 1<<62 + 512, math.MaxInt64 - 511, math.MaxInt64} {
		for _, shift := range []uint8{0, 3, 11, 21} {
			f.Add(size, uint64(size)-1, uint64(1), shift)
			f.Add(size, uint64(size)/2, uint64(math.MaxUint64), shift)
		}
	}
	f.Fuzz(func(t *testing.T, size int64, at, count uint64, shift uint8) {
		l, err := NewLayout(1 << (shift % 22))
		if err != nil {
			t.Fatal(err)
		}
		size = max(size, -size-1)
		chunk, end := big.NewInt(l.ChunkBytes()), big.NewInt(size)
		whole, rest := new(big.Int).DivMod(end, chunk, new(big.Int))
		if got := l.Chunks(size, false); got != whole.Uint64() {
			t.Errorf("%d whole chunks in %d bytes", got, size)
		}
		if got := l.Chunks(size, true); got != whole.Uint64()+uint64(rest.Sign()) {
			t.Errorf("%d chunks in %d bytes", got, size)
		}
		if size == 0 {
			return
		}
		off := int64(at % uint64(size))
		first := l.OriginChunkAt(off)
		from, to := l.OriginRange(first, count, size)
		wantFrom := new(big.Int).Mul(new(big.Int).SetUint64(uint64(first)), chunk)
		wantTo := new(big.Int).Mul(new(big.Int).SetUint64(count), chunk)
		if wantTo.Add(wantTo, wantFrom); wantTo.Cmp(end) > 0 {
			wantTo = end
		}
		if from != l.OriginOffset(first) || wantFrom.Cmp(big.NewInt(from)) != 0 || wantTo.Cmp(big.NewInt(to)) != 0 || from > off {
			t.Errorf("%d chunks from %d on, of %d bytes: %d to %d, want %v to %v", count, first, size, from, to, wantFrom, wantTo)
		}
		// The n-th data chunk is the last for which ChunksNeeded has to reach, and Room counts the same.
		chunks := l.Chunks(size, false)
		room := l.Room(chunks)
		if room > 0 {
			n := at % room
			if m := l.DataChunk(n); !l.IsData(m) || uint64(m) >= chunks || l.ChunksNeeded(n) > uint64(m) || l.COWOffset(m) < 0 {
				t.Errorf("exception %d of %d is in chunk %d of %d", n, room, m, chunks)
			}
			if l.ChunksNeeded(room) > chunks {
				t.Errorf("space for %d in %d chunks", room, chunks)
			}
			s := Slot{Area: n / l.SlotsPerArea(), Index: n % l.SlotsPerArea()}
			if off := l.SlotOffset(s); off < l.ChunkBytes() || off > size-SlotSize {
				t.Errorf("slot of exception %d is at %d of %d bytes", n, off, size)
			}
		}
	})
}
