package ondemand

import (
	"sync/atomic"

	"github.com/dmsnap/dmsnap/layer"
)

// A unitTable remembers of units that are one range of one frame, and were read before, which blob has them: reading from them needs no
// index. It has 4 bytes for each such unit, in pages of 1024 that are made when they are needed.
type unitTable struct {
	pages []atomic.Pointer[[unitPage]atomic.Uint32]
	blobs []*blob
}

const unitPage = 1024

func newUnitTable(size int64, blobs []*blob) *unitTable {
	units := (size + layer.UnitBytes - 1) / layer.UnitBytes
	return &unitTable{make([]atomic.Pointer[[unitPage]atomic.Uint32], (units+unitPage-1)/unitPage), blobs}
}

// get returns the blob of a unit, or nil.
func (t *unitTable) get(unit int64) *blob {
	if p := t.pages[unit/unitPage].Load(); p != nil {
		if n := p[unit%unitPage].Load(); n > 0 {
			return t.blobs[n-1]
		}
	}
	return nil
}

// note remembers that the unit of a run is whole, if it is.
func (t *unitTable) note(run *layer.Run, size int64) {
	from := run.Unit() * layer.UnitBytes
	if run.Place != from || run.Skip != 0 || run.Length != min(layer.UnitBytes, size-from) {
		return
	}
	p := &t.pages[run.Unit()/unitPage]
	page := p.Load()
	if page == nil {
		p.CompareAndSwap(nil, new([unitPage]atomic.Uint32))
		page = p.Load()
	}
	page[run.Unit()%unitPage].Store(uint32(run.Frame.Layer) + 1)
}
