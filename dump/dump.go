// Package dump writes the metadata of an exception store as text that a person can read and review, and makes a store from
// such a text.
//
//	err := dump.Text(ctx, os.Stdout, cow, dump.Options{})
//	made, err := dump.Restore(ctx, file, func(size int64) (block.Device, error) { return block.Create("new.cow", size) })
//
// Guarantees: for every store, valid or damaged, restoring a dump gives the same bytes of metadata, and dumping that gives
// the same text. Nothing is validated on the way; package check does that. Reading a dump takes bounded memory.
//
//	dmsnap store 1
//	size 65536
//	header magic 0x70416e53 valid 1 version 1 chunk-sectors 8
//	area 0
//	slot 0: 5 -> 2
//	slots 1-3: 20-22 -> 3-5
//	# slot 4 is the end mark
//	slot 9: 7 -> 3
//	end
//
// The first line names the format and its version, the last shows that nothing was cut off. A size is in bytes, slots count
// from 0 in their area, a slot names an origin chunk and the COW chunk that stores it. Everything else is zero, so the end
// mark needs no line, and slots after it are written like any others. A "#" begins a comment, which Restore ignores.
//
//	chunk-sectors 8                the layout to use, where the header does not have it
//	byte 0x10: 0badcafe            bytes at an offset of the device, at most 32, in hexadecimal
//	byte 0x2000 x128: 41414141…    the same bytes, repeated 128 times
//
// "byte" lines hold the rest of the header's chunk, a part of a slot at the end of a device, and with [Options.Data] the
// data chunks that slots name. The order of lines after the header is free; of two lines about the same bytes the later one
// counts.
//
// [Pack] writes the same, compressed, for a bug report. [JSON] is for programs and can't be restored.
package dump

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// Options are the options of a dump. The zero value is usable.
type Options struct {
	// ChunkSectors, where not 0, is used instead of the header's chunk size.
	ChunkSectors uint32
	// Data has the data chunks dumped too.
	Data bool
	// Progress is called with how much of the device was read so far and in total, in bytes.
	Progress func(done, total int64)
}

// ErrUnreadable reports that a dump has gaps, which it lists. Otherwise it is complete.
var ErrUnreadable = errors.New("parts of the metadata could not be read")

// Text writes the metadata of dev to w as text. Errors are w's, ctx's, and ErrUnreadable.
func Text(ctx context.Context, w io.Writer, dev block.Device, o Options) error {
	return walk(ctx, newText(w), dev, o)
}

// JSON writes the metadata of dev to w as one JSON value.
func JSON(ctx context.Context, w io.Writer, dev block.Device, o Options) error {
	return walk(ctx, newJSON(w), dev, o)
}

// A form is an output format. walk calls its methods in this order. Errors are kept until finish.
type form interface {
	size(bytes int64)
	layout(sectors, inHeader uint32) // sectors is 0 where there is none
	header(h ondisk.Header)
	bytes(off int64, b []byte) // ascending within a section
	beginArea(area uint64, off int64)
	slots(r run)
	endMark(slot uint64, void bool) // void: something that is not zero follows
	endArea()
	beginData()
	gap(off, n int64, err error) // could not be read
	finish() error
	failed() error // so far
}

// run is count slots that are consecutive, as are their chunks on both sides.
type run struct {
	slot, count uint64
	old, new    uint64
}

// follows reports whether a slot continues r. Numbers that begin again at 0 do not.
func (r run) follows(slot, old, new uint64) bool {
	return slot == r.slot+r.count && old == r.old+r.count && new == r.new+r.count && old != 0 && new != 0
}

// headerGuess is the assumed size of the header's chunk where the chunk size is unknown.
const headerGuess = 4096

// walk calls f for the content of dev.
func walk(ctx context.Context, f form, dev block.Device, o Options) error {
	w := walker{ctx: ctx, f: f, dev: dev, o: o}
	f.size(dev.Size())
	if err := w.head(); err != nil {
		return err
	}
	if w.l.ChunkSectors != 0 {
		if err := w.areas(); err != nil {
			return err
		}
		if o.Data {
			if err := w.data(); err != nil {
				return err
			}
		}
	}
	if err := f.finish(); err != nil {
		return err
	}
	if w.gaps > 0 {
		return fmt.Errorf("%w: %d bytes", ErrUnreadable, w.gaps)
	}
	return nil
}

type walker struct {
	ctx  context.Context
	f    form
	dev  block.Device
	o    Options
	l    ondisk.Layout // zero: unknown
	gaps int64         // bytes
}

// head writes the header's chunk and determines the layout.
func (w *walker) head() error {
	var b [ondisk.HeaderSize]byte
	var h ondisk.Header
	size := w.dev.Size()
	known := false
	if size >= int64(len(b)) {
		if _, err := w.dev.ReadAt(b[:], 0); err == nil {
			h, known = ondisk.DecodeHeader(b[:]), true
		}
	}
	sectors := h.ChunkSectors
	if w.o.ChunkSectors != 0 {
		sectors = w.o.ChunkSectors
	}
	end := min(size, headerGuess)
	if l, err := ondisk.NewLayout(sectors); err == nil {
		w.l, end = l, min(size, l.ChunkBytes())
	} else if w.o.ChunkSectors != 0 {
		return err
	}
	w.f.layout(w.l.ChunkSectors, h.ChunkSectors)
	from := int64(0)
	if known {
		w.f.header(h)
		from = int64(len(b))
	}
	return w.rest(from, end)
}

// rest writes bytes that are no slots.
func (w *walker) rest(off, end int64) error {
	buf := make([]byte, 64<<10)
	for off < end {
		if err := w.stopped(); err != nil {
			return err
		}
		b := buf[:min(int64(len(buf))-off%int64(len(buf)), end-off)]
		if _, err := w.dev.ReadAt(b, off); err == nil {
			w.f.bytes(off, b)
			off += int64(len(b))
			continue
		}
		// Sector by sector: an unreadable one affects no other.
		for len(b) > 0 {
			s := b[:min(ondisk.SectorSize-off%ondisk.SectorSize, int64(len(b)))]
			if _, err := w.dev.ReadAt(s, off); err != nil {
				w.gap(off, int64(len(s)), err)
			} else {
				w.f.bytes(off, s)
			}
			off += int64(len(s))
			b = b[len(s):]
		}
	}
	return nil
}

func (w *walker) gap(off, n int64, err error) {
	w.gaps += n
	w.f.gap(off, n, err)
}

func (w *walker) stopped() error {
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	return w.f.failed()
}

// areas writes all areas up to the one with the end mark, or up to the end of the device.
func (w *walker) areas() error {
	for area := uint64(0); ; area++ {
		chunk := w.l.AreaChunk(area)
		if uint64(chunk) >= w.l.Chunks(w.dev.Size(), true) {
			return nil
		}
		off := w.l.COWOffset(chunk)
		w.f.beginArea(area, off)
		ended := w.area(area)
		w.f.endArea()
		if err := w.stopped(); err != nil {
			return err
		}
		if w.o.Progress != nil {
			w.o.Progress(min(off+w.l.ChunkBytes(), w.dev.Size()), w.dev.Size())
		}
		if ended {
			return nil
		}
	}
}

// area writes one area and reports whether the end mark is in it.
func (w *walker) area(area uint64) (ended bool) {
	var r run
	end, marked := uint64(0), false
	flush := func() {
		if r.count > 0 {
			w.f.slots(r)
		}
		r = run{}
	}
	for p := range store.RawArea(w.dev, w.l, area) {
		if p.Err != nil {
			flush()
			w.gap(p.Off, p.Missing, p.Err)
			continue
		}
		b := p.Bytes
		for i := p.Index; len(b) >= ondisk.SlotSize; i, b = i+1, b[ondisk.SlotSize:] {
			old, new := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
			if r.count > 0 && r.count < maxRun && r.follows(i, old, new) {
				r.count++
				continue
			}
			flush()
			if ended && !marked && (old != 0 || new != 0) {
				w.f.endMark(end, true)
				marked = true
			}
			if new == 0 && !ended {
				ended, end = true, i
			}
			if old != 0 || new != 0 {
				r = run{i, 1, old, new}
			}
			if new == 0 {
				flush() // the end mark is a run of its own
			}
		}
		if len(b) > 0 { // the device ends within a slot
			flush()
			w.f.bytes(p.Off+int64(len(p.Bytes)-len(b)), b)
		}
	}
	flush()
	if ended && !marked {
		w.f.endMark(end, false)
	}
	return ended
}

// data writes the chunks that slots before the end mark name, in the order of the slots.
func (w *walker) data() error {
	w.f.beginData()
	for e, err := range store.Scan(w.dev, w.l) {
		if err != nil || e.IsEnd() {
			return nil // errors in the areas were reported with the areas
		}
		if !w.l.IsData(e.New) || uint64(e.New) >= w.l.Chunks(w.dev.Size(), false) {
			continue
		}
		off := w.l.COWOffset(e.New)
		if err := w.rest(off, off+w.l.ChunkBytes()); err != nil {
			return err
		}
	}
	return nil
}
