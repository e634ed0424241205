package store

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Create makes a new, empty store on dev and returns it (docs/spec/dm-snapshot.md §2.7). It reads the magic first and
// returns ErrExists when it is not zero, unless force is set.
//
// The bytes are the kernel's; the order is safer than the kernel's (docs/spec/dm-snapshot.md §8.2, H6): zeros in area 0
// and after the header, flush, then the header, durably. Until that last write dev holds no store, or the rest of the
// previous one: that can be opened, and its data may be lost.
func Create(dev block.Device, l ondisk.Layout, force bool) (*Store, error) {
	return CreateFor(dev, l, force, ondisk.RawFormat)
}

// CreateFor is Create for an origin of a format: with another one than ondisk.RawFormat the first sector has an
// ondisk.OriginLabel.
func CreateFor(dev block.Device, l ondisk.Layout, force bool, format string) (*Store, error) {
	return create(dev, l, force, format, (*Store).writeEmpty)
}

// CreateUnsynced is CreateFor on a device that reads as zeros from its first byte to its last, as a new file does, without
// a flush: the store is durable with its first Sync, or any other flush of dev.
//
// The race considered: a crash before that flush is complete. Only the header is written, in one sector; the area and the
// rest are the zeros of the device. So the device has the empty store then, or still nothing: an Open returns
// ondisk.ErrNoStore, and the store can be made again. No slot is written before a flush that makes the header durable,
// since a Sync flushes data, and the header with it, before it writes slots (see Store.round).
func CreateUnsynced(dev block.Device, l ondisk.Layout, format string) (*Store, error) {
	return create(dev, l, false, format, func(s *Store) error {
		_, err := s.dev.WriteAt(s.firstBlock(s.header), 0)
		return err
	})
}

// create makes a store by write, which writes its first bytes.
func create(dev block.Device, l ondisk.Layout, force bool, format string, write func(*Store) error) (*Store, error) {
	if size := dev.Size(); l.Chunks(size, false) < uint64(ondisk.FirstDataChunk) {
		return nil, fmt.Errorf("COW device of %d bytes is too small for a store: header and first area need %d", size, 2*l.ChunkBytes())
	}
	if err := CheckBlockSize(l, dev); err != nil {
		return nil, err
	}
	if !force {
		switch h, err := ReadHeader(dev); {
		case err != nil:
			return nil, err
		case h.Magic != 0:
			return nil, ErrExists
		}
	}
	s := newStore(dev, l)
	s.format = format
	s.header = ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: ondisk.Version, ChunkSectors: l.ChunkSectors}
	if err := write(s); err != nil {
		return nil, fmt.Errorf("create store: %w", err)
	}
	s.next = ondisk.FirstDataChunk
	s.written, s.flushed = s.next, s.next
	s.durableBelow.Store(uint64(s.next))
	s.tail = make([]byte, metaBlock(l))
	return s, nil
}

// writeEmpty is Create's order of writes.
func (s *Store) writeEmpty() error {
	c, b := s.layout.ChunkBytes(), metaBlock(s.layout)
	if err := block.Zero(s.dev, c, c, 0); err != nil { // area 0
		return err
	}
	if err := block.Zero(s.dev, b, c-b, 0); err != nil { // the header chunk's rest
		return err
	}
	if err := s.dev.Flush(); err != nil {
		return err
	}
	return block.WriteDurable(s.dev, s.firstBlock(s.header), 0)
}

// firstBlock is the first block of chunk 0 with header h. Of the labels it has the origin's and that of a sealed layer.
func (s *Store) firstBlock(h ondisk.Header) []byte {
	b := make([]byte, metaBlock(s.layout))
	h.Encode(b)
	ondisk.OriginLabel{Format: s.format}.Encode(b)
	if s.Sealed() {
		ondisk.SealedLabel{}.Encode(b)
	}
	return b
}

// OriginFormat returns the format of the origin that the store is for: ondisk.RawFormat unless its label says otherwise.
func (s *Store) OriginFormat() string { return cmp.Or(s.format, ondisk.RawFormat) }

// OriginFormat returns what the label of the store on dev says; see Store.OriginFormat. The rest of the header is not checked. A
// damaged label is a *ondisk.CorruptError.
func OriginFormat(dev block.Device) (string, error) {
	_, sector, err := readFirst(dev)
	if err != nil {
		return "", err
	}
	label, err := ondisk.DecodeOriginLabel(sector)
	return label.Format, err
}

// CheckUnsealed returns ondisk.ErrSealed when dev holds a sealed layer (Store.Seal). What can't be read is none.
func CheckUnsealed(dev block.Device) error {
	_, sector, err := readFirst(dev)
	if err != nil {
		return nil
	}
	return ondisk.CheckUnsealed(sector)
}

// ReadHeader reads the header of dev without validating it. A device shorter than a header is a *ondisk.CorruptError.
//
// A header of a valid store is read past the cache of the operating system, which may show data that a failed flush
// lost. The mark of an invalid store counts even if only the cache has it: the program that wrote it continued as if it
// were on the disk.
func ReadHeader(dev block.Device) (ondisk.Header, error) {
	h, _, err := readFirst(dev)
	return h, err
}

// readFirst is ReadHeader; it also returns the sector.
func readFirst(dev block.Device) (h ondisk.Header, sector []byte, err error) {
	if dev.Size() < ondisk.SectorSize {
		return h, nil, &ondisk.CorruptError{Place: "header, byte 0x0",
			What: fmt.Sprintf("device of %d bytes ends before the end of the header's sector", dev.Size())}
	}
	sector = make([]byte, ondisk.SectorSize)
	if h, err = readHeader(dev, sector); err != nil || h.Valid == 0 {
		return h, sector, err
	}
	if err := block.DropCache(dev, 0, ondisk.SectorSize); err != nil {
		return ondisk.Header{}, nil, fmt.Errorf("read header: %w", err)
	}
	h, err = readHeader(dev, sector)
	return h, sector, err
}

// readHeader reads the sector of the header as it is cached.
func readHeader(dev block.Device, sector []byte) (ondisk.Header, error) {
	if _, err := dev.ReadAt(sector, 0); err != nil {
		return ondisk.Header{}, fmt.Errorf("read header: %w", err)
	}
	return ondisk.DecodeHeader(sector), nil
}

// CheckBlockSize refuses a chunk that is no multiple of a device's logical block (docs/spec/dm-snapshot.md §2.3).
func CheckBlockSize(l ondisk.Layout, devs ...block.Device) error {
	for _, d := range devs {
		if b := int64(block.BlockSize(d)); l.ChunkBytes()%b != 0 {
			return fmt.Errorf("%w: chunk of %d bytes, block of %d", ondisk.ErrChunkNotBlocks, l.ChunkBytes(), b)
		}
	}
	return nil
}

// CheckOrigin returns an error that wraps ErrOriginTooSmall, and names the missing size, when an origin of size bytes
// ends before an exception begins: it is another disk, or it was truncated, and the store does not belong to it.
func (s *Store) CheckOrigin(size int64) error {
	last, ok := s.exceptions.Max()
	chunks := s.layout.Chunks(size, true)
	if !ok || uint64(last) < chunks {
		return nil
	}
	behind := uint64(0)
	for r := range s.exceptions.All() {
		if end := uint64(r.Old) + r.Count; end > chunks {
			behind += min(r.Count, end-chunks)
		}
	}
	return fmt.Errorf("%w: it has %d bytes, and of the exceptions %d (%d bytes) are behind its end, the last one for origin chunk %d of %d bytes",
		ErrOriginTooSmall, size, behind, behind*uint64(s.layout.ChunkBytes()), last, s.layout.ChunkBytes())
}

// Open loads the store on dev (docs/spec/dm-snapshot.md §2.6). It writes nothing.
//
// What it reads need not be durable: a process that was killed in a Sync left slots in the cache of the operating
// system. So no exception counts as durable (see Durable) until the first Sync. Slots whose flush failed are in that
// cache too, and no later flush writes them, so the areas are read past the cache (see Scan).
//
// Errors: ondisk.ErrNoStore where the magic is zero; a *ondisk.CorruptError with its place for an invalid store: a bad
// header, an area past the end of the device, an exception whose COW chunk lies outside the device, in the header or in
// an area, an origin or a COW chunk used twice (stricter than the kernel, H9). Slots after the end mark are void
// (docs/spec/dm-snapshot.md §8.2, H4, H8).
//
// A store that is marked invalid opens, empty, with Err wrapping ErrInvalid: its areas are not read.
func Open(dev block.Device) (*Store, error) { return open(dev, false) }

// OpenToRead is Open for callers that write nothing to the store: its chunks may be smaller than the blocks of dev, on
// which neither dmsnap nor the kernel could write to them.
func OpenToRead(dev block.Device) (*Store, error) { return open(dev, true) }

func open(dev block.Device, toRead bool) (*Store, error) {
	h, sector, err := readFirst(dev)
	if err != nil {
		return nil, err
	}
	if err := h.Check(); err != nil {
		return nil, err
	}
	label, err := ondisk.DecodeOriginLabel(sector)
	if err != nil {
		return nil, err
	}
	s := newStore(dev, ondisk.Layout{ChunkSectors: h.ChunkSectors})
	s.header, s.format, s.sealed = h, label.Format, ondisk.CheckUnsealed(sector) != nil
	if err := CheckBlockSize(s.layout, dev); err != nil && !toRead {
		return nil, &ondisk.CorruptError{Place: "header, byte 0xc", What: fmt.Sprintf("invalid chunk size %d: %v", h.ChunkSectors, err)}
	}
	s.next = ondisk.FirstDataChunk
	if h.Valid == 0 {
		s.err = fmt.Errorf("%w: its header says so", ErrInvalid)
		return s, nil
	}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

// loadAtOnce is the number of exceptions inserted into the map at once: 16 MiB of them.
const loadAtOnce = 1 << 20

// load reads the slots into memory and finds the end. While exceptions are inserted, the next ones are read.
func (s *Store) load() error {
	s.tail = make([]byte, metaBlock(s.layout))
	r := loader{s: s, full: make(chan []ondisk.Exception), empty: make(chan []ondisk.Exception, 2), failed: make(chan struct{})}
	var inserting sync.WaitGroup
	var insertErr error
	inserting.Go(func() { insertErr = r.insert() })
	readErr := r.read()
	close(r.full)
	inserting.Wait()
	// What was inserted was read before the reading failed.
	if err := cmp.Or(insertErr, readErr); err != nil {
		return err
	}
	if !r.ascending {
		if err := s.checkShared(); err != nil {
			return err
		}
	}
	s.next = s.layout.NextData(s.next)
	s.pos = position{r.end.Area, r.end.Index}
	s.reserved, s.durable = s.pos, s.pos
	s.written, s.flushed = s.next, s.next // data is flushed before its slot is written
	s.scrub = true
	if _, i := s.tailOffset(); i == 0 {
		clear(s.tail) // the block before is full
	}
	return nil
}

// A loader reads the slots of a store in one goroutine and inserts them into its map in another.
type loader struct {
	s           *Store
	full, empty chan []ondisk.Exception // batches on their way to the map, and back
	failed      chan struct{}           // closed when inserting has failed

	end       ondisk.Slot // of the end mark
	ascending bool        // no exception's COW chunk is below an earlier one's
}

// read reads up to the end mark, and checks each exception on its own.
func (r *loader) read() error {
	s, l := r.s, r.s.layout
	chunks := l.Chunks(s.dev.Size(), false)
	r.ascending = true
	batch := r.newBatch(nil)
	for p, err := range scanPieces(s.dev, l) {
		if err != nil {
			return err
		}
		for at := 0; at < len(p.bytes); at += ondisk.SlotSize {
			e := ondisk.DecodeException(p.bytes[at:])
			slot := ondisk.Slot{Area: p.first.Area, Index: p.first.Index + uint64(at/ondisk.SlotSize)}
			if e.IsEnd() {
				r.end = slot
				s.keepTail(p.bytes[:at])
				return r.send(batch)
			}
			if uint64(e.New) >= chunks || !l.IsData(e.New) {
				return checkNew(l, Entry{slot, e}, chunks)
			}
			if e.New < s.next {
				r.ascending = false
			}
			s.next = max(s.next, e.New+1)
			if batch = append(batch, e); len(batch) == loadAtOnce {
				if err := r.send(batch); err != nil {
					return err
				}
				batch = r.newBatch(batch)
			}
		}
	}
	panic("store: the slots end without an end mark or an error")
}

// newBatch returns memory for a batch, at most the second that there is.
func (r *loader) newBatch(sent []ondisk.Exception) []ondisk.Exception {
	select {
	case b := <-r.empty:
		return b[:0]
	default:
		return make([]ondisk.Exception, 0, cap(sent))
	}
}

// send hands a batch over to be inserted. It returns no error when that fails: insert has it.
func (r *loader) send(batch []ondisk.Exception) error {
	select {
	case r.full <- batch:
		return nil
	case <-r.failed:
		return errStopped
	}
}

// errStopped ends the reading after an error of the inserting.
var errStopped = errors.New("loading was stopped")

// insert inserts batches in the order of their slots.
func (r *loader) insert() error {
	for batch := range r.full {
		if err := r.s.insertLoaded(batch); err != nil {
			close(r.failed)
			return err
		}
		r.empty <- batch
	}
	return nil
}

// keepTail keeps the last slots before the end mark, from which their block is written later, so that it does not depend on
// another read. slots end where the end mark begins.
func (s *Store) keepTail(slots []byte) {
	n := len(slots) % len(s.tail) // pieces begin at multiples of a block
	copy(s.tail, slots[len(slots)-n:])
}

// insertLoaded puts the next exceptions of the store, in the order of their slots, into memory.
func (s *Store) insertLoaded(batch []ondisk.Exception) error {
	before := s.exceptions.Len()
	i := s.exceptions.InsertAll(batch)
	if i == len(batch) {
		return nil
	}
	p := s.advance(position{}, before+uint64(i)) // slots are used without a gap
	first, _ := s.exceptions.Get(batch[i].Old)
	return &ondisk.CorruptError{Place: s.layout.Place(ondisk.Slot{Area: p.area, Index: p.index}),
		What: fmt.Sprintf("origin chunk %d has two exceptions, in COW chunks %d and %d", batch[i].Old, first, batch[i].New)}
}

// checkNew refuses an exception whose COW chunk can't hold data.
func checkNew(l ondisk.Layout, e Entry, chunks uint64) error {
	switch {
	case uint64(e.New) >= chunks:
		return &ondisk.CorruptError{Place: l.Place(e.Slot),
			What: fmt.Sprintf("COW chunk %d is past the end of the device of %d chunks", e.New, chunks)}
	case !l.IsData(e.New):
		return &ondisk.CorruptError{Place: l.Place(e.Slot),
			What: fmt.Sprintf("COW chunk %d holds metadata, not data", e.New)}
	}
	return nil
}

// checkShared finds a COW chunk that two exceptions name. Stores written in allocation order can't have one, so the
// search is only made in others.
func (s *Store) checkShared() error {
	news := make([]ondisk.COWChunk, 0, s.exceptions.Len())
	for r := range s.exceptions.All() {
		for i := range r.Count {
			news = append(news, r.New+ondisk.COWChunk(i))
		}
	}
	slices.Sort(news)
	for i := 1; i < len(news); i++ {
		if news[i] == news[i-1] {
			return &ondisk.CorruptError{Place: fmt.Sprintf("COW chunk %d, byte 0x%x", news[i], s.layout.COWOffset(news[i])),
				What: "two exceptions name it"}
		}
	}
	return nil
}

// tailOffset returns where on dev the block of slot s.durable begins, and the slot's byte in it.
func (s *Store) tailOffset() (off int64, i int64) {
	slot := s.layout.SlotOffset(ondisk.Slot{Area: s.durable.area, Index: s.durable.index})
	i = slot % metaBlock(s.layout) // chunks, and so areas, begin at multiples of a block
	return slot - i, i
}

// An Entry is one slot as Scan finds it.
type Entry struct {
	Slot ondisk.Slot
	ondisk.Exception
}

// scanPiece is how much of an area is read at once, in bytes.
const scanPiece = 256 << 10

// A piece is some consecutive slots of an area as they are on the disk.
type piece struct {
	first ondisk.Slot
	bytes []byte
}

// Scan yields the slots of dev in order, up to and including the end mark (the one entry for which IsEnd is true, and
// always the last). It validates nothing but the position of areas: an area that is not wholly inside dev is a
// *ondisk.CorruptError, and a failed read an error; either is the last thing yielded. Opening, checking and dumping all
// read areas by it. It uses at most 256 KiB of memory whatever the bytes are, and ends at the end of dev at the latest.
//
// Clean pages of an area that the operating system has cached are dropped before it is read: after a failed flush they
// show slots, or cleared slots, that are not on the disk.
func Scan(dev block.Device, l ondisk.Layout) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for p, err := range scanPieces(dev, l) {
			if err != nil {
				yield(Entry{}, err)
				return
			}
			for slot, b := p.first, p.bytes; len(b) > 0; slot.Index, b = slot.Index+1, b[ondisk.SlotSize:] {
				e := Entry{slot, ondisk.DecodeException(b)}
				if !yield(e, nil) || e.IsEnd() {
					return
				}
			}
		}
	}
}

// scanPieces yields the slots of dev as Scan does, piece by piece. It does not look for the end mark: the caller stops there.
// The bytes are valid until the next piece.
func scanPieces(dev block.Device, l ondisk.Layout) iter.Seq2[piece, error] {
	return func(yield func(piece, error) bool) {
		chunks := l.Chunks(dev.Size(), false)
		buf := make([]byte, min(l.ChunkBytes(), scanPiece))
		ahead := readAhead{dev: dev, layout: l, end: (chunks + l.SlotsPerArea() - 1) / (l.SlotsPerArea() + 1)}
		for area := uint64(0); ; area++ {
			if uint64(l.AreaChunk(area)) >= chunks {
				yield(piece{}, &ondisk.CorruptError{Place: fmt.Sprintf("area %d, byte 0x%x", area, l.COWOffset(l.AreaChunk(area))),
					What: fmt.Sprintf("no end mark so far, and the device of %d sectors ends before the area does: it is cut short", dev.Size()/ondisk.SectorSize)})
				return
			}
			err := ahead.prepare(area)
			more := false
			if err == nil {
				more, err = scanArea(dev, l, area, buf, yield)
			}
			if err != nil {
				yield(piece{}, fmt.Errorf("read area %d: %w", area, err))
			}
			if !more {
				return
			}
		}
	}
}

// scanArea yields the slots of one area. more is false after an error, or when yield returned false.
func scanArea(dev block.Device, l ondisk.Layout, area uint64, buf []byte, yield func(piece, error) bool) (more bool, err error) {
	for i := uint64(0); i < l.SlotsPerArea(); i += uint64(len(buf) / ondisk.SlotSize) {
		first := ondisk.Slot{Area: area, Index: i}
		if _, err := dev.ReadAt(buf, l.SlotOffset(first)); err != nil {
			return false, err
		}
		if !yield(piece{first, buf}, nil) {
			return false, nil
		}
	}
	return true, nil
}

// aheadAreas and aheadBytes bound the areas that are read at once into the cache of the operating system.
const (
	aheadAreas = 64
	aheadBytes = 4 << 20
)

// A readAhead prepares areas to be read in order: what is cached of them is dropped, and the disk begins to read them, side by
// side, as they lie far apart. It goes ahead by twice as many areas each time, so that small stores cost little.
type readAhead struct {
	dev    block.Device
	layout ondisk.Layout
	end    uint64 // areas that begin on the device
	done   uint64 // areas that are prepared
	step   uint64
}

// prepare is called before an area is read.
func (r *readAhead) prepare(area uint64) error {
	if area < r.done {
		return nil
	}
	r.step = max(1, min(2*r.step, aheadAreas, aheadBytes/uint64(r.layout.ChunkBytes())))
	first, end := r.done, max(area+1, min(area+r.step, r.end))
	for a := first; a < end; a++ { // all of them first: small areas share pages
		if err := dropArea(r.dev, r.layout, a); err != nil {
			return err
		}
	}
	if r.step > 1 {
		for a := first; a < end; a++ {
			off := r.layout.COWOffset(r.layout.AreaChunk(a))
			block.BeginRead(r.dev, off, min(r.layout.ChunkBytes(), r.dev.Size()-off))
		}
	}
	r.done = end
	return nil
}

// dropArea drops what is cached of an area, which the device's end may cut.
func dropArea(dev block.Device, l ondisk.Layout, area uint64) error {
	start := l.COWOffset(l.AreaChunk(area))
	return block.DropCache(dev, start, min(l.ChunkBytes(), dev.Size()-start))
}

// Exists reports whether the magic of dev is not zero, so that Create would refuse it.
func Exists(dev block.Device) (bool, error) {
	h, err := ReadHeader(dev)
	var short *ondisk.CorruptError
	if errors.As(err, &short) {
		return false, nil
	}
	return h.Magic != 0, err
}
