package snapshot_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A liar is a COW device of chunks of one sector of which one read of slots returns success and wrong bytes.
type liar struct {
	*block.Memory
	lie   func(l *liar, p []byte, off int64)
	nth   int // of the reads of slots, from 1, is the lie; 0: none
	reads int
}

func (l *liar) ReadAt(p []byte, off int64) (int, error) {
	n, err := l.Memory.ReadAt(p, off)
	if (ondisk.Layout{ChunkSectors: 1}).IsArea(ondisk.COWChunk(off / sector)) {
		if l.reads++; l.reads == l.nth {
			l.lie(l, p, off)
		}
	}
	return n, err
}

// lies are what a read of slots may return instead: also slots that are elsewhere in the same store.
var lies = map[string]func(l *liar, p []byte, off int64){
	"zeros":    func(l *liar, p []byte, off int64) { clear(p) },
	"ones":     func(l *liar, p []byte, off int64) { copy(p, bytes.Repeat([]byte{0xff}, len(p))) },
	"a bit":    func(l *liar, p []byte, off int64) { p[len(p)-8] ^= 1 },
	"old bit":  func(l *liar, p []byte, off int64) { p[0] ^= 4 },
	"no last":  func(l *liar, p []byte, off int64) { clear(p[len(p)-ondisk.SlotSize:]) },
	"the same": func(l *liar, p []byte, off int64) { copy(p, bytes.Repeat(p[:ondisk.SlotSize], len(p)/ondisk.SlotSize)) },
	"slot before": func(l *liar, p []byte, off int64) {
		if off%sector >= ondisk.SlotSize {
			l.Memory.ReadAt(p, off-ondisk.SlotSize)
		}
	},
	"first area": func(l *liar, p []byte, off int64) { l.Memory.ReadAt(p, sector+off%sector) },
	"exchanged": func(l *liar, p []byte, off int64) {
		first, last := p[:ondisk.SlotSize], p[len(p)-ondisk.SlotSize:]
		t := bytes.Clone(first)
		copy(first, last)
		copy(last, t)
	},
}

// TestLiesAboutSlotsDropNothing: whatever one read of slots returns during a merge, no exception is dropped
// whose chunk was not merged. The step fails, with origin and remaining exceptions still the merged content,
// or the lie made no difference; going on ends in the right origin.
//
// What cannot be promised without checksums: a lie about data is merged as it was read, and what a store
// said when it was loaded is used.
func TestLiesAboutSlotsDropNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	before, cow, want := threeAreas(t)
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			failed, runs := 0, 0
			for _, window := range []uint64{0, 5, 40} {
				for n, reached := 1, true; reached; n += stride {
					l := &liar{Memory: block.MemoryFrom(cow), lie: lie}
					f := mergeWithALie(t, block.MemoryFrom(before), l, n, window, want)
					reached = l.reads >= l.nth
					failed, runs = failed+f, runs+1
					if t.Failed() {
						t.Fatalf("window %d, lie at read %d", window, n)
					}
				}
			}
			t.Logf("%d merges with a lie, %d steps failed", runs, failed)
			if failed == 0 {
				t.Error("no lie was noticed")
			}
		})
	}
}

// threeAreas makes an origin, a store of 70 exceptions in three areas, and what merging it gives.
func threeAreas(t *testing.T) (origin, cow, merged []byte) {
	r := newRig(t, 80)
	c := r.cow("COW", 96)
	s := r.attach(c, snapshot.Options{ChunkSectors: 1})
	for i := range int64(70) {
		at := i * 37 % 80 // here and there; runs of one
		if i > 50 {
			at = 79 - (70-i)%7*11 - (70-i)/7 // some to be overwritten, some new
		}
		write(t, s, at, 1, byte(i+1))
	}
	for at := int64(0); s.Status().Exceptions < 70; at++ {
		write(t, s, at, 1, byte(at+100))
	}
	flush(t, s)
	merged = readAll(t, s)
	return r.before, slices.Clone(c.memory.Bytes()), merged
}

// mergeWithALie merges in windows with a lie at the n-th read of slots, and returns how many steps failed.
func mergeWithALie(t *testing.T, origin *block.Memory, l *liar, n int, window uint64, want []byte) (failed int) {
	o := snapshot.NewOrigin(origin)
	m, err := o.LoadMerge(l, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	l.reads, l.nth = 0, n
	for range 1000 {
		k, err := m.Step(window)
		if err != nil {
			var corrupt *ondisk.CorruptError
			if !errors.Is(err, snapshot.ErrMergeFailed) || !errors.As(err, &corrupt) {
				t.Errorf("error %v", err)
			}
			failed++
			wantMerged(t, origin, l, want)
		}
		if k == 0 && err == nil || t.Failed() {
			break
		}
	}
	if failed > 1 {
		t.Errorf("one lie failed %d steps", failed)
	}
	if !bytes.Equal(origin.Bytes(), want) {
		t.Errorf("merged to something else, first at byte %d", firstDifference(origin.Bytes(), want))
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	return failed
}

// wantMerged wants the disks as they are to be the merged content.
func wantMerged(t *testing.T, origin *block.Memory, l *liar, want []byte) {
	t.Helper()
	o := snapshot.NewOrigin(block.MemoryFrom(origin.Bytes()))
	m, err := o.LoadMerge(block.MemoryFrom(l.Memory.Bytes()), snapshot.Options{})
	if err != nil {
		t.Errorf("store is not sound: %v", err)
		return
	}
	defer m.Close()
	if err := m.Resume(); err != nil {
		t.Error(err)
		return
	}
	if got := readAll(t, o); !bytes.Equal(got, want) {
		t.Errorf("origin and remaining exceptions differ first at byte %d", firstDifference(got, want))
	}
}
