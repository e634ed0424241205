package merge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A Sibling is another snapshot of the origin of a merge. A merge changes what it shows, unless it is named in
// Options.Siblings: then it preserves what the merge overwrites.
type Sibling struct {
	Name         string // for errors
	COW          block.Device
	Size         int64  // bytes of the snapshot; 0: the origin's
	ChunkSectors uint32 // of the store that is made when COW has none; 0: COW must have one
}

// SiblingWork is what a merge has a sibling preserve.
type SiblingWork struct {
	Name    string
	Invalid bool   // it is invalid: there is nothing to preserve
	Chunks  uint64 // that it has to preserve
	Free    uint64 // that its COW device has space for
}

// ErrSiblingFull reports a sibling whose COW device has no space for what it would have to preserve.
var ErrSiblingFull = errors.New("the COW device of another snapshot of the origin has no space for what it has to preserve")

func planSiblings(origin block.Device, m *snapshot.Merging, siblings []Sibling) (all []SiblingWork, err error) {
	for i, s := range siblings {
		same := func(o Sibling) bool { return block.Same(o.COW, s.COW) }
		if block.Same(s.COW, m.Store().Device()) || block.Same(s.COW, origin) || slices.ContainsFunc(siblings[:i], same) {
			return nil, fmt.Errorf("%s: %w", s.Name, snapshot.ErrPairing)
		}
		w, err := s.plan(origin.Size(), m.Store())
		if err != nil {
			return nil, block.WithPath(s.Name, err)
		}
		all = append(all, w)
	}
	return all, nil
}

// plan counts what s has to preserve of an origin of size bytes when from is merged.
func (s Sibling) plan(size int64, from *store.Store) (SiblingWork, error) {
	w := SiblingWork{Name: s.Name}
	if s.Size != 0 {
		size = min(size, s.Size)
	}
	st, err := store.OpenToRead(s.COW)
	var l ondisk.Layout
	switch {
	case errors.Is(err, ondisk.ErrNoStore) && s.ChunkSectors != 0:
		if l, err = ondisk.NewLayout(s.ChunkSectors); err != nil {
			return w, err
		}
		w.Free = l.Room(l.Chunks(s.COW.Size(), false))
	case err != nil:
		return w, err
	case errors.Is(st.Err(), store.ErrInvalid):
		w.Invalid = true
		return w, nil
	default:
		if err := errors.Join(st.Err(), st.CheckOrigin(size)); err != nil {
			return w, err
		}
		l, w.Free = st.Layout(), st.Free()
	}
	next := ondisk.OriginChunk(0) // the first one that is not counted yet
	for r := range from.Exceptions() {
		if uint64(r.Old) >= from.Layout().Chunks(size, true) {
			break // behind the end of the snapshot
		}
		start, end := from.Layout().OriginRange(r.Old, r.Count, size)
		first, last := max(next, l.OriginChunkAt(start)), l.OriginChunkAt(end-1)
		for first <= last {
			n, mapped := uint64(last-first)+1, false
			if st != nil {
				_, n, mapped = st.LookupRun(first, n)
			}
			if !mapped {
				w.Chunks += n
			}
			first += ondisk.OriginChunk(n)
		}
		next = max(next, last+1)
	}
	if w.Chunks > w.Free {
		return w, fmt.Errorf("%w: %d chunks of %d bytes, and there is space for %d", ErrSiblingFull, w.Chunks, l.ChunkBytes(), w.Free)
	}
	return w, nil
}

// attachSiblings makes origin preserve what siblings show, until done is called. When one of them becomes invalid all the
// same, because its COW device failed, stop is called.
func attachSiblings(o *snapshot.Origin, siblings []Sibling, stop context.CancelCauseFunc) (done func() error, err error) {
	var snaps []*snapshot.Snapshot
	done = func() error {
		var errs []error
		for i, s := range snaps {
			errs = append(errs, block.WithPath(siblings[i].Name, s.Close()))
		}
		return errors.Join(errs...)
	}
	for _, s := range siblings {
		snap, err := o.Attach(s.COW, snapshot.Options{OnFull: snapshot.FullFail, ChunkSectors: s.ChunkSectors, Size: s.Size,
			Notify: func(e snapshot.Event) {
				if e.Kind == snapshot.EventInvalid {
					stop(fmt.Errorf("%s: this snapshot of the origin is lost: %s %w", s.Name, e.Text, e.Err))
				}
			}})
		if err != nil {
			return func() error { return nil }, errors.Join(block.WithPath(s.Name, err), done())
		}
		snaps = append(snaps, snap)
	}
	return done, nil
}

// What VisibleSiblings looks at, at most.
const (
	maxVisible = 1000
	maxSlots   = 1 << 12 // of a store
)

// VisibleSiblings returns the paths of regular files in some directories that hold valid stores which fit the origin: a merge
// changes what they show as snapshots of it, if that is what they are. Hidden files are left out, and cow, its undo stores,
// the store whose undo store it is, and the siblings that are known. Nothing is locked; what can't be read is left out.
func VisibleSiblings(origin, cow block.Device, folders []string, known ...Sibling) (paths []string) {
	seen := []block.Device{origin, cow}
	for _, s := range known {
		seen = append(seen, s.COW)
	}
	looked := 0
	for _, folder := range folders {
		entries, _ := os.ReadDir(folder)
		for _, e := range entries {
			if !e.Type().IsRegular() || e.Name()[0] == '.' {
				continue
			}
			if looked++; looked > maxVisible {
				return paths
			}
			path := filepath.Join(folder, e.Name())
			f, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockNone})
			if err != nil {
				continue
			}
			if !slices.ContainsFunc(seen, func(d block.Device) bool { return block.Same(d, f) }) && fits(f, origin.Size()) && !sameMerge(f, cow) {
				paths = append(paths, path)
				seen = append(seen, f) // by its identity, which outlives it
			}
			f.Close()
		}
	}
	return paths
}

// sameMerge reports whether dev and cow are an undo store and the store that it was made for: one has what a merge of the other
// overwrites.
func sameMerge(dev, cow block.Device) bool {
	its, labelled, err := readLabel(dev)
	mine, known, mineErr := readLabel(cow)
	return err == nil && mineErr == nil && labelled && known && its.ID == mine.ID && its.Undo != mine.Undo
}

// fits reports whether dev holds a valid store of an origin of size bytes, as far as its first slots say.
func fits(dev block.Device, size int64) bool {
	h, err := store.ReadHeader(dev)
	if err != nil || h.Magic == 0 || h.Check() != nil || h.Valid == 0 {
		return false
	}
	l := ondisk.Layout{ChunkSectors: h.ChunkSectors}
	chunks := l.Chunks(size, true)
	n := 0
	for e, err := range store.Scan(dev, l) {
		switch n++; {
		case err != nil:
			return false
		case e.IsEnd() || n > maxSlots:
			return true
		case uint64(e.Old) >= chunks:
			return false
		}
	}
	return true
}
