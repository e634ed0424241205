// Package repair makes a sound store of a damaged one: it keeps what can be believed, says what it dropped,
// and judges by package check, so that a repaired store is one that check calls clean.
//
//	check.Run ──> Plan: kept exceptions, dropped slots ──┬──> Fresh: copied into a new store
//	                                                     └──> InPlace: undo file, moved chunks, areas, header
//
// Of two slots that claim the same chunk, on either side, the first is kept. The second is most often one
// that stood behind the end mark, void, until a kernel added slots up to it and brought it to life; then it
// names a chunk that was handed out again (specification 2.6, H4). What stands behind the end mark is
// dropped: such slots were never acknowledged, or are merged already (H8).
//
// A dropped exception means that the snapshot shows what the origin has there today.
package repair

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// ErrNotMended reports a store that repair has no means for: it is marked invalid, or nothing says how
// large its chunks are.
var ErrNotMended = errors.New("repair can't mend this")

// Options say how a store is looked at. The zero value is ready.
type Options struct {
	// ChunkSectors, where not 0, is believed instead of the header, which may be no header at all.
	ChunkSectors uint32
	// Progress hears how many bytes of data were copied, of how many.
	Progress func(done, total int64)
}

// A Range is bytes of the origin.
type Range struct {
	Off    int64 `json:"offset"`
	Length int64 `json:"length"`
}

// A Lost range had an exception that was dropped, for the reason Code.
type Lost struct {
	Range
	Code check.Code `json:"code"`
}

// A Plan is what can be kept of a store.
type Plan struct {
	Report *check.Report

	o       Options
	dev     block.Device
	l       ondisk.Layout
	kept    []ondisk.Exception // in the order of the slots
	dropped map[ondisk.OriginChunk]check.Code
}

// maxDropped bounds how many dropped exceptions are named one by one. A store of which more are wrong is a
// store of garbage.
const maxDropped = 1 << 20

// NewPlan looks at the store on dev and writes nothing. ErrNotMended says why it can't be repaired; other
// errors are those of check.Run.
func NewPlan(ctx context.Context, dev block.Device, o Options) (*Plan, error) {
	p := &Plan{o: o, dev: dev, dropped: map[ondisk.OriginChunk]check.Code{}}
	r, err := check.Run(ctx, dev, check.Options{ChunkSectors: o.ChunkSectors, Each: func(e store.Entry, c check.Code) {
		switch {
		case c == 0:
			p.kept = append(p.kept, e.Exception)
		case c != check.OriginImpossible && len(p.dropped) < maxDropped:
			if _, ok := p.dropped[e.Old]; !ok {
				p.dropped[e.Old] = c
			}
		}
	}})
	if err != nil {
		return nil, err
	}
	p.Report, p.l = r, r.Layout
	if err := refuse(r); err != nil {
		return nil, err
	}
	for _, e := range p.kept { // a chunk of which another slot was kept is not lost
		if len(p.dropped) == 0 {
			break
		}
		delete(p.dropped, e.Old)
	}
	return p, nil
}

// refuse says why a store with this report can't be repaired.
func refuse(r *check.Report) error {
	for _, f := range r.Findings {
		switch f.Code {
		case check.MarkedInvalid, check.DeviceTooSmall:
		case check.NoStore, check.WrongMagic, check.WrongVersion, check.BadChunkSize, check.Unreadable:
			if r.Layout.ChunkSectors != 0 {
				continue // told, or read
			}
		default:
			continue
		}
		help := f.Problem().Helps
		if r.Layout.ChunkSectors == 0 && f.Problem().Severity == check.Error && f.Code != check.DeviceTooSmall && f.Code != check.MarkedInvalid {
			help = "repair can be told the chunk size that the header should have"
		}
		return fmt.Errorf("%w: %v: %s: %s", ErrNotMended, f, f.Problem().Name, help)
	}
	return nil
}

// Len is the number of exceptions that are kept.
func (p *Plan) Len() uint64 { return uint64(len(p.kept)) }

// Bytes is how much data they are.
func (p *Plan) Bytes() int64 { return int64(len(p.kept)) * p.l.ChunkBytes() }

// Layout is the store's.
func (p *Plan) Layout() ondisk.Layout { return p.l }

// Kept returns the ranges of the origin that have an exception which is kept, ascending.
func (p *Plan) Kept() []Range {
	olds := make([]ondisk.OriginChunk, len(p.kept))
	for i, e := range p.kept {
		olds[i] = e.Old
	}
	slices.Sort(olds)
	var ranges []Range
	for _, old := range olds {
		off := p.l.OriginOffset(old)
		if k := len(ranges) - 1; k >= 0 && ranges[k].Off+ranges[k].Length == off {
			ranges[k].Length += p.l.ChunkBytes()
			continue
		}
		ranges = append(ranges, Range{off, p.l.ChunkBytes()})
	}
	return ranges
}

// Lost returns the ranges of the origin whose exceptions are dropped, ascending; those of which Fresh could
// not read the data among them, once it has run. It names a million chunks at most.
func (p *Plan) Lost() []Lost {
	olds := make([]ondisk.OriginChunk, 0, len(p.dropped))
	for old := range p.dropped {
		olds = append(olds, old)
	}
	slices.Sort(olds)
	var lost []Lost
	for _, old := range olds {
		if uint64(old) >= 1<<63>>p.l.Shift() {
			continue // no such byte
		}
		off, code := p.l.OriginOffset(old), p.dropped[old]
		if k := len(lost) - 1; k >= 0 && lost[k].Off+lost[k].Length == off && lost[k].Code == code {
			lost[k].Length += p.l.ChunkBytes()
			continue
		}
		lost = append(lost, Lost{Range{off, p.l.ChunkBytes()}, code})
	}
	return lost
}

// Missing returns findings that say that there were exceptions of which nothing is known: areas cut off,
// and sectors of slots that can't be read.
func (p *Plan) Missing() []check.Finding {
	var list []check.Finding
	for _, f := range p.Report.Findings {
		if f.Code == check.AreaPastDevice || f.Code == check.Unreadable {
			list = append(list, f)
		}
	}
	return list
}

// Size is how long a device must be for the repaired store, in bytes: as long as it is, or longer where
// there is no room for the end mark.
func (p *Plan) Size() int64 {
	return max(p.dev.Size(), int64(p.l.ChunksNeeded(p.Len()))*p.l.ChunkBytes())
}
