package merge

import (
	"context"
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A Work is the amount of work of a merge.
type Work struct {
	ChunkSectors uint32
	Chunks       uint64 // exceptions to merge
	Runs         uint64 // runs of them that are consecutive on both devices
	Ranges       uint64 // ranges of the origin that are overwritten
	Bytes        int64  // to copy to the origin
	UndoBytes    int64  // size of a store that keeps what is overwritten; see WriteUndo
}

// Plan returns what Offline would do with these devices, or the error with which it would refuse. It writes nothing;
// the devices may be read-only.
func Plan(origin, cow block.Device) (Work, error) {
	p, err := Prepare(origin, cow)
	if err != nil {
		return Work{}, err
	}
	return p.Work(), p.Close()
}

// Prepared is a merge whose store has been loaded, and nothing more: see [Prepare].
type Prepared struct {
	over *snapshot.Origin
	m    *snapshot.Merging
	work Work
}

// Prepare loads the store on cow, so that a caller who asks for the work first need not load it again to merge. It writes
// nothing, and refuses what Offline refuses, except for what [Prepared.PlanSiblings] does. Until Run or Close nothing else may write
// to the devices, except to the header's first sector, where labels are.
func Prepare(origin, cow block.Device) (*Prepared, error) {
	over := snapshot.NewOrigin(origin)
	m, err := loadOn(over, cow)
	if err != nil {
		return nil, err
	}
	return &Prepared{over, m, workOf(m.Store(), origin.Size())}, nil
}

// Work is what Run would do.
func (p *Prepared) Work() Work { return p.work }

// PlanSiblings returns what Run would have siblings preserve, or the error with which it would refuse: what store.Open says of
// a sibling's COW device; a device that is named twice (snapshot.ErrPairing); ErrSiblingFull. It writes nothing; the devices
// may be read-only. Space on the file system of a COW file is not looked for: a merge that lacks it stops, with nothing lost.
func (p *Prepared) PlanSiblings(siblings []Sibling) ([]SiblingWork, error) {
	return planSiblings(p.over.Device(), p.m, siblings)
}

// Run is Offline with the loaded store. It is called once.
func (p *Prepared) Run(ctx context.Context, o Options) error {
	if err := offline(ctx, p.over, p.m, o); err != nil {
		return err
	}
	if o.Completed != nil {
		return o.Completed()
	}
	return nil
}

// Close gives up what Prepare loaded. After Run it does nothing. The devices stay open.
func (p *Prepared) Close() error { return p.m.Close() }

// workOf counts what is to be merged from st into an origin of size bytes.
func workOf(st *store.Store, size int64) Work {
	l := st.Layout()
	w := Work{ChunkSectors: l.ChunkSectors, Chunks: st.Len(), UndoBytes: int64(l.ChunksNeeded(st.Len())) << l.Shift()}
	var end ondisk.OriginChunk // of the run before
	for r := range st.Exceptions() {
		w.Runs++
		if w.Runs == 1 || r.Old != end {
			w.Ranges++
		}
		end = r.Old + ondisk.OriginChunk(r.Count)
		from, to := l.OriginRange(r.Old, r.Count, size)
		w.Bytes += to - from
	}
	return w
}

// Offline merges the store on cow into origin while nothing else uses the two, and leaves an empty store. The result is
// the work at the beginning.
//
// It refuses, with nothing written, what store.Open refuses, an invalid store (store.ErrInvalid), an
// origin that is smaller than the store's chunks need, and a COW device that is the origin; and what [Prepared.PlanSiblings] refuses.
//
// Other snapshots of the origin show a mixture afterwards, unless they are Options.Siblings: then they show what they did,
// at every instant. When such a snapshot is lost nevertheless, because its COW device failed, Offline stops after the step under
// way, with that error.
//
// When ctx ends it stops after the current step and returns the cause; when a step fails, that error. In both cases the
// store is valid, and calling Offline again continues. Until then the origin alone is a mixture of both contents.
func Offline(ctx context.Context, origin, cow block.Device, o Options) (Work, error) {
	p, err := Prepare(origin, cow)
	if err != nil {
		return Work{}, err
	}
	return p.work, p.Run(ctx, o)
}

// offline runs a merge that is loaded, and closes it.
func offline(ctx context.Context, over *snapshot.Origin, m *snapshot.Merging, o Options) error {
	inner, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	done := func() error { return nil }
	_, err := planSiblings(over.Device(), m, o.Siblings)
	if err == nil {
		done, err = attachSiblings(over, o.Siblings, stop)
	}
	if err == nil {
		err = m.Resume()
	}
	if err == nil {
		err = run(inner, m, o, true)
	}
	if err == nil && inner.Err() != nil && ctx.Err() == nil {
		err = context.Cause(inner) // a sibling was lost in the last step
	}
	if err == nil {
		err = finishLabel(m)
	}
	return errors.Join(err, m.Close(), done())
}

// load makes the merge of two devices without starting it.
func load(origin, cow block.Device) (*snapshot.Merging, error) {
	return loadOn(snapshot.NewOrigin(origin), cow)
}

func loadOn(origin *snapshot.Origin, cow block.Device) (*snapshot.Merging, error) {
	m, err := origin.LoadMerge(cow, snapshot.Options{})
	if err != nil {
		return nil, err
	}
	if err := m.Store().Err(); err != nil {
		m.Close()
		return nil, fmt.Errorf("nothing to merge: %w", err)
	}
	return m, nil
}
