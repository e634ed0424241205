// Package repair makes a valid store from a damaged one: it keeps every valid exception and reports what it drops. Package
// check decides what is valid, so that a repaired store has no findings.
//
//	plan, err := repair.NewPlan(ctx, cow, repair.Options{}) // reads only
//	for _, l := range plan.Lost() { ... }                   // what will be lost
//	err = plan.Fresh(ctx, out)                              // a new store on another device, or:
//	err = plan.InPlace(ctx, save)                           // the same store, with an undo file
//
//	check.Run ──> Plan: kept exceptions, dropped slots ──┬──> Fresh: copied into a new store
//	                                                     └──> InPlace: undo file, moved chunks, areas, header
//
// Of two slots with the same chunk, on either side, the first is kept. The second is most often a void slot after the end
// mark, until a kernel added slots up to it and made it valid again; then it names a chunk that was allocated again
// (docs/spec/dm-snapshot.md §2.6, H4). Slots after the end mark are dropped: they were never acknowledged, or are merged
// already (§8.2, H8). Where an exception is dropped, the snapshot shows the present content of the origin.
//
// Guarantees: NewPlan and Fresh never write to the damaged store. InPlace writes nothing before the undo file is durable,
// and [TakeBack] restores the old bytes, also after a crash in the middle.
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

// ErrNotRepairable reports a store that can't be repaired: it is marked invalid, or its chunk size is unknown.
var ErrNotRepairable = errors.New("repair is not possible")

// ErrNeedsChunkSize reports a store that can be repaired only with Options.ChunkSectors.
var ErrNeedsChunkSize = errors.New("the header does not give the chunk size: repair needs it")

// Options are the options of [NewPlan]. The zero value is usable.
type Options struct {
	// ChunkSectors, where not 0, is used instead of the chunk size in the header, which may be destroyed.
	ChunkSectors uint32
	// Progress is called with the bytes of data copied so far and in total.
	Progress func(done, total int64)
}

// A Lost range had an exception that was dropped because of the problem Code.
type Lost struct {
	block.Range
	Code check.Code `json:"code"`
}

// A Plan is the result of a repair before anything is written: what is kept, and what is lost.
type Plan struct {
	Report *check.Report

	o       Options
	dev     block.Device
	l       ondisk.Layout
	kept    []ondisk.Exception // in the order of the slots
	dropped map[ondisk.OriginChunk]check.Code
}

// maxDropped bounds how many dropped exceptions are listed.
const maxDropped = 1 << 20

// NewPlan checks the store on dev and writes nothing. Errors: ErrNotRepairable, with the reason; those of check.Run.
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
	for _, e := range p.kept { // a chunk with another slot that is kept is not lost
		if len(p.dropped) == 0 {
			break
		}
		delete(p.dropped, e.Old)
	}
	return p, nil
}

// refuse returns why a store with this report can't be repaired.
func refuse(r *check.Report) error {
	for _, f := range r.Findings {
		switch f.Code {
		case check.MarkedInvalid, check.DeviceTooSmall:
		case check.NoStore, check.WrongMagic, check.WrongVersion, check.BadChunkSize, check.Unreadable:
			if r.Layout.ChunkSectors != 0 {
				continue // given, or read
			}
		default:
			continue
		}
		err := fmt.Errorf("%w: %v: %s", ErrNotRepairable, f, f.Problem().Name)
		if r.Layout.ChunkSectors == 0 && f.Problem().Severity == check.Error && f.Code != check.DeviceTooSmall && f.Code != check.MarkedInvalid {
			return fmt.Errorf("%w: %w", err, ErrNeedsChunkSize)
		}
		return fmt.Errorf("%w: %s", err, f.Problem().Remedy)
	}
	return nil
}

// Len is the number of exceptions that are kept.
func (p *Plan) Len() uint64 { return uint64(len(p.kept)) }

// Bytes is how much data they are.
func (p *Plan) Bytes() int64 { return int64(len(p.kept)) * p.l.ChunkBytes() }

// Layout is the layout of the store.
func (p *Plan) Layout() ondisk.Layout { return p.l }

// Kept returns the ranges of the origin that have an exception which is kept, ascending.
func (p *Plan) Kept() []block.Range {
	olds := make([]ondisk.OriginChunk, len(p.kept))
	for i, e := range p.kept {
		olds[i] = e.Old
	}
	slices.Sort(olds)
	var ranges []block.Range
	for _, old := range olds {
		off := p.l.OriginOffset(old)
		if k := len(ranges) - 1; k >= 0 && ranges[k].Off+ranges[k].Length == off {
			ranges[k].Length += p.l.ChunkBytes()
			continue
		}
		ranges = append(ranges, block.Range{Off: off, Length: p.l.ChunkBytes()})
	}
	return ranges
}

// Lost returns the ranges of the origin whose exceptions are dropped, ascending; after Fresh also those whose data it
// could not read. It has a million chunks at most.
func (p *Plan) Lost() []Lost {
	olds := make([]ondisk.OriginChunk, 0, len(p.dropped))
	for old := range p.dropped {
		olds = append(olds, old)
	}
	slices.Sort(olds)
	var lost []Lost
	for _, old := range olds {
		if uint64(old) >= 1<<63>>p.l.Shift() {
			continue // past the largest offset
		}
		off, code := p.l.OriginOffset(old), p.dropped[old]
		if k := len(lost) - 1; k >= 0 && lost[k].Off+lost[k].Length == off && lost[k].Code == code {
			lost[k].Length += p.l.ChunkBytes()
			continue
		}
		lost = append(lost, Lost{block.Range{Off: off, Length: p.l.ChunkBytes()}, code})
	}
	return lost
}

// Missing returns the findings of exceptions that existed and are unknown: areas past the end of the device, and
// sectors of slots that can't be read.
func (p *Plan) Missing() []check.Finding {
	var list []check.Finding
	for _, f := range p.Report.Findings {
		if f.Code == check.AreaPastDevice || f.Code == check.Unreadable {
			list = append(list, f)
		}
	}
	return list
}

// Size is how long a device must be for the repaired store, in bytes: its present size, or more where there is no space
// for the end mark.
func (p *Plan) Size() int64 {
	return max(p.dev.Size(), int64(p.l.ChunksNeeded(p.Len()))*p.l.ChunkBytes())
}
