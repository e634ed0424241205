package merge

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// ErrNotUndo reports a device that is not the undo store of this merge.
var ErrNotUndo = errors.New("not the undo store of this merge")

// undoPiece is how much of an origin is collected for one write to an undo store, in bytes.
const undoPiece = 4 << 20

// WriteUndo creates on kept, which has at least Work.UndoBytes, the store that reverts the merge of cow into origin: an
// exception with the origin's present content for every chunk that the merge is going to overwrite. It is an ordinary
// store, in chunks of cow's size, so that
//
//   - as a snapshot of the origin it shows what the origin held, before the merge, half-way and after it;
//   - merged into the origin it restores that.
//
// It is written before the merge begins and not along with it: when there is no space for it nothing has been merged,
// and once it is complete a later failure of it does not affect the merge. It is durable when WriteUndo returns. Then
// the caller gives kept its name, and calls [CheckUndo] before [Offline], also to continue an interrupted merge.
//
// The last write is a label in cow that links it with kept; origin is only read. When ctx ends its cause is returned.
// Errors: as Plan; what store.Create says of kept; store.ErrFull.
func WriteUndo(ctx context.Context, origin, cow, kept block.Device, o Options) error {
	m, err := load(origin, cow)
	if err != nil {
		return err
	}
	defer m.Close()
	from := m.Store()
	st, err := store.Create(kept, from.Layout(), true)
	if err != nil {
		return fmt.Errorf("undo store: %w", err)
	}
	if err := fillUndo(ctx, origin, from, st, o.Progress); err != nil {
		return fmt.Errorf("undo store: %w", err)
	}
	t := ondisk.UndoLabel{Exceptions: from.Len(), OriginSize: origin.Size(), Undo: true}
	rand.Read(t.ID[:])
	if err := undo.ChangeFirst(kept, t.Encode); err != nil {
		return fmt.Errorf("undo store: %w", err)
	}
	t.Undo = false
	return undo.ChangeFirst(cow, t.Encode)
}

// fillUndo copies to st what the origin has where from has exceptions, and makes it durable.
func fillUndo(ctx context.Context, origin block.Device, from, st *store.Store, progress func(Progress)) error {
	p := Progress{TotalChunks: from.Len(), ChunkBytes: from.Layout().ChunkBytes()}
	read := func(b []byte, off int64) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		inside := max(0, min(int64(len(b)), origin.Size()-off)) // the last chunk may overlap the end
		clear(b[inside:])
		_, err := origin.ReadAt(b[:inside], off)
		return err
	}
	fill := store.NewFiller(st, undoPiece)
	for r := range from.Exceptions() {
		if progress != nil {
			progress(p)
		}
		if err := fill.Add(r.Old, r.Count, read); err != nil {
			return err
		}
		p.MergedChunks += r.Count
	}
	if err := fill.Flush(); err != nil {
		return err
	}
	if progress != nil {
		progress(p)
	}
	return st.Sync()
}

// CheckUndo returns nil when kept is what WriteUndo wrote for this merge, which may have continued since, or be
// complete; it makes kept durable again, since the program that wrote it may have been killed. Otherwise the error
// wraps ErrNotUndo with the reason, and merging would overwrite data that kept does not have. Other errors: as Plan.
//
// It checks that kept is a valid store, with a label that links it with cow and with an origin of this size; that it
// was not merged itself; and that it has an exception for each chunk that is still to be merged. Writes to the origin
// meanwhile can't be detected: nothing else may use the origin while a merge is incomplete.
func CheckUndo(origin, cow, kept block.Device) error {
	m, err := load(origin, cow)
	if err != nil {
		return err
	}
	defer m.Close()
	st, err := snapshotStore(kept)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotUndo, err)
	}
	if err := checkLabels(origin, m.Store(), st); err != nil {
		return fmt.Errorf("%w: %w", ErrNotUndo, err)
	}
	if err := checkCovers(st, m.Store()); err != nil {
		return fmt.Errorf("%w: %w", ErrNotUndo, err)
	}
	return st.Sync()
}

// snapshotStore opens a persistent store.
func snapshotStore(dev block.Device) (*store.Store, error) {
	st, err := store.Open(dev)
	if err == nil {
		err = st.Err()
	}
	return st, err
}

// checkLabels compares the labels of undo store and merged store.
func checkLabels(origin block.Device, from, st *store.Store) error {
	mine, labelled, err := readLabel(st.Device())
	if err != nil {
		return err
	}
	if !labelled || !mine.Undo { // a copy of the merged store has the label, and the right chunks
		return errors.New("it was not made by a merge to take it back")
	}
	cows, labelled, err := readLabel(from.Device())
	switch {
	case err != nil:
		return err
	case !labelled || cows.ID != mine.ID:
		return errors.New("it was made by another merge")
	}
	if err := checkUndoStore(origin, from, st, mine); err != nil {
		return err
	}
	if cows.Merged && from.Len() > 0 {
		return errors.New("its merge is complete, or went on without it; there may be new writes since")
	}
	return nil
}

// checkUndoStore compares an undo store with its label, and with a merge.
func checkUndoStore(origin block.Device, from, st *store.Store, mine ondisk.UndoLabel) error {
	switch {
	case from.Layout() != st.Layout():
		return fmt.Errorf("its chunks are of %d sectors, those to be merged of %d", st.Layout().ChunkSectors, from.Layout().ChunkSectors)
	case mine.OriginSize != origin.Size():
		return fmt.Errorf("it is of an origin of %d bytes, this one has %d", mine.OriginSize, origin.Size())
	case mine.Merged || st.Len() != mine.Exceptions:
		return fmt.Errorf("it was merged itself, in part or wholly: %d of %d chunks are left", st.Len(), mine.Exceptions)
	}
	return nil
}

// checkCovers wants an exception in undo for each of from.
func checkCovers(undo, from *store.Store) error {
	for r := range from.Exceptions() {
		for old, left := r.Old, r.Count; left > 0; {
			_, n, mapped := undo.LookupRun(old, left)
			if !mapped {
				return fmt.Errorf("it has no chunk %d, which is to be merged: there were writes since it was made", old)
			}
			old, left = old+ondisk.OriginChunk(n), left-n
		}
	}
	return nil
}

// finishLabel records in a merged store that its merge is complete.
func finishLabel(m *snapshot.Merging) error {
	return endUndo(mergedDevice(m.Store().Device()))
}

// EndUndo records in the store of a snapshot, durably, that the snapshot is merged without the undo store that was made for it:
// [CheckUndo] refuses that from then on. It does nothing where none was made. [BeginLive] calls it.
func EndUndo(s *snapshot.Snapshot) error { return endUndo(mergedSnapshot(s)) }

func endUndo(m merged) error {
	t, ok, err := readLabel(m.cow)
	if err != nil || !ok {
		return err
	}
	t.Merged = true // written again even if it is set: it may have been read from the cache only
	return m.change(t.Encode)
}

// readLabel reads the label that a merged store and its undo store share.
func readLabel(dev block.Device) (ondisk.UndoLabel, bool, error) {
	var b [ondisk.SectorSize]byte
	if _, err := dev.ReadAt(b[:], 0); err != nil {
		return ondisk.UndoLabel{}, false, fmt.Errorf("read header: %w", err)
	}
	t, ok := ondisk.DecodeUndoLabel(b[:])
	return t, ok, nil
}
