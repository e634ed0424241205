package snapshot_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// FuzzStore has anything stand on a COW device: it is refused with its place and left alone, or it is a
// snapshot that can be read, written and merged like any other.
func FuzzStore(f *testing.F) {
	f.Add(image(1, 80, consecutive(1, 40, 3)...), uint16(100))
	f.Add(image(8, 64, pair{2, 3}, pair{0, 2}, pair{7, 5}), uint16(57))
	f.Add(setHeader(image(2, 32, pair{1, 2}), 1, 0), uint16(16))
	f.Add([]byte("SnAp"), uint16(1))
	f.Fuzz(func(t *testing.T, content []byte, originSectors uint16) {
		if len(content) > 64<<10 {
			return
		}
		content = bytes.Clone(content[:len(content)/sector*sector])
		sectors := int64(originSectors%512) + 1
		disk, cow := block.MemoryFrom(blocktest.Pattern(int(sectors*sector), 1)), block.MemoryFrom(bytes.Clone(content))
		origin := snapshot.NewOrigin(disk)
		s, err := origin.Attach(cow, snapshot.Options{Features: snapshot.Features{DiscardZeroesCOW: true}})
		if err != nil {
			if !bytes.Equal(cow.Bytes(), content) && len(content) >= 4 && !bytes.Equal(content[:4], make([]byte, 4)) {
				t.Fatalf("refused (%v), and touched", err)
			}
			return
		}
		view := make([]byte, sectors*sector)
		if _, err := s.ReadAt(view, 0); err != nil {
			if !isInvalid(err) {
				t.Fatal(err)
			}
			return
		}
		at := int64(originSectors) * 7 % sectors
		if _, err := s.WriteAt(fill(1, 0x5a), at*sector); err != nil {
			if !isInvalid(err) {
				t.Fatal(err)
			}
			return
		}
		copy(view[at*sector:], fill(1, 0x5a))
		if _, err := origin.WriteAt(fill(1, 0xa5), (sectors-1-at)*sector); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(view))
		if _, err := s.ReadAt(got, 0); isInvalid(err) {
			return // it was full
		} else if err != nil || !bytes.Equal(got, view) {
			t.Fatalf("another view: %v", err)
		}
		m, err := s.BeginMerge()
		if err != nil {
			return // chunks behind the origin's end
		}
		for i := 0; ; i++ {
			n, err := m.Step(uint64(i % 5))
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				break
			}
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(disk.Bytes(), view) {
			t.Fatal("merged to something else")
		}
		if again, err := store.Open(cow); err != nil || again.Len() != 0 {
			t.Fatalf("after the merge: %v", err)
		}
	})
}

// FuzzTable: a table line that is read is printed so that it is read the same.
func FuzzTable(f *testing.F) {
	f.Add("0 4096 snapshot 7:0 7:1 P 8 2 discard_zeroes_cow discard_passdown_origin")
	f.Add("0 4096 snapshot-merge /dev/a /dev/b po 0")
	f.Add("0 1 snapshot-origin 7:0")
	f.Fuzz(func(t *testing.T, line string) {
		table, err := kernelcase.ParseTable(line)
		if err != nil {
			return
		}
		again, err := kernelcase.ParseTable(table.String())
		if err != nil || again != table {
			t.Errorf("%q was read as %+v and printed as %q, which is %+v, %v", line, table, table, again, err)
		}
		if table.ChunkSectors != 0 && errors.Is(ondisk.CheckChunkSectors(table.ChunkSectors), ondisk.ErrChunkNotPowerOf2) {
			t.Errorf("%q: chunk size %d", line, table.ChunkSectors)
		}
	})
}
