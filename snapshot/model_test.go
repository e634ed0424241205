package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/model"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A seed makes a world and a script of random operations, which the engine and the model both go through.
// After every operation its result, all status texts and the slots on the COW devices are compared, and what
// it touched is read back; now and then, and at the end, everything is.
//
//	DMSNAP_SEED=123 go test ./snapshot -run TestModel     replays one seed
//	DMSNAP_DEEP=1   go test ./snapshot -run TestModel     goes through many more

func TestModel(t *testing.T) {
	all := seeds(t, 150)
	done, met := 0, make(map[string]int)
	for _, seed := range all {
		sectors, ops := newScript(seed)
		done += len(ops)
		seen, err := runScript(sectors, ops)
		if err != nil {
			ops = shrink(sectors, ops)
			_, why := runScript(sectors, ops)
			t.Fatalf("seed %d: %v\nreplay: DMSNAP_SEED=%d go test ./snapshot -run 'TestModel$'\nshrunk: origin of %d sectors\n%sthat says: %v",
				seed, err, seed, sectors, scriptText(ops), why)
		}
		for what, n := range seen {
			met[what] += n
		}
	}
	t.Logf("%d operations; met %v", done, met)
	if len(all) == 1 {
		return
	}
	// Scripts that never get into trouble show nothing.
	for _, what := range []string{"invalid", "overflow", "no space", "no space for the origin", "merge without space", "next area", "grown",
		"handed over", "merge of an invalid snapshot", "merge loaded", "merge complete", "merge cut short", "refused during a merge"} {
		if met[what] == 0 {
			t.Errorf("no script met this: %s", what)
		}
	}
}

// A pairOf is one snapshot in both worlds.
type pairOf struct {
	dev    *snapshot.Snapshot // nil while it isn't attached
	model  *model.Snapshot
	memory *block.Memory
	opts   snapshot.Options

	unordered bool // exceptions come in any order
}

// A world is an origin with its snapshots, twice.
type world struct {
	disk       *block.Memory
	origin     *snapshot.Origin
	model      *model.Origin
	pairs      []*pairOf // attached
	away       []*pairOf // not attached, their stores to be loaded again
	merging    *snapshot.Merging
	merged     *pairOf // whose store is being merged
	writesBack bool    // origin writes wait in memory
	seen       map[string]int
}

// runScript goes through a script. It returns what it met, and the first difference.
func runScript(sectors int64, ops []scriptOp) (seen map[string]int, err error) {
	before := blocktest.Pattern(int(sectors*sector), 1)
	w := &world{disk: block.MemoryFrom(before), model: model.New(before), seen: make(map[string]int)}
	var opts []snapshot.OriginOption
	if w.writesBack = len(ops)%2 == 1; w.writesBack {
		opts = append(opts, snapshot.WriteBack(64<<10, time.Hour))
	}
	w.origin = snapshot.NewOrigin(w.disk, opts...)
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	for i, op := range ops {
		err := w.do(op)
		if err == nil {
			err = w.compareStatus()
		}
		if err == nil && i%16 == 15 {
			err = w.compareAll()
		}
		if err != nil {
			return w.seen, fmt.Errorf("operation %d, %v: %w", i, op, err)
		}
	}
	return w.seen, w.finish()
}

// result is an engine's error in the model's words.
func result(err error) (model.Result, error) {
	switch {
	case err == nil:
		return model.OK, nil
	case errors.Is(err, snapshot.ErrNoRoom):
		return model.NoRoom, nil
	case errors.Is(err, snapshot.ErrOverflow):
		return model.Overflow, nil
	case errors.Is(err, store.ErrInvalid):
		return model.Invalid, nil
	}
	return 0, err
}

func (w *world) wantResult(err error, want model.Result) error {
	got, other := result(err)
	if other != nil {
		return other
	}
	if got != want {
		return fmt.Errorf("the engine says %v (%v), the model %v", got, err, want)
	}
	if got != model.OK {
		w.seen[got.String()]++
	}
	return nil
}

// noise is n sectors, each different.
func noise(n int64, x byte) []byte {
	b := make([]byte, n*sector)
	for i := range b {
		b[i] = x + byte(i/sector)*31
	}
	return b
}

// put changes a range in one of the three ways, and returns its new content.
func put(dev block.Device, how string, at, n int64, x byte) ([]byte, error) {
	data := noise(n, x)
	var err error
	switch how {
	case "write":
		_, err = dev.WriteAt(data, at*sector)
	case "zero":
		clear(data)
		err = block.Zero(dev, at*sector, n*sector, 0)
	case "fua":
		err = block.WriteDurable(dev, data, at*sector)
	}
	return data, err
}

// compareStatus holds every status text, and what is on the COW devices, against the model's.
func (w *world) compareStatus() error {
	for i, p := range w.pairs {
		got := p.dev.Status()
		if want := p.model.Status(); got.Text() != want {
			return fmt.Errorf("snapshot %d: status %q, the model's %q", i, got.Text(), want)
		}
		if p.model.Valid() && got.Exceptions != uint64(p.model.Exceptions()) {
			return fmt.Errorf("snapshot %d: %d exceptions, the model's %d", i, got.Exceptions, p.model.Exceptions())
		}
		if err := p.compareSlots(w.writesBack); err != nil {
			return fmt.Errorf("snapshot %d: %w", i, err)
		}
	}
	if w.merging == nil {
		return nil
	}
	if got, want := w.merging.Status().Text(), w.merged.model.Status(); got != want {
		return fmt.Errorf("merge: status %q, the model's %q", got, want)
	}
	if err := w.merged.compareSlots(w.writesBack); err != nil {
		return fmt.Errorf("merge: %w", err)
	}
	return nil
}

// compareSlots wants the model's exceptions in the areas, in order, with their COW chunks: all that must be
// durable, unless origin writes are held, and nothing else but more of the same.
func (p *pairOf) compareSlots(writesBack bool) error {
	if p.opts.Store == snapshot.Transient || !p.model.Valid() || p.unordered {
		return nil
	}
	want, synced := p.model.Slots()
	i := 0
	for e, err := range store.Scan(p.memory, layoutOf(p.model.Chunk)) {
		switch {
		case err != nil:
			return err
		case e.IsEnd():
		case i == len(want):
			return fmt.Errorf("a slot too many: %v", e.Exception)
		case [2]int64{int64(e.Old), int64(e.New)} != want[i]:
			return fmt.Errorf("exception %d on disk is %v, the model's %v", i, e.Exception, want[i])
		default:
			i++
		}
	}
	if i < synced && !writesBack {
		return fmt.Errorf("%d exceptions on disk, and %d are to be durable", i, synced)
	}
	return nil
}

// compareRange reads a range, and a little around it, from all devices.
func (w *world) compareRange(at, n int64) error {
	from := max(at-70, 0)
	to := min(at+n+70, w.disk.Size()/sector)
	got := make([]byte, (to-from)*sector)
	if _, err := w.origin.ReadAt(got, from*sector); err != nil {
		return err
	}
	if want := w.model.Read(from, to-from); !bytes.Equal(got, want) {
		return fmt.Errorf("the origin differs in sector %d", from+int64(firstDifference(got, want)/sector))
	}
	for i, p := range w.pairs {
		end := min(to, p.model.Size)
		if from >= end {
			continue
		}
		want, result := p.model.Read(from, end-from)
		_, err := p.dev.ReadAt(got[:len(want)], from*sector)
		if result == model.Invalid {
			_, err = p.dev.ReadAt(got[:sector], from*sector)
		}
		if err := w.wantResult(err, result); err != nil {
			return fmt.Errorf("read snapshot %d: %w", i, err)
		}
		if err == nil && !bytes.Equal(got[:len(want)], want) {
			return fmt.Errorf("snapshot %d differs in sector %d", i, from+int64(firstDifference(got[:len(want)], want)/sector))
		}
	}
	return nil
}

// compareAll reads everything.
func (w *world) compareAll() error {
	if err := w.compareRange(0, w.disk.Size()/sector); err != nil {
		return err
	}
	for i, p := range w.pairs {
		if !p.model.Valid() {
			continue
		}
		es, err := p.dev.Changed(0, p.dev.Size())
		if err != nil {
			return err
		}
		at := int64(0)
		for _, e := range es {
			for end := at + e.Length/sector; at < end; at++ {
				if got := e.Flags == snapshot.InCOW; got != p.model.InCOW(at) {
					return fmt.Errorf("snapshot %d: sector %d is in the COW device: %v, the model says %v", i, at, got, !got)
				}
			}
		}
	}
	if w.writesBack { // compareRange has looked at what the origin shows
		if err := w.origin.Flush(); err != nil {
			return err
		}
		for _, p := range w.pairs {
			if err := p.compareSlots(false); err != nil {
				return err
			}
		}
	}
	if got := w.disk.Bytes(); !bytes.Equal(got, w.model.Raw) {
		return fmt.Errorf("the origin's disk differs in sector %d", firstDifference(got, w.model.Raw)/sector)
	}
	return nil
}

// finish completes a merge that is under way, loads everything again, and looks at what is on the disks.
func (w *world) finish() error {
	if err := w.compareAll(); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	for n := 0; w.merging != nil; n++ {
		left := w.merged.model.Exceptions()
		if err := w.step(int64(n % 7)); err != nil {
			return fmt.Errorf("last steps: %w", err)
		}
		if w.merged.model.Exceptions() == left { // complete, invalid, or without space
			if err := w.endMerge(); err != nil {
				return err
			}
		}
	}
	if err := w.compareAll(); err != nil {
		return fmt.Errorf("after the merge: %w", err)
	}
	for _, p := range append(w.pairs, w.away...) {
		if p.dev != nil {
			if err := w.detach(p); err != nil {
				return err
			}
		}
		if err := w.reattach(p, p.opts); err != nil {
			return fmt.Errorf("loading again: %w", err)
		}
	}
	if err := errors.Join(w.compareStatus(), w.compareAll()); err != nil {
		return fmt.Errorf("loaded again: %w", err)
	}
	for len(w.pairs) > 0 {
		if err := w.detach(w.pairs[0]); err != nil {
			return err
		}
	}
	return nil
}
