package snapshot_test

import (
	"bytes"
	"sync/atomic"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/snapshot"
)

// extentCounter counts how often a device is asked for its extents.
type extentCounter struct {
	*block.Memory
	asked *atomic.Int64
}

func (d extentCounter) Extents(off, n int64) ([]block.Extent, error) {
	d.asked.Add(1)
	return d.Memory.Extents(off, n)
}

// TestExtentsOfFragmentsAreCheap: every second chunk of the snapshot is written, over an origin of holes and over one
// of data. One call of Extents or Changed asks the devices a few times, whatever range it is given, and calls that
// follow each other still describe everything.
func TestExtentsOfFragmentsAreCheap(t *testing.T) {
	const chunk, count = 4096, 2048
	for _, dense := range []bool{false, true} {
		content := make([]byte, count*chunk)
		if dense {
			content = blocktest.Pattern(count*chunk, 1)
		}
		var asked atomic.Int64
		disk := block.NewMemory(count * chunk)
		if dense {
			disk = block.MemoryFrom(content)
		}
		cow := block.NewMemory(4 * count * chunk)
		o := snapshot.NewOrigin(extentCounter{disk, &asked})
		s, err := o.Attach(extentCounter{cow, &asked}, snapshot.Options{ChunkSectors: 8})
		if err != nil {
			t.Fatal(err)
		}
		for i := int64(0); i < count; i += 2 {
			if _, err := s.WriteAt(bytes.Repeat([]byte{5}, chunk), i*chunk); err != nil {
				t.Fatal(err)
			}
		}
		for off := int64(0); off < s.Size(); {
			before := asked.Load()
			es, err := s.Extents(off, s.Size()-off)
			if err != nil || len(es) == 0 {
				t.Fatalf("at byte %d: %v, %v", off, es, err)
			}
			most := int64(2) // the first extent, and the beginning of the second
			if dense {
				most = 4
			}
			if n := asked.Load() - before; n > most {
				t.Fatalf("at byte %d: the devices were asked %d times in one call", off, n)
			}
			for _, e := range es {
				if hole := e.Flags != 0; hole != (!dense && off/chunk%2 == 1) {
					t.Fatalf("at byte %d: %+v", off, e)
				}
				off += e.Length
			}
		}
		if es, err := s.Changed(0, s.Size()); err != nil || len(es) == 0 || len(es) > 8 || es[0] != (block.Extent{Length: chunk, Flags: snapshot.InCOW}) {
			t.Errorf("changed: %v, %v", es, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		checkStore(t, cow)
	}
}
