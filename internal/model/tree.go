package model

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

// Block is the size in bytes of what a Tree numbers.
const Block = 4096

// A Tree is the reference for disks, checkpoints and nodes that are forked from one another: each has a copy of the whole disk.
// Layers decide nothing. A disk is a list of blocks with numbers, one for each write, so that what a crash may leave is known:
// the last number that was flushed, and all later ones.
type Tree struct {
	elements map[string]*numbered
	last     uint64 // number
}

// numbered has the numbers of blocks.
type numbered struct {
	now []uint64
	may [][]uint64 // what each may have instead after a crash; nil: nothing
}

// NewTree returns a tree of one disk with zeros.
func NewTree(disk string, blocks int) *Tree {
	t := &Tree{elements: map[string]*numbered{}}
	t.Add(disk, blocks)
	return t
}

// Add makes another disk with zeros.
func (t *Tree) Add(disk string, blocks int) {
	t.elements[disk] = &numbered{make([]uint64, blocks), make([][]uint64, blocks)}
}

// Blocks is the size of an element in blocks.
func (t *Tree) Blocks(name string) int { return len(t.elements[name].now) }

// Names returns the names of all elements, sorted.
func (t *Tree) Names() []string { return slices.Sorted(maps.Keys(t.elements)) }

// Has reports whether the tree has an element.
func (t *Tree) Has(name string) bool { return t.elements[name] != nil }

// Copy makes an element that shows what another does: a fork, or a checkpoint. A rollback makes one with the name of an element
// that there is, and a merge one with that of the disk.
func (t *Tree) Copy(from, name string) {
	e := t.elements[from]
	t.elements[name] = &numbered{slices.Clone(e.now), slices.Clone(e.may)}
}

// Extend gives an element a larger size: what is new of it reads as zeros.
func (t *Tree) Extend(name string, blocks int) {
	e := t.elements[name]
	more := blocks - len(e.now)
	e.now = append(e.now, make([]uint64, more)...)
	e.may = append(e.may, make([][]uint64, more)...)
}

// Drop removes an element, if there is one.
func (t *Tree) Drop(name string) { delete(t.elements, name) }

// Write gives a block of an element the next number, and returns its content.
func (t *Tree) Write(name string, block int) []byte {
	t.last++
	t.set(name, block, t.last)
	return Stamp(t.last)
}

// Zero makes a block read as zeros.
func (t *Tree) Zero(name string, block int) { t.set(name, block, 0) }

// Trim takes over what an element shows of a block after it was trimmed: zeros, or what it had.
func (t *Tree) Trim(name string, block int, got []byte) error {
	n := binary.LittleEndian.Uint64(got)
	if was := t.elements[name].now[block]; n != 0 && n != was || !slices.Equal(got, Stamp(n)) {
		return fmt.Errorf("%s: block %d has %d after it was trimmed, want zeros or %d", name, block, n, was)
	}
	t.set(name, block, n)
	return nil
}

func (t *Tree) set(name string, block int, n uint64) {
	e := t.elements[name]
	if e.may[block] == nil {
		e.may[block] = []uint64{e.now[block]}
	}
	e.now[block] = n
	e.may[block] = append(slices.Clip(e.may[block]), n)
}

// Flush makes what an element shows survive a crash.
func (t *Tree) Flush(name string) { clear(t.elements[name].may) }

// Shows returns an error unless got is what an element shows.
func (t *Tree) Shows(name string, got []byte) error { return t.compare(name, got, false) }

// Allows returns an error unless got is what an element may show after a crash.
func (t *Tree) Allows(name string, got []byte) error { return t.compare(name, got, true) }

func (t *Tree) compare(name string, got []byte, crashed bool) error {
	e := t.elements[name]
	if e == nil || len(got) != len(e.now)*Block {
		return fmt.Errorf("%s: %d bytes, which are not those of an element", name, len(got))
	}
	for b := range e.now {
		p := got[b*Block : (b+1)*Block]
		n := binary.LittleEndian.Uint64(p)
		if whole := slices.Equal(p, Stamp(n)); !whole || n != e.now[b] && !(crashed && slices.Contains(e.may[b], n)) {
			return fmt.Errorf("%s: block %d has %d (whole: %v), want %d, after a crash also %v", name, b, n, whole, e.now[b], e.may[b])
		}
	}
	return nil
}

// Stamp is the content of a block with a number.
func Stamp(n uint64) []byte {
	p := make([]byte, Block)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n)
	}
	return p
}
