// Package diff reports where two views of a disk differ: a snapshot from its origin, or two snapshots of one origin from
// each other.
//
//	d, err := diff.New(origin, st)
//	for e := range d.Extents() { ... }              // may differ: from the exceptions alone
//	for e, err := range d.Verified(ctx) { ... }     // bytes compared
//
// A chunk without an exception is read from the origin, so two views that both have none there are the same. Where one has
// an exception they may differ:
//
//	origin     ....aaaa....bbbb....cccc....
//	COW 1          AAAA    bbbb                  exceptions: a chunk written, a chunk copied
//	Extents        ^^^^    ^^^^                  from the exceptions alone: what may differ
//	Verified       ^^^^    ====                  bytes were compared: Changed, and Copied
//
// Guarantees: Extents reads no data and contains every difference. It is larger than the difference where a chunk was
// copied because a few of its bytes were written, where the same bytes were written again, or where two snapshots both kept
// the same old chunk. Verified reads the ranges of Extents, and nothing else, and separates them to the sector. Nothing is
// written.
//
// A store maps chunks of its own size (docs/spec/dm-snapshot.md §2.4), so everything here is in bytes of the disk; two
// stores need not have the same chunk size. The last chunk ends where the origin does.
package diff

import (
	"iter"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/store"
)

// A Class is the result for an extent that a store has exceptions for.
type Class uint8

const (
	Changed Class = iota // bytes differ; from exceptions alone: they may
	Copied               // in a store, and the bytes are the same
)

// String returns "changed" or "copied".
func (c Class) String() string {
	if c == Copied {
		return "copied"
	}
	return "changed"
}

// An Extent is a range of the disk, in bytes.
type Extent struct {
	Off, Length int64 // Length > 0
	Class       Class
}

// A Diff is two views of one origin. Its methods only read, and may be called concurrently while nothing
// writes to the stores.
type Diff struct {
	origin      block.Device
	left, right *store.View
}

// New compares the origin with the view of one store.
//
// Errors: a store that is marked invalid (wrapping store.ErrInvalid), since its exceptions are lost; a
// store with exceptions past the end of origin, which can't be of this origin.
func New(origin block.Device, s *store.Store) (*Diff, error) {
	return Between(origin, nil, s)
}

// Between compares the views of two stores of one origin; a nil store stands for the origin itself. Errors are those of
// New.
func Between(origin block.Device, a, b *store.Store) (*Diff, error) {
	left, err := store.NewView(origin, a)
	if err != nil {
		return nil, err
	}
	right, err := store.NewView(origin, b)
	if err != nil {
		return nil, err
	}
	return &Diff{origin, left, right}, nil
}

// Views returns what is compared: the older view and the newer one.
func (d *Diff) Views() (older, newer *store.View) { return d.left, d.right }

// Size returns the size of the disk in bytes.
func (d *Diff) Size() int64 { return d.origin.Size() }

// Extents yields, ascending and joined, what at least one store has exceptions for: all that may differ.
// Nothing is read, and all are Changed.
func (d *Diff) Extents() iter.Seq[Extent] {
	return func(yield func(Extent) bool) {
		var open Extent // the last one, which may still grow
		add := func(e Extent) bool {
			if end := open.Off + open.Length; open.Length > 0 && e.Off <= end {
				open.Length = max(end, e.Off+e.Length) - open.Off
				return true
			}
			done := open
			open = e
			return done.Length == 0 || yield(done)
		}
		for e := range d.either() {
			if !add(e) {
				return
			}
		}
		if open.Length > 0 {
			yield(open)
		}
	}
}

// either yields the exceptions of both views, ascending. Some may overlap.
func (d *Diff) either() iter.Seq[Extent] {
	if d.left.Store() == nil { // much cheaper than pulling one of two
		return exceptions(d.right)
	}
	return func(yield func(Extent) bool) {
		next, stop := iter.Pull(exceptions(d.right))
		defer stop()
		b, more := next()
		for a := range exceptions(d.left) {
			for ; more && b.Off < a.Off; b, more = next() {
				if !yield(b) {
					return
				}
			}
			if !yield(a) {
				return
			}
		}
		for ; more; b, more = next() {
			if !yield(b) {
				return
			}
		}
	}
}

// exceptions yields what the view has in its store, ascending, cut at the end of the disk.
func exceptions(v *store.View) iter.Seq[Extent] {
	return func(yield func(Extent) bool) {
		if v.Store() == nil {
			return
		}
		l := v.Store().Layout()
		for r := range v.Store().Exceptions() {
			off, end := l.OriginRange(r.Old, r.Count, v.Size())
			if !yield(Extent{Off: off, Length: end - off}) {
				return
			}
		}
	}
}
