package snapshot_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
)

// What is guaranteed, sector by sector. Every sector that a lab writes gets unique content, a stamp, so that the
// content of an image identifies the write that it is from.

// A stamp is a sector's content: the number, 64 times. 0 is a sector of zeros.
type stamp uint64

// sectorOf is the content of a stamp.
func sectorOf(x stamp) []byte {
	b := make([]byte, 0, sector)
	for range sector / 8 {
		b = binary.LittleEndian.AppendUint64(b, uint64(x))
	}
	return b
}

// stampOf reads a sector. ok is false for one that is no stamp's: mixed, or foreign.
func stampOf(b []byte) (x stamp, ok bool) {
	return stamp(binary.LittleEndian.Uint64(b)), bytes.Equal(b[8:sector], b[:sector-8])
}

// A version is what one write left in a sector.
type version struct {
	may   []stamp // one of these; more than one where the content is undefined
	op    *change
	acked int // the ledger's clock when the write was acknowledged, 0 before
}

// A cell is one sector of a device: its versions, oldest first. After a crash it holds one of them.
type cell []version

// A change is a write under way, or one that failed: it may have left its versions all the same.
type change struct{ cells []*cell }

// may lists every stamp that the sector may hold.
func (c cell) may() (all []stamp) {
	for _, v := range c {
		all = append(all, v.may...)
	}
	return all
}

// A ledger is what a lab was promised so far. Its lock makes one moment of a power cut and of what is
// promised then.
type ledger struct {
	mu    sync.Mutex
	clock int
	epoch int // counts whatever changes what may be found
}

// begin adds a version to each cell, not acknowledged. mu is held by begin, end and settle themselves.
func (l *ledger) begin(cells []*cell, may func(i int) []stamp) *change {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch++
	op := &change{cells}
	for i, c := range cells {
		*c = append(*c, version{may: may(i), op: op})
	}
	return op
}

// end acknowledges a change.
func (l *ledger) end(op *change) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	for _, c := range op.cells {
		for i := range *c {
			if (*c)[i].op == op {
				(*c)[i].acked = l.clock
			}
		}
	}
}

// unacknowledge says that of what was not made durable anything may be lost, also while the power is on.
func (l *ledger) unacknowledge(cells []*cell) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range cells {
		for i := range *c {
			(*c)[i].acked = 0
		}
	}
}

// now is the moment at which a flush begins.
func (l *ledger) now() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.clock
}

// settle says that a flush which began at a moment has returned: of what was acknowledged by then the
// newest is there, or something newer.
func (l *ledger) settle(cells []*cell, began int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch++
	for _, c := range cells {
		for i := len(*c) - 1; i > 0; i-- {
			if v := (*c)[i]; v.acked != 0 && v.acked <= began {
				*c = (*c)[i:]
				break
			}
		}
	}
}

// cells are the sectors of a device or of a view.
type cells []*cell

// newCells are sectors with a known, durable content.
func newCells(content []stamp) cells {
	cs := make(cells, len(content))
	for i, x := range content {
		cs[i] = &cell{{may: []stamp{x}}}
	}
	return cs
}

// clone returns a copy of the cells.
func (cs cells) clone() cells {
	out := make(cells, len(cs))
	for i, c := range cs {
		d := slices.Clone(*c)
		out[i] = &d
	}
	return out
}

// newest is what reads return: the last acknowledged version, or one that was begun later.
func (c cell) newest() cell {
	for i := len(c) - 1; i > 0; i-- {
		if c[i].acked != 0 {
			return c[i:]
		}
	}
	return c
}

// freeze is what may be found now. ledger.mu is held.
func (cs cells) freeze() [][]stamp {
	out := make([][]stamp, len(cs))
	for i, c := range cs {
		out[i] = c.may()
	}
	return out
}

// judge compares content with what may be found.
func judge(may [][]stamp, content []byte) error {
	for i, want := range may {
		x, ok := stampOf(content[i*sector:])
		if !ok {
			return fmt.Errorf("sector %d is a mixture: % x…", i, content[i*sector:i*sector+16])
		}
		if !slices.Contains(want, x) {
			return fmt.Errorf("sector %d holds write %d, and may hold %d", i, x, want)
		}
	}
	return nil
}
