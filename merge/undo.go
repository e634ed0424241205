package merge

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// ErrNotUndo reports a device that does not keep what a merge is going to overwrite.
var ErrNotUndo = errors.New("not the undo store of this merge")

// undoPiece is how much of an origin is gathered for one write to an undo store, in bytes.
const undoPiece = 4 << 20

// WriteUndo makes of undo, which has at least Work.UndoBytes, the store that takes the merge of cow into
// origin back: an exception with the origin's content of now for every chunk that the merge is going to
// overwrite. It is an ordinary store, in chunks of cow's size, so that
//
//   - as a snapshot of the origin it shows what the origin held, before the merge, half-way and after it;
//   - merged into the origin it puts that back.
//
// It is written before the merge begins and not along with it: when there is no room for it nothing has
// been merged, and once it is whole nothing that befalls it can hold up the merge, or the merge it. It is
// durable when WriteUndo returns. Whoever gives undo a name does so then, and calls [CheckUndo] before
// [Offline], also when an interrupted merge is to go on.
//
// The last thing that is written is a mark in cow that says whose store undo is; origin is only read. When
// ctx ends its cause is returned. Errors: as Plan; what store.Create says of undo; store.ErrFull.
func WriteUndo(ctx context.Context, origin, cow, undo block.Device, o Options) error {
	m, err := load(origin, cow)
	if err != nil {
		return err
	}
	defer m.Close()
	from := m.Store()
	st, err := store.Create(undo, from.Layout(), true)
	if err != nil {
		return fmt.Errorf("undo store: %w", err)
	}
	if err := fillUndo(ctx, origin, from, st, o.Progress); err != nil {
		return fmt.Errorf("undo store: %w", err)
	}
	t := tie{exceptions: from.Len(), originSize: origin.Size()}
	rand.Read(t.id[:])
	t.undo = true
	if err := t.write(undo); err != nil {
		return fmt.Errorf("undo store: %w", err)
	}
	t.undo = false
	return t.write(cow)
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
	for r := range from.Exceptions().All() {
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

// CheckUndo returns nil when undo is what WriteUndo wrote for this merge, which may have gone on since, or
// be complete; it makes undo durable again, for whoever wrote it may have been killed. Otherwise the error
// wraps ErrNotUndo and says why, and merging would overwrite what undo does not keep. Other errors: as Plan.
//
// What is asked: that undo is a sound store, tied to cow and to an origin of this size; that nothing of it
// was taken back; that it has an exception for each chunk that is still to be merged. Who wrote to the
// origin meanwhile can't be known: while a merge is half done the origin is nobody's.
func CheckUndo(origin, cow, undo block.Device) error {
	m, err := load(origin, cow)
	if err != nil {
		return err
	}
	defer m.Close()
	st, err := snapshotStore(undo)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotUndo, err)
	}
	if err := checkTies(origin, m.Store(), st); err != nil {
		return fmt.Errorf("%w: %w", ErrNotUndo, err)
	}
	if err := checkCovers(st, m.Store()); err != nil {
		return fmt.Errorf("%w: %w", ErrNotUndo, err)
	}
	return st.Sync()
}

// snapshotStore opens a store that is to be relied on.
func snapshotStore(dev block.Device) (*store.Store, error) {
	st, err := store.Open(dev)
	if err == nil {
		err = st.Err()
	}
	return st, err
}

// checkTies holds against each other what undo store and merged store say of themselves.
func checkTies(origin block.Device, from, st *store.Store) error {
	mine, tied, err := readTie(st.Device())
	if err != nil {
		return err
	}
	if !tied || !mine.undo { // a copy of the merged store has the tie, and the right chunks
		return errors.New("it was not made by a merge to take it back")
	}
	cows, tied, err := readTie(from.Device())
	switch {
	case err != nil:
		return err
	case !tied || cows.id != mine.id:
		return errors.New("it was made by another merge")
	case from.Layout() != st.Layout():
		return fmt.Errorf("its chunks are of %d sectors, those to be merged of %d", st.Layout().ChunkSectors, from.Layout().ChunkSectors)
	case mine.originSize != origin.Size():
		return fmt.Errorf("it is of an origin of %d bytes, this one has %d", mine.originSize, origin.Size())
	case mine.done || st.Len() != mine.exceptions:
		return fmt.Errorf("it was merged itself, in part or wholly: %d of %d chunks are left", st.Len(), mine.exceptions)
	case cows.done && from.Len() > 0:
		return errors.New("its merge is complete; there were new writes since")
	}
	return nil
}

// checkCovers wants an exception in undo for each of from.
func checkCovers(undo, from *store.Store) error {
	for r := range from.Exceptions().All() {
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

// finishTie notes in a merged store that its merge is complete: what is written to it from now on is no
// longer what an undo store was made for.
func finishTie(m *snapshot.Merging) error {
	dev := m.Store().Device()
	t, tied, err := readTie(dev)
	if err != nil || !tied || t.done {
		return err
	}
	t.done = true
	return t.write(dev)
}

// A tie is the mark that a merged store and its undo store share. It stands in the first sector of both,
// behind the header, where the format has no meaning for it and the kernel does not look (specification
// 2.2): the sector is replaced whole or not at all, and never while exceptions are written.
//
//	256     magic, 16 bytes
//	272     id, 16 bytes, random
//	288     exceptions that there were to merge, 8 bytes
//	296     size of the origin in bytes, 8
//	304     1: the store was merged to its end; 2: it is the undo store; 8
//	312     CRC-32C of the 56 bytes before it, 4
type tie struct {
	id         [16]byte
	exceptions uint64
	originSize int64
	done       bool
	undo       bool
}

const (
	tieMagic = "dmsnap undo id 1"
	tieAt    = 256
	tieBytes = 60

	tieDone = 1
	tieUndo = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (t tie) encode(b []byte) {
	copy(b, tieMagic)
	copy(b[16:], t.id[:])
	binary.LittleEndian.PutUint64(b[32:], t.exceptions)
	binary.LittleEndian.PutUint64(b[40:], uint64(t.originSize))
	flags := uint64(0)
	if t.done {
		flags |= tieDone
	}
	if t.undo {
		flags |= tieUndo
	}
	binary.LittleEndian.PutUint64(b[48:], flags)
	binary.LittleEndian.PutUint32(b[56:], crc32.Checksum(b[:56], castagnoli))
}

// decodeTie reads a tie; ok is false where there is none.
func decodeTie(b []byte) (t tie, ok bool) {
	if string(b[:16]) != tieMagic || binary.LittleEndian.Uint32(b[56:]) != crc32.Checksum(b[:56], castagnoli) {
		return t, false
	}
	copy(t.id[:], b[16:])
	t.exceptions = binary.LittleEndian.Uint64(b[32:])
	t.originSize = int64(binary.LittleEndian.Uint64(b[40:]))
	flags := binary.LittleEndian.Uint64(b[48:])
	t.done, t.undo = flags&tieDone != 0, flags&tieUndo != 0
	return t, true
}

func readTie(dev block.Device) (tie, bool, error) {
	var b [ondisk.SectorSize]byte
	if _, err := dev.ReadAt(b[:], 0); err != nil {
		return tie{}, false, fmt.Errorf("read header: %w", err)
	}
	t, ok := decodeTie(b[tieAt : tieAt+tieBytes])
	return t, ok, nil
}

// write puts t into the first sector of a store, durably.
func (t tie) write(dev block.Device) error {
	b := make([]byte, block.BlockSize(dev))
	if _, err := dev.ReadAt(b, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	t.encode(b[tieAt : tieAt+tieBytes])
	if err := block.WriteDurable(dev, b, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return nil
}
