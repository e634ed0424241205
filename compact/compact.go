// Package compact copies a store to a dense one: exceptions in the order of the origin, without holes, optionally without
// chunks that are the same on the origin, or in chunks of another size. Or it leaves a store where it is and frees the
// space that no exception uses.
//
//	plan, err := compact.NewPlan(ctx, cow, compact.Options{Origin: origin, DropUnchanged: true}) // reads only
//	result, err := plan.Write(ctx, out)                                                           // out: plan.Size() bytes
//
//	freed, err := compact.Punch(ctx, cow, nil) // in place
//
//	slots    chunk 9 -> 2, 4 -> 3, 5 -> 7, 8 -> 6       COW  | h | a | 9 | 4 | . | . | 8 | 5 | . |
//	Write    chunk 4 -> 2, 5 -> 3, 8 -> 4, 9 -> 5       COW  | h | a | 4 | 5 | 8 | 9 |
//	Punch    slots as they are                           COW  | h | a | 9 | 4 |       | 8 | 5 |
//
// Guarantee of both: the snapshot has the same content as before, and package check finds no new problem in the store.
// NewPlan and Write never write to the old store or to the origin.
//
// # Chunks of another size
//
// A smaller chunk is a part of a stored one. A larger chunk is stored when any part of it was; the rest is read from the
// origin. The last chunk ends where the origin does: bytes of the store after that are not part of the snapshot and become
// zeros, where the origin is known.
//
// A partly merged store is handled like any other: merged exceptions are not in it any more.
package compact

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

var (
	// ErrDamaged reports a store with problems that have to be repaired first (package repair).
	ErrDamaged = errors.New("store is damaged")

	// ErrNeedsOrigin reports a task that requires the origin's bytes.
	ErrNeedsOrigin = errors.New("the origin is required")
)

// Options are the properties of the new store. With the zero value it has the same chunks, dense.
type Options struct {
	// Origin is the device that the store belongs to, nil where it is not available. It is only read.
	Origin block.Device
	// DropUnchanged leaves out chunks that hold what Origin holds. The snapshot shows the same without
	// them.
	DropUnchanged bool
	// ChunkSectors is the new chunk size, 0 for that of the old store.
	ChunkSectors uint32
	// Progress is called with the bytes of the disk that were processed so far and in total.
	Progress func(done, total int64)
}

// A Plan is the plan of a new store. Its methods only read the old one.
type Plan struct {
	o    Options
	old  *store.Store
	view *store.View // of old
	to   ondisk.Layout
	end  int64 // of the disk, in bytes; the largest there is where the origin is not known
	most uint64
	gaps int64 // bytes that only the origin has
	same struct {
		view, origin []byte
		differs      []bool
	}
}

// anyDisk is an end that no disk reaches.
const anyDisk = math.MaxInt64

// NewPlan checks the store on cow and writes nothing.
//
// Errors: store.ErrInvalid; ErrDamaged for one in which package check finds an error; ErrNeedsOrigin where unchanged
// chunks are to be dropped, or larger chunks made that are not stored whole, and there is no origin; an origin that is
// not this store's; an invalid chunk size.
func NewPlan(ctx context.Context, cow block.Device, o Options) (*Plan, error) {
	if o.DropUnchanged && o.Origin == nil {
		return nil, fmt.Errorf("%w: what is unchanged shows only beside it", ErrNeedsOrigin)
	}
	st, err := open(ctx, cow, check.Warning)
	if err != nil {
		return nil, err
	}
	p := &Plan{o: o, old: st, to: st.Layout(), end: anyDisk}
	if o.ChunkSectors != 0 {
		if p.to, err = ondisk.NewLayout(o.ChunkSectors); err != nil {
			return nil, err
		}
	}
	if o.Origin != nil {
		if p.to != st.Layout() { // else the origin is only read
			if err := store.CheckBlockSize(p.to, o.Origin); err != nil {
				return nil, err
			}
		}
		p.end = o.Origin.Size()
	}
	if p.view, err = store.NewView(o.Origin, st); err != nil {
		return nil, err
	}
	p.measure()
	if p.gaps > 0 && o.Origin == nil {
		return nil, fmt.Errorf("%w: of the chunks of %d bytes some are stored in part, and %d bytes more must be read from it",
			ErrNeedsOrigin, p.to.ChunkBytes(), p.gaps)
	}
	if p.size() < 0 {
		return nil, fmt.Errorf("no file is large enough for this store in chunks of %d bytes", p.to.ChunkBytes())
	}
	return p, nil
}

// open loads a store whose findings are all at most as severe as bearable.
func open(ctx context.Context, cow block.Device, bearable check.Severity) (*store.Store, error) {
	r, err := check.Run(ctx, cow, check.Options{})
	if err != nil {
		return nil, err
	}
	if r.Has(check.MarkedInvalid) && r.Header.Magic == ondisk.Magic {
		return nil, fmt.Errorf("%w: its header says so", store.ErrInvalid)
	}
	for _, f := range r.Findings {
		if f.Code == check.ChunkNotBlocks {
			continue // the store is only read, or only its unused parts change
		}
		if f.Problem().Severity > bearable {
			return nil, fmt.Errorf("%w: %v", ErrDamaged, f)
		}
	}
	return store.OpenToRead(cow)
}

// measure counts what the new store will have at most, and what it needs of the origin.
func (p *Plan) measure() {
	stored := int64(0)
	for r := range p.old.Exceptions() {
		from, to := p.bytesOf(span{r.Old, r.Count}, p.old.Layout())
		stored += to - from
	}
	covered := int64(0)
	for s := range p.spans() {
		from, to := p.bytesOf(s, p.to)
		covered += to - from
		p.most += s.count
	}
	p.gaps = covered - stored
}

// Size is how long a device must be for the new store, in bytes: as long as the old one is, or longer
// where chunks of the new size need more space for the same part of the disk.
func (p *Plan) Size() int64 { return p.size() }

// size is Size, or -1 where no device is so long.
func (p *Plan) size() int64 {
	from := p.old.Layout()
	size := p.old.Device().Size()
	room := from.Room(from.Chunks(size, false))
	if from != p.to {
		if shift := p.to.Shift(); shift > from.Shift() {
			k := shift - from.Shift()
			room = room>>k + min(1, room&(1<<k-1))
		} else {
			room <<= from.Shift() - shift
		}
	}
	chunks := p.to.ChunksNeeded(max(room, p.most))
	if chunks > uint64(math.MaxInt64)>>p.to.Shift() {
		return -1
	}
	return max(size, int64(chunks)<<p.to.Shift())
}

// Layout is that of the new store.
func (p *Plan) Layout() ondisk.Layout { return p.to }

// EndUnknown reports that the size of the disk is unknown and matters: the last stored chunk is split into smaller
// ones, of which those after the end of the disk would be wrong. Then Options.Origin must be set.
func (p *Plan) EndUnknown() bool {
	return p.o.Origin == nil && p.to.Shift() < p.old.Layout().Shift() && p.old.Len() > 0
}

// LastStored is the range of the last stored chunk on the disk, in bytes.
func (p *Plan) LastStored() (off, length int64) {
	last, _ := p.old.LastOrigin()
	return p.old.Layout().OriginOffset(last), p.old.Layout().ChunkBytes()
}
