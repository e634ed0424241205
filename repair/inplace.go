package repair

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A move copies a chunk from the end of a store to a hole.
type move struct{ from, to ondisk.COWChunk }

// inPlace is the repair of a store on its own device.
type inPlace struct {
	p     *Plan
	olds  []ondisk.OriginChunk // by slot, counted through all areas; slot n names DataChunk(n)
	moves []move
}

// arrange gives the n exceptions the first n data chunks. Exceptions that are there already stay; those after them fill
// the holes, so that as little as possible is copied. No kept exception uses these holes, so that nothing is lost when
// copying is interrupted: the slots still name the old chunks.
func (p *Plan) arrange() *inPlace {
	n := uint64(len(p.kept))
	a := &inPlace{p: p, olds: make([]ondisk.OriginChunk, n)}
	taken := make([]bool, n)
	index := func(m ondisk.COWChunk) uint64 { return uint64(m) - 2 - (uint64(m)-1)/(p.l.SlotsPerArea()+1) }
	for _, e := range p.kept {
		if i := index(e.New); i < n {
			taken[i], a.olds[i] = true, e.Old
		}
	}
	hole := uint64(0)
	for _, e := range p.kept {
		if index(e.New) < n {
			continue
		}
		for taken[hole] {
			hole++
		}
		a.olds[hole] = e.Old
		a.moves = append(a.moves, move{e.New, p.l.DataChunk(hole)})
		hole++
	}
	return a
}

// piece is how much of an area is compared and written at once.
const piece = 64 << 10

// slots fills want with what an area must hold from slot i on, at byte off of the device.
func (a *inPlace) slots(want []byte, area, i uint64) {
	clear(want)
	first := area*a.p.l.SlotsPerArea() + i
	for k := range uint64(len(want)) / ondisk.SlotSize {
		slot := first + k
		if slot >= uint64(len(a.olds)) {
			return
		}
		ondisk.Exception{Old: a.olds[slot], New: a.p.l.DataChunk(slot)}.Encode(want[k*ondisk.SlotSize:])
	}
}

// areas calls take with the pieces of the areas, up to the one with the end mark, whose content must change.
func (a *inPlace) areas(take func(off int64, want []byte, area, i uint64) error) error {
	l, n := a.p.l, uint64(len(a.olds))
	want := make([]byte, min(l.ChunkBytes(), piece))
	perPiece := uint64(len(want)) / ondisk.SlotSize
	for area := uint64(0); area <= n/l.SlotsPerArea(); area++ {
		for i := uint64(0); i < l.SlotsPerArea(); i += perPiece {
			a.slots(want, area, i)
			off := l.SlotOffset(ondisk.Slot{Area: area, Index: i})
			same, err := a.holds(off, want)
			if err == nil && !same {
				err = take(off, want, area, i)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// holds reports whether the device has these bytes at off. A device that is too short has not.
func (a *inPlace) holds(off int64, want []byte) (bool, error) {
	if off+int64(len(want)) > a.p.dev.Size() {
		return false, nil
	}
	now := make([]byte, len(want))
	_, err := a.p.dev.ReadAt(now, off)
	return bytes.Equal(now, want), err
}

// header is the sector that the store must begin with, and whether it does not.
func (a *inPlace) header() (want []byte, differs bool, err error) {
	want = make([]byte, ondisk.SectorSize)
	if _, err := a.p.dev.ReadAt(want, 0); err != nil {
		return nil, false, err
	}
	now := bytes.Clone(want)
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: ondisk.Version, ChunkSectors: a.p.l.ChunkSectors}.Encode(want)
	return want, !bytes.Equal(now, want), nil
}

// changes are the ranges that will be written behind the first sector, and that sector: nothing else is written.
// differs is false when there is nothing to do.
func (a *inPlace) changes() (list []undo.Change, first []byte, differs bool, err error) {
	if first, differs, err = a.header(); err != nil {
		return nil, nil, false, err
	}
	err = a.areas(func(off int64, want []byte, area, i uint64) error {
		list = append(list, undo.Change{Off: off, Length: int64(len(want)), After: func(p []byte, at int64) error {
			a.slots(p, area, i+uint64(at-off)/ondisk.SlotSize)
			return nil
		}})
		return nil
	})
	for _, m := range a.moves {
		from, to := a.p.l.COWOffset(m.from), a.p.l.COWOffset(m.to)
		list = append(list, undo.Change{Off: to, Length: a.p.l.ChunkBytes(), After: func(p []byte, at int64) error {
			if _, err := a.p.dev.ReadAt(p, from+at-to); err != nil {
				return fmt.Errorf("repair into a new file instead: %w", err)
			}
			return nil
		}})
	}
	return list, first, differs || len(list) > 0, err
}

// InPlace repairs the store on its own device. Before anything is written it calls save with a function that writes an
// undo file to w; save makes that durable, and an error from it ends InPlace. save is not called when nothing has to
// change.
//
// Order: save; a label in the first sector, durable; chunks into holes; flush; areas; flush; header, durable. A crash
// in between leaves a store that may be neither the old nor the new one: [TakeBack] restores the old one.
//
// Data that can't be read is an error in place, with the metadata unchanged.
func (p *Plan) InPlace(ctx context.Context, save func(write func(w io.Writer) error) error) (changed bool, err error) {
	if err := store.CheckBlockSize(p.l, p.dev); err != nil {
		return false, err
	}
	a := p.arrange()
	list, first, differs, err := a.changes()
	if err != nil {
		return false, fmt.Errorf("repair into a new file instead: %w", err)
	}
	if !differs {
		return false, nil
	}
	if p.Size() > p.dev.Size() && !block.CanGrow(p.dev) {
		return false, fmt.Errorf("the device needs %d bytes and has %d: repair into a new file instead", p.Size(), p.dev.Size())
	}
	u := undo.New(p.dev, list, first, p.Size())
	if err := save(func(w io.Writer) error { return u.Save(ctx, w) }); err != nil {
		return false, err
	}
	if err := u.Mark(); err != nil {
		return true, err
	}
	if err := block.Grow(p.dev, p.Size()); err != nil {
		return false, err
	}
	return true, a.write(ctx)
}

// write makes the changes.
func (a *inPlace) write(ctx context.Context) error {
	p := a.p
	buf := make([]byte, p.l.ChunkBytes())
	for i, m := range a.moves {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := p.dev.ReadAt(buf, p.l.COWOffset(m.from)); err != nil {
			return fmt.Errorf("repair into a new file instead: %w", err)
		}
		if _, err := p.dev.WriteAt(buf, p.l.COWOffset(m.to)); err != nil {
			return err
		}
		if p.o.Progress != nil {
			p.o.Progress(int64(i+1)*p.l.ChunkBytes(), int64(len(a.moves))*p.l.ChunkBytes())
		}
	}
	if err := p.dev.Flush(); err != nil {
		return err
	}
	// ctx is not observed from here on: the rest is short.
	err := a.areas(func(off int64, want []byte, _, _ uint64) error {
		_, err := p.dev.WriteAt(want, off)
		return err
	})
	if err != nil {
		return err
	}
	if err := p.dev.Flush(); err != nil {
		return err
	}
	want, _, err := a.header()
	if err != nil {
		return err
	}
	return block.WriteDurable(p.dev, want, 0)
}

// TakeBack reverts an InPlace, also an interrupted one, and also that of rescue.Revalidation: it writes the content of
// the undo file to dev, durably. size is the size of dev before; the caller truncates dev to it where possible.
//
// Errors: ErrUndoFile and ErrUndoOther, with nothing changed; errors of file and dev, and that of ctx.
func TakeBack(ctx context.Context, file io.ReadSeeker, dev block.Device) (size, bytes int64, err error) {
	s, err := undo.Apply(ctx, file, dev)
	return s.Size, s.Bytes, err
}

var (
	// ErrUndoFile reports a file that is not a complete undo file.
	ErrUndoFile = undo.ErrFormat
	// ErrUndoOther reports an undo file of another store, or of a store that was written to since.
	ErrUndoOther = undo.ErrOtherDevice
)
