package layer

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math"
)

// A Tree is an index whose pages are loaded as they are needed.
type Tree struct {
	index  Index
	size   int64 // of the disk
	layers []Layer
	levels []int64 // pages of each level, leaves first
	starts []int64 // number of the first page of each level
}

// NewTree returns the tree of an index. layers are those of the disk whose data blobs its entries may name: one of a layer's
// own index.
func NewTree(x Index, size int64, layers []Layer) (*Tree, error) {
	if err := x.check(); err != nil {
		return nil, err
	}
	t := &Tree{index: x, size: size, layers: layers}
	var at int64
	t.levels, _ = geometry(x.Entries)
	for _, n := range t.levels {
		t.starts, at = append(t.starts, at), at+n
	}
	return t, nil
}

// A PageID names a page, the digest that it must have, and what it may speak of.
type PageID struct {
	Number int64 // in the blob, in pages
	Digest Digest

	tree    *Tree
	level   int
	low, to int64 // its first entry is at low (-1: anywhere), the last one ends at most at to
}

// A Load returns a page, verified by [PageID.Check]. It may return one that it has kept.
type Load func(id PageID) ([]byte, error)

// Check verifies a page by its digest, and validates it.
func (id PageID) Check(b []byte) error {
	if len(b) != PageBytes || DigestOf(b) != id.Digest {
		return fmt.Errorf("page %d of the index: %w: its digest differs", id.Number, ErrCorrupt)
	}
	if err := id.validate(b); err != nil {
		return fmt.Errorf("page %d of the index: %w", id.Number, err)
	}
	return nil
}

func (id PageID) validate(b []byte) error {
	p, t := page(b), id.tree
	level, within := id.level, id.Number-t.starts[id.level]
	total, most, length := t.index.Entries, int64(leafEntries), leafEntry
	if level > 0 {
		total, most, length = t.levels[level-1], innerEntries, innerEntry
	}
	n := min(most, total-within*most)
	end := pageHeader + int(n)*length
	switch {
	case string(b[:8]) != pageMagic || binary.LittleEndian.Uint32(b[12:]) != Version:
		return corrupt("no page of an index")
	case int(binary.LittleEndian.Uint16(b[8:])) != level || int64(p.count()) != n:
		return corrupt("%d entries on level %d, where %d on level %d must be", p.count(), binary.LittleEndian.Uint16(b[8:]), n, level)
	case !IsZero(b[16:pageHeader]) || !IsZero(b[end:]):
		return corrupt("bytes that must be zero")
	}
	at := int64(0)
	for i := range int(n) {
		place := p.place(i, length)
		if i == 0 && id.low >= 0 && place != id.low || place < at || place >= id.to {
			return corrupt("entry %d at byte %d is out of order", i, place)
		}
		at = place + 1
		if level == 0 {
			e := p.entry(i)
			if err := e.check(id.to, t.layers); err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
			at = e.End()
		}
	}
	return nil
}

// A Run is what stands at a byte of the disk.
type Run struct {
	Entry       // unless Hole
	Hole  bool  // there is no entry
	Until int64 // of a hole: entries may begin here
}

// Leaves is the number of leaves, which are the first pages.
func (t *Tree) Leaves() int64 { return t.levels[0] }

// FirstPages returns the number of the first page of each level, leaves first: all of them lead to the first entry.
func (t *Tree) FirstPages() []int64 { return t.starts }

// Find returns the entry with the byte at off of the disk, or the hole there.
func (t *Tree) Find(off int64, load Load) (Run, error) {
	top := len(t.levels) - 1
	id := PageID{Number: t.starts[top], Digest: t.index.Root, tree: t, level: top, low: -1, to: t.size}
	for {
		b, err := load(id)
		if err != nil {
			return Run{}, err
		}
		p := page(b)
		length := innerEntry
		if id.level == 0 {
			length = leafEntry
		}
		i := p.last(off, length)
		to := id.to
		if i+1 < p.count() {
			to = p.place(i+1, length)
		}
		if i < 0 {
			return Run{Hole: true, Until: to}, nil
		}
		if id.level == 0 {
			if e := p.entry(i); off < e.End() {
				return Run{Entry: e}, nil
			}
			return Run{Hole: true, Until: to}, nil
		}
		below := id.level - 1
		n := t.starts[below] + (id.Number-t.starts[id.level])*innerEntries + int64(i)
		id = PageID{Number: n, Digest: p.child(i), tree: t, level: below, low: p.place(i, innerEntry), to: to}
	}
}

// Entries returns the entries in ascending order. An error ends it.
func (t *Tree) Entries(load Load) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		var leaf page
		for off := int64(0); off < t.size; {
			run, err := t.Find(off, func(id PageID) (b []byte, err error) {
				b, err = load(id)
				leaf = b
				return b, err
			})
			if err != nil {
				yield(Entry{}, err)
				return
			}
			if run.Hole {
				off = run.Until
				continue
			}
			for i := leaf.last(off, leafEntry); i < leaf.count(); i++ { // the rest of the leaf
				e := leaf.entry(i)
				if !yield(e, nil) {
					return
				}
				off = e.End()
			}
		}
	}
}

// An iterator of entries that has one entry of look-ahead.
type cursor struct {
	next func() (Entry, error, bool)
	e    Entry // its place is math.MaxInt64 after the last one
}

func (c *cursor) step() error {
	e, err, ok := c.next()
	if !ok {
		e.Place = math.MaxInt64
	}
	c.e = e
	return err
}

// Merge adds to w the entries of lower, with those of upper over them. upper is the index of one layer, the one with number
// layer.
func Merge(w *IndexWriter, lower, upper iter.Seq2[Entry, error], layer int) error {
	var low, up cursor
	var stopLow, stopUp func()
	low.next, stopLow = iter.Pull2(lower)
	defer stopLow()
	up.next, stopUp = iter.Pull2(upper)
	defer stopUp()
	if err := low.step(); err != nil {
		return err
	}
	if err := up.step(); err != nil {
		return err
	}
	for low.e.Place != math.MaxInt64 || up.e.Place != math.MaxInt64 {
		var c *cursor
		e := low.e
		switch {
		case up.e.Place <= low.e.Place:
			c, e = &up, up.e
			if !e.Zero() {
				e.Frame.Layer = layer
			}
		case low.e.End() <= up.e.Place:
			c = &low
		default: // the part before the upper one
			e.Length = up.e.Place - e.Place
		}
		if err := w.Add(e); err != nil {
			return err
		}
		for low.e.Place < e.End() && low.e.Place != math.MaxInt64 && c != &low { // what e hides of the lower ones
			if low.e.End() > e.End() {
				low.e = low.e.from(e.End())
			} else if err := low.step(); err != nil {
				return err
			}
		}
		if c != nil {
			if err := c.step(); err != nil {
				return err
			}
		}
	}
	return nil
}

// from is the part of the range from byte at on.
func (e Entry) from(at int64) Entry {
	cut := at - e.Place
	e.Place, e.Length = at, e.Length-cut
	if !e.Zero() {
		e.Skip += cut
	}
	return e
}
