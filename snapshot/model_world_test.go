package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/model"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func layoutOf(chunk int64) ondisk.Layout { return ondisk.Layout{ChunkSectors: uint32(chunk)} }

// do carries out one operation in both worlds. What there is nothing for is left out.
func (w *world) do(op scriptOp) error {
	op.n = min(op.n, w.disk.Size()/sector-op.at)
	switch op.kind {
	case "origin write", "origin zero", "origin fua":
		return w.writeOrigin(op.kind[len("origin "):], op)
	case "origin flush":
		if m := w.merged; m != nil { // goes to both devices
			m.model.Flush()
		}
		return w.origin.Flush()
	case "attach":
		return w.attach(op)
	case "step":
		if w.merging == nil {
			return nil
		}
		return w.step(int64(op.pick) * int64(op.pick)) // 0: the kernel's run
	case "end merge":
		if w.merging == nil {
			return nil
		}
		return w.endMerge()
	case "back", "load merge":
		if len(w.away) == 0 {
			return nil
		}
		p := w.away[op.pick%len(w.away)]
		if op.kind == "load merge" {
			return w.loadMerge(p)
		}
		return w.reattach(p, op.opts)
	}
	if len(w.pairs) == 0 {
		return nil
	}
	return w.doSnapshot(w.pairs[op.pick%len(w.pairs)], op)
}

// doSnapshot is do for what concerns a snapshot.
func (w *world) doSnapshot(p *pairOf, op scriptOp) error {
	at, n := op.at, min(op.n, p.model.Size-op.at)
	switch op.kind {
	case "write", "zero", "fua":
		if n <= 0 {
			return nil
		}
		data, err := put(p.dev, op.kind, at, n, op.x)
		want := p.model.Write(at, data)
		if op.kind == "fua" && want == model.OK {
			p.model.Flush()
		}
		if err := w.wantResult(err, want); err != nil {
			return err
		}
	case "flush":
		p.model.Flush()
		return p.dev.Flush() // succeeds whatever the state
	case "discard":
		if n <= 0 {
			return nil
		}
		want := p.model.Discard(at, n)
		if err := w.wantResult(p.dev.Discard(at*sector, n*sector), want); err != nil {
			return err
		}
	case "suspended": // an origin write meanwhile
		if err := p.dev.Suspend(); err != nil {
			return err
		}
		data, err := put(w.origin, "write", at, op.n, op.x)
		if err := w.wantResult(err, w.model.Write(at, data)); err != nil {
			return err
		}
		if err := p.dev.Resume(); err != nil {
			return err
		}
	case "drop":
		if err := w.detach(p); err != nil {
			return err
		}
		w.away = slices.DeleteFunc(w.away, func(q *pairOf) bool { return q == p })
	case "away":
		return w.detach(p)
	case "reopen":
		if err := w.detach(p); err != nil {
			return err
		}
		return w.reattach(p, op.opts)
	case "grow":
		p.model.COW = p.memory.Size()/sector + op.cow
		return p.memory.Grow(p.model.COW * sector)
	case "hand over":
		return w.handOver(p, op.opts)
	case "begin merge":
		return w.beginMerge(p)
	}
	return w.compareRange(at, op.n)
}

func (w *world) writeOrigin(how string, op scriptOp) error {
	data, err := put(w.origin, how, op.at, op.n, op.x)
	want := w.model.Write(op.at, data)
	if err := w.wantResult(err, want); err != nil {
		return err
	}
	if want != model.OK {
		w.seen["no space for the origin"]++
	}
	if m := w.merged; m != nil && how == "fua" && want == model.OK {
		m.model.Flush()
	}
	return w.compareRange(op.at, op.n)
}

// config is the configuration of the model for a table.
func (w *world) config(o snapshot.Options, cowSectors int64) model.Config {
	c := model.Config{Store: o.Store.String(), Chunk: int64(o.ChunkSectors), COW: cowSectors, Size: o.Size / sector,
		Always: o.Sync == snapshot.SyncAlways, Zeroes: o.DiscardZeroesCOW, Passdown: o.DiscardPassdownOrigin,
		FailFull: o.OnFull == snapshot.FullFail, GrowStep: o.Grow.Step / sector, GrowMax: o.Grow.Max / sector}
	if o.Size == 0 {
		c.Size = w.disk.Size() / sector
	}
	return c
}

// attach adds a snapshot with an empty store, at most four.
func (w *world) attach(op scriptOp) error {
	if len(w.pairs)+len(w.away) == 4 {
		return nil
	}
	p := &pairOf{memory: block.NewMemory(op.cow * sector), opts: op.opts}
	if w.merging != nil {
		return w.refused(p)
	}
	var err error
	if p.dev, err = w.origin.Attach(p.memory, p.opts); err != nil {
		return err
	}
	p.model = w.model.Attach(w.config(op.opts, op.cow))
	w.pairs = append(w.pairs, p)
	return nil
}

// refused wants that p is not attached while a merge is under way, and not touched.
func (w *world) refused(p *pairOf) error {
	w.seen["refused during a merge"]++
	before := slices.Clone(p.memory.Bytes())
	if _, err := w.origin.Attach(p.memory, p.opts); !errors.Is(err, snapshot.ErrAlreadyMerging) {
		return fmt.Errorf("attach during a merge: %w", err)
	}
	if !bytes.Equal(p.memory.Bytes(), before) {
		return errors.New("the refused COW device was written to")
	}
	return nil
}

// detach closes a snapshot and checks its store.
func (w *world) detach(p *pairOf) error {
	if p.model.Exceptions() >= 32*int(p.model.Chunk) {
		w.seen["next area"]++
	}
	if p.memory.Size()/sector > p.model.COW {
		return fmt.Errorf("the COW device has %d sectors, the model's %d", p.memory.Size()/sector, p.model.COW)
	} else if p.opts.Grow.Step > 0 && p.model.COW%128 != 0 {
		w.seen["grown"]++
	}
	if err := p.dev.Close(); err != nil {
		return err
	}
	p.dev = nil
	p.model.Detach()
	w.pairs = slices.DeleteFunc(w.pairs, func(q *pairOf) bool { return q == p })
	w.away = append(w.away, p)
	return p.check()
}

// check wants a sound store on the COW device, with exactly the model's exceptions.
func (p *pairOf) check() error {
	if p.opts.Store == snapshot.Transient {
		return nil
	}
	s, err := store.Open(p.memory)
	if err != nil {
		return fmt.Errorf("the store is not sound: %w", err)
	}
	if valid := s.Err() == nil; valid != p.model.Valid() {
		return fmt.Errorf("the store on disk is valid: %v, the model's: %v", valid, p.model.Valid())
	} else if valid && s.Len() != uint64(p.model.Exceptions()) {
		return fmt.Errorf("the store on disk has %d exceptions, the model %d", s.Len(), p.model.Exceptions())
	}
	return p.compareSlots(false)
}

// reattach loads a store again, as a table says that leaves it what it is: persistent or transient.
func (w *world) reattach(p *pairOf, o snapshot.Options) (err error) {
	if w.merging != nil {
		return w.refused(p)
	}
	c := w.config(keepStore(p, o), p.memory.Size()/sector)
	if p.opts.Store != snapshot.Transient {
		c.Chunk = p.model.Chunk // the header's
	}
	p.opts, p.model.Config = keepStore(p, o), c
	p.model.Reattach()
	w.away = slices.DeleteFunc(w.away, func(q *pairOf) bool { return q == p })
	w.pairs = append(w.pairs, p)
	p.dev, err = w.origin.Attach(p.memory, p.opts)
	return err
}

// keepStore changes nothing of a table's store but the O of PO.
func keepStore(p *pairOf, o snapshot.Options) snapshot.Options {
	if p.opts.Store == snapshot.Transient || o.Store == snapshot.Transient {
		o.Store = p.opts.Store
	}
	return o
}

// handOver loads a second table on the same COW device and hands the store over to it.
func (w *world) handOver(p *pairOf, o snapshot.Options) error {
	next, err := w.origin.Load(p.memory, o)
	if err != nil {
		return err
	}
	if err := p.dev.Suspend(); err != nil {
		return err
	}
	if err := next.Resume(); err != nil {
		return err
	}
	old := p.dev
	p.dev = next
	p.opts = keepStore(p, o)
	c := w.config(p.opts, p.model.COW)
	c.Chunk = p.model.Chunk
	p.model.Config = c // nothing else changes, nor its place among the others
	w.seen["handed over"]++
	return old.Close()
}

// beginMerge hands a snapshot over to a merge.
func (w *world) beginMerge(p *pairOf) error {
	can := w.model.BeginMerge(p.model)
	m, err := p.dev.BeginMerge()
	if (err == nil) != can {
		return fmt.Errorf("begin: %v, the model says %v", err, can)
	}
	if err != nil {
		return nil
	}
	if !p.model.Valid() {
		w.seen["merge of an invalid snapshot"]++
	}
	w.merging, w.merged = m, p
	w.pairs = slices.DeleteFunc(w.pairs, func(q *pairOf) bool { return q == p })
	if err := p.dev.Close(); err != nil {
		return err
	}
	p.dev = nil
	return w.compareAll()
}

// loadMerge loads a store that is away as a merge.
func (w *world) loadMerge(p *pairOf) error {
	if w.merging != nil {
		return nil
	}
	m, err := w.origin.LoadMerge(p.memory, p.opts)
	if can := w.model.BeginMerge(p.model); (err == nil) != can {
		return fmt.Errorf("load merge: %v, the model says %v", err, can)
	}
	if err != nil {
		return nil
	}
	if err := m.Resume(); err != nil {
		return err
	}
	p.model.COW = p.memory.Size() / sector
	w.seen["merge loaded"]++
	w.merging, w.merged = m, p
	w.away = slices.DeleteFunc(w.away, func(q *pairOf) bool { return q == p })
	return w.compareAll()
}

// step merges at most the given number of exceptions.
func (w *world) step(limit int64) error {
	want, result := w.model.Step(limit)
	got, err := w.merging.Step(uint64(limit))
	if err := w.wantResult(err, result); err != nil {
		return fmt.Errorf("step of at most %d: %w", limit, err)
	}
	if int64(got) != want {
		return fmt.Errorf("step of at most %d: %d, the model merged %d", limit, got, want)
	}
	if result == model.NoRoom {
		w.seen["merge without space"]++
	}
	return nil
}

// endMerge closes the merge. Its store may be loaded again, as a snapshot or a merge, or as a new snapshot
// where nothing was left.
func (w *world) endMerge() error {
	if err := w.merging.Close(); err != nil {
		return err
	}
	w.model.EndMerge()
	p := w.merged
	w.merging, w.merged = nil, nil
	w.away = append(w.away, p)
	if p.model.Exceptions() == 0 {
		w.seen["merge complete"]++
	} else if p.model.Valid() {
		w.seen["merge cut short"]++
	}
	return p.check()
}
