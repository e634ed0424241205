package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
)

// Generations. A disk that is never written is the bottom of all chains itself. From the first write on, a preserve layer
// lies between: it keeps what the disk held, once for everything over it. A fork of the disk after that shows the disk as it
// is now, so that it lies on another preserve layer, the next generation:
//
//	never written   disk ◄ vm1, vm2
//	written         disk ◄ P1 ◄ vm1, vm2             P1 is attached to the disk's snapshot.Origin
//	forked again    disk ◄ P2 ◄ P1 ◄ vm1, vm2        P2 is attached, P1 is sealed
//	                         ◄ vm3
//
// Only the newest preserve layer is attached, so that a write to the disk preserves once, whatever lies over it. Chains are
// not made again: at their bottom is a ground, which is replaced.
//
// Order: a preserve layer is attached, and its record durable, before the disk is written; the next one before the last one
// is detached.

// A generation is what a preserve layer has beside its store.
type generation struct {
	ground *ground            // shows the disk as the layer keeps it
	snap   *snapshot.Snapshot // of the newest one, attached to the disk's origin
	sealed *stack.Chain       // of the others: their layer over the next one's ground
}

// preserveOptions are those of the snapshot of a preserve layer. A write to the disk fails when it has no space: what lies
// over it is never lost.
func (f *Fleet) preserveOptions(disk string, size int64) snapshot.Options {
	return snapshot.Options{Size: size, OnFull: snapshot.FullFail, Notify: func(e snapshot.Event) { f.notify(disk, disk, e) }}
}

// createPreserve makes a durable preserve layer, which nothing names yet, and attaches it. ops is held.
func (f *Fleet) createPreserve(d *disk) (*layer, error) {
	l, err := f.createLayer(d, f.nextID(), d.size)
	if err != nil {
		return nil, err
	}
	err = l.sync()
	if err == nil {
		err = f.names.sync()
	}
	g := &generation{}
	if err == nil {
		g.snap, err = d.origin.AttachStore(l.store, f.preserveOptions(d.name, d.size))
	}
	if err != nil {
		return nil, errors.Join(err, f.discard(l))
	}
	l.durable.Store(true)
	l.generation = g
	return l, nil
}

// preserveRecord is the record of a new preserve layer.
func (f *Fleet) preserveRecord(d *disk, l *layer) layerRecord {
	return layerRecord{ID: l.id, Disk: d.name, Size: d.size, Created: f.opts.Now().UTC().Round(0), Preserve: true, Durable: true}
}

// allowWrites makes the disk one that can be written, with a preserve layer beneath all that lies over it. ops is held.
func (f *Fleet) allowWrites(d *disk) error {
	if err := d.file.AllowWrites(); err != nil {
		return block.WithPath(d.name, err)
	}
	if err := d.file.CheckUnused(); err != nil {
		return block.WithPath(d.name, errors.Join(err, d.file.DenyWrites()))
	}
	if d.preserve != nil {
		return nil
	}
	d.origin = snapshot.NewOrigin(d.file)
	l, err := f.createPreserve(d)
	if err != nil {
		return errors.Join(err, d.file.DenyWrites())
	}
	if err := f.recordFirst(d, l); err != nil {
		return errors.Join(err, l.generation.snap.Close(), f.discard(l), d.file.DenyWrites())
	}
	// Nothing has been written to the disk: both show the same.
	l.generation.ground.replace(l.generation.snap)
	d.preserve = l
	return nil
}

// recordFirst records, durably, that everything over the disk lies on its first preserve layer.
func (f *Fleet) recordFirst(d *disk, l *layer) error {
	l.generation.ground, l.chain = d.ground, d.chain
	c := f.newChange("preserve")
	c.Layers = []layerRecord{f.preserveRecord(d, l)}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range sorted(f.state.Layers) {
		if r.Disk == d.name && r.Parent == 0 {
			over := *r
			over.Parent = l.id
			c.Layers = append(c.Layers, over)
		}
	}
	r := *f.state.Disks[d.name]
	r.Preserve = l.id
	c.Disks = []diskRecord{r}
	return f.appendDurably(c, l)
}

// appendDurably records a change that adds a layer, and makes it durable. mu is held.
func (f *Fleet) appendDurably(c *change, l *layer) error {
	if err := f.append(c, false); err != nil {
		return err
	}
	f.layers[l.id] = l
	if err := f.journal.sync(c.Seq); err != nil {
		f.breakWith(err)
		return err
	}
	return nil
}

// nextGeneration gives the disk a new preserve layer, so that what is put on it shows the disk as it is now. Without
// exceptions in the newest one that shows it already, unless the disk has become longer. ops is held.
func (f *Fleet) nextGeneration(d *disk) error {
	last := d.preserve
	if last == nil || last.store.Len() == 0 && last.chain.Size() == d.size {
		return nil
	}
	l, err := f.createPreserve(d) // both preserve from now on
	if err != nil {
		return err
	}
	l.generation.ground = newGround(l.generation.snap)
	l.chain = stack.New(l.generation.ground, d.size)
	if err := f.recordNext(d, l); err != nil {
		return errors.Join(err, l.generation.snap.Close(), f.discard(l))
	}
	d.preserve = l
	return f.detachPreserve(last, l)
}

// recordNext records, durably, that l is the newest preserve layer.
func (f *Fleet) recordNext(d *disk, l *layer) error {
	c := f.newChange("preserve")
	f.mu.Lock()
	defer f.mu.Unlock()
	last := *f.state.Layers[d.preserve.id]
	last.Parent, last.Sealed = l.id, true
	r := *f.state.Disks[d.name]
	r.Preserve, r.Size, r.Growing = l.id, d.size, 0
	c.Layers, c.Disks = []layerRecord{f.preserveRecord(d, l), last}, []diskRecord{r}
	if f.state.kids[last.ID] == 0 { // nothing lies on it
		c.Layers = c.Layers[:1]
		c.DropLayers = []uint64{last.ID}
		d.preserve.drop = true
	}
	if err := f.appendDurably(c, l); err != nil {
		d.preserve.drop = false
		return err
	}
	return nil
}

// detachPreserve ends the preserving of last, whose ground is the layer over that of next from now on.
func (f *Fleet) detachPreserve(last, next *layer) error {
	g := last.generation
	err := g.ground.change(func() (block.Device, error) {
		if err := g.snap.Close(); err != nil {
			return nil, err
		}
		last.mu.Lock()
		last.stack = stack.NewLayer(last.store)
		last.mu.Unlock()
		g.sealed = overNext(next, last.stack, last.chain.Size())
		return g.sealed, nil
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil { // reads of it fail from now on
		last.err = err
		return fmt.Errorf("%s: %w", last.path, err)
	}
	g.snap = nil
	if last.drop {
		delete(f.layers, last.id)
		f.accounts.remove(last)
		f.unref(last)
		return nil
	}
	f.unsettled[last.id] = last
	return nil
}

// overNext returns the chain of a preserve layer over the next one, which has more bytes when the disk became longer between.
func overNext(next *layer, l *stack.Layer, size int64) *stack.Chain {
	below := next.chain
	if below.Size() > size {
		below = stack.New(firstBytes(below, size), size)
	}
	return below.With(l, size)
}

// growDisk makes the disk longer. Everything over it shows what it did, with zeros behind the old end where it is longer: it
// lies on preserve layers with the old size. The disk is not exported. ops is held.
func (f *Fleet) growDisk(d *disk, size int64) error {
	if d.file.Size() < size && !block.CanGrow(d.file) {
		return refuse(api.CodeBadRequest, "disk %q has %d bytes and can't be made longer: only an image in a file of its own can", d.name, d.size)
	}
	if err := f.recordDisk(d, "grow", func(r *diskRecord) { r.Growing = max(r.Growing, size) }); err != nil {
		return err
	}
	if err := block.Grow(d.file, size); err != nil {
		return block.WithPath(d.name, err)
	}
	before, origin := d.size, d.origin
	f.setSize(d, size)
	d.origin = snapshot.NewOrigin(d.file) // the size of an origin is fixed; nothing uses the old one but the last preserve layer
	last := d.preserve
	err := f.nextGeneration(d)
	if d.preserve == last {
		f.setSize(d, before)
		d.origin = origin
	}
	return err
}

func (f *Fleet) setSize(d *disk, size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d.size = size
}

// recordDisk records, durably, a change to the record of a disk.
func (f *Fleet) recordDisk(d *disk, op string, change func(r *diskRecord)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := *f.state.Disks[d.name]
	change(&r)
	c := f.newChange(op)
	c.Disks = []diskRecord{r}
	if err := f.append(c, false); err != nil {
		return err
	}
	if err := f.journal.sync(c.Seq); err != nil {
		f.breakWith(err)
		return err
	}
	return nil
}

// openGeneration opens a preserve layer at the start. The next generation is open.
func (f *Fleet) openGeneration(d *disk, r *layerRecord, l *layer) (err error) {
	g := &generation{}
	if r.Sealed {
		next := f.layers[r.Parent]
		if next.err != nil {
			return next.err
		}
		l.stack = stack.NewLayer(l.store)
		g.sealed = overNext(next, l.stack, r.Size)
		g.ground = newGround(g.sealed)
		if r.Complete {
			l.completed()
		} else {
			f.unsettled[l.id] = l
		}
	} else {
		d.origin = snapshot.NewOrigin(d.file)
		if g.snap, err = d.origin.AttachStore(l.store, f.preserveOptions(d.name, r.Size)); err != nil {
			return err
		}
		g.ground = newGround(g.snap)
		d.preserve = l
	}
	l.generation = g
	l.chain = stack.New(g.ground, r.Size)
	return nil
}

// exportDisk exports a disk itself, writable. ops is held.
func (f *Fleet) exportDisk(d *disk) error {
	behind := block.NewSwitch(firstBytes(d.origin, d.size))
	dev := f.wrap(d.name, block.NewHeldForward(behind), &d.observed)
	err := f.nbd.Add(nbd.Export{Name: d.name, Description: "disk " + d.name, Device: dev, MultiConn: true})
	f.mu.Lock()
	defer f.mu.Unlock()
	if d.exportErr = err; err == nil {
		d.exported = behind
	}
	return err
}

// endExport ends the export of a disk, if it has one: no request changes the disk from now on. ops is held.
func (f *Fleet) endExport(ctx context.Context, d *disk) {
	if d.exported == nil {
		return
	}
	if err := f.nbd.Remove(ctx, d.name); err != nil {
		f.log.Event(slog.LevelWarn, err.Error(), "requests are under way", err, slog.String("disk", d.name))
	}
	d.exported.Replace(func() (block.Device, error) { return gone{d.size}, nil }) // waits for them
	f.mu.Lock()
	defer f.mu.Unlock()
	d.exported = nil
}

// openWritable exports a disk that is recorded as writable, at the start. One that is a mixture of two contents is not.
func (f *Fleet) openWritable(d *disk, merging string) error {
	if merging != "" {
		return errMerging(d.name, merging)
	}
	if err := f.allowWrites(d); err != nil {
		return err
	}
	return f.exportDisk(d)
}

// finish makes durable what was written to the disk, and detaches its preserve layer.
func (d *disk) finish() error {
	if d.origin == nil || d.file == nil {
		return nil
	}
	var err error
	if !d.file.ReadOnly() {
		err = d.origin.Finish()
	}
	if d.preserve != nil && d.preserve.generation.snap != nil {
		err = errors.Join(err, d.preserve.generation.snap.Close())
	}
	return err
}

// errMerging refuses forks of a disk that is a mixture.
func errMerging(disk, node string) error {
	return refuse(api.CodeMerging, "node %q is being merged into disk %q, which can't be used until that is complete", node, disk)
}

// checkWritable refuses a disk that can't be written whatever happens.
func checkWritable(file cowfile.Origin) error {
	if err := file.AllowWrites(); err != nil {
		return err
	}
	return file.DenyWrites()
}
