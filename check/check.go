// Package check finds every problem that an exception store can have. It only reads.
//
//	report, err := check.Run(ctx, cow, check.Options{})
//	for _, f := range report.Findings {
//		fmt.Println(f) // "DS015 error: area 0 slot 2, byte 0x1020: origin chunk …"
//	}
//
// Opening a store (package store) stops at the first problem. A check reads all areas raw, one after the other, to the end
// mark and beyond it, and compares every slot with the layout, the device's size and all slots before. Each problem becomes
// a [Finding] with the code of its [Problem]: the table in problems.go, from which docs/problems.md is made, has a sentence
// about each, what Linux does, and the remedy.
//
//	header ──> chunk size ──> area 0, 1, … up to the end mark ──> after it ──> data chunks that no slot names
//	DS001…DS008               DS009…DS012, DS014…DS021           DS013        DS022, DS023
//
// Guarantees: a store without findings can be opened, and all its chunks are at valid places. Data is not read. Codes never
// change their meaning. Memory is a bit for each chunk on both sides, at most 512 MiB for usual sizes, whatever the device
// holds.
//
// [Options.Each] is called for every slot, so that packages repair and rescue classify slots as a check does.
package check

import (
	"context"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// Options are the options of [Run]. The zero value is usable.
type Options struct {
	// Origin, where not nil, is the device that the store belongs to; its size is compared with the exceptions.
	Origin block.Device
	// ChunkSectors, where not 0, is used instead of the header's chunk size, and the areas are checked even if the
	// header is invalid.
	ChunkSectors uint32
	// Limit is how many findings of one code the report has; the rest are counted. 0 means 16.
	Limit int
	// Each is called for each used slot, in order, with the code of its first problem, or 0. OriginTooSmall is no
	// problem of a slot and not reported here.
	Each func(e store.Entry, c Code)
	// Progress is called with how much of the device was checked, in bytes, at most once an area.
	Progress func(done, total int64)
}

// Run checks the store on dev. Whatever the device holds, or fails to read, is a finding and no error; an error is that
// of ctx, or of invalid options.
func Run(ctx context.Context, dev block.Device, o Options) (*Report, error) {
	if o.Limit == 0 {
		o.Limit = 16
	}
	if o.ChunkSectors != 0 {
		if _, err := ondisk.NewLayout(o.ChunkSectors); err != nil {
			return nil, err
		}
	}
	s := &scanner{ctx: ctx, dev: dev, o: o, r: &Report{Size: dev.Size(), Found: map[Code]uint64{}}}
	if !s.header() {
		return s.r, nil
	}
	if err := s.areas(); err != nil {
		return nil, err
	}
	s.closing()
	if s.twice != nil {
		if err := s.findFirsts(); err != nil {
			return nil, err
		}
	}
	return s.r, nil
}

// header checks chunk 0 and determines the layout. more is false when nothing after it can be checked.
func (s *scanner) header() (more bool) {
	size := s.r.Size
	if size < ondisk.SectorSize {
		s.atHeader(DeviceTooSmall, 0, "the device has %d bytes, not even a header's sector", size)
		return false
	}
	h, err := store.ReadHeader(s.dev)
	if err != nil {
		s.atHeader(Unreadable, 0, "the header: %v", err)
	}
	s.r.Header = h
	readable := err == nil && s.judgeHeader(h)
	sectors := h.ChunkSectors
	if s.o.ChunkSectors != 0 {
		sectors = s.o.ChunkSectors
	} else if !readable {
		return false
	}
	l := ondisk.Layout{ChunkSectors: sectors}
	s.r.Layout, s.l = l, l
	if err := store.CheckBlockSize(l, s.dev); err != nil {
		s.atHeader(ChunkNotBlocks, 12, "the chunk size is %d sectors, the device has blocks of %d bytes", sectors, block.BlockSize(s.dev))
	}
	if s.chunks = l.Chunks(size, false); s.chunks < uint64(ondisk.FirstDataChunk) {
		s.atHeader(DeviceTooSmall, 12, "the chunk size is %d sectors, so that header and first area need %d bytes; the device has %d", sectors, 2*l.ChunkBytes(), size)
		return false
	}
	return true
}

// judgeHeader reports whether h is valid.
func (s *scanner) judgeHeader(h ondisk.Header) bool {
	switch {
	case h.Magic == 0:
		s.atHeader(NoStore, 0, "the magic is zero")
		return false
	case h.Magic != ondisk.Magic:
		s.atHeader(WrongMagic, 0, "the magic is 0x%08x, not 0x%08x", h.Magic, uint32(ondisk.Magic))
		return false
	}
	good := true
	if h.Version != ondisk.Version {
		s.atHeader(WrongVersion, 8, "the version is %d, not %d", h.Version, ondisk.Version)
		good = false
	}
	if err := ondisk.CheckChunkSectors(h.ChunkSectors); err != nil {
		s.atHeader(BadChunkSize, 12, "the chunk size is %d sectors: %v", h.ChunkSectors, err)
		good = false
	}
	if h.Valid == 0 {
		s.atHeader(MarkedInvalid, 4, "the valid word is 0")
	} else if h.Valid != 1 {
		s.atHeader(OddValidWord, 4, "the valid word is 0x%x", h.Valid)
	}
	return good
}

func (s *scanner) atHeader(c Code, at int, format string, args ...any) {
	s.r.add(s.o.Limit, c, func() string { return fmt.Sprintf("header, byte 0x%x", at) }, 1,
		func() string { return fmt.Sprintf(format, args...) })
}
