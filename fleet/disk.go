package fleet

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
)

// A disk is an open base.
type disk struct {
	name string
	size int64 // written with ops and Fleet.mu held
	err  error // why it can't be used

	// Written with ops held.
	file      cowfile.Origin   // nil: err
	ground    *ground          // of chain: the disk, until it has a preserve layer
	chain     *stack.Chain     // the disk itself, for layers without a parent
	origin    *snapshot.Origin // nil: it was never written
	preserve  *layer           // the newest one, which is attached to origin
	exported  *block.Switch    // below the device of its export; nil: it is not exported
	exportErr error            // why a writable one is not; Fleet.mu is held
	observed  atomic.Pointer[activity.Device]
	merge     *treeMerge // under way, or the last one since the start; written with Fleet.mu held

	account account
}

// A ground is the device at the bottom of chains: the disk, until something is written to it; then a preserve layer, which
// shows the disk as it was. It is replaced while it is used, and shows the same before and after.
type ground struct {
	block.Forward
	behind *block.Switch
}

func newGround(dev block.Device) *ground {
	behind := block.NewSwitch(dev)
	return &ground{Forward: block.NewHeldForward(behind), behind: behind}
}

// replace makes dev the device, while no request is in flight.
func (g *ground) replace(dev block.Device) {
	g.change(func() (block.Device, error) { return dev, nil })
}

// change makes the device that with returns the device, while no request is in flight. After an error it stays as it is.
func (g *ground) change(with func() (block.Device, error)) error {
	return g.behind.Replace(with)
}

// A prefix is the first bytes of a device that is longer.
type prefix struct {
	block.Forward
	size int64
}

// firstBytes returns a device of the first size bytes of dev.
func firstBytes(dev block.Device, size int64) block.Device {
	if dev.Size() == size {
		return dev
	}
	return prefix{block.NewForward(dev), size}
}

// Size is in bytes.
func (p prefix) Size() int64 { return p.size }

// Refresh returns the size, which is fixed.
func (p prefix) Refresh() (int64, error) { return p.size, nil }

// openDisk opens the disk of a record.
func (f *Fleet) openDisk(r *diskRecord) *disk {
	d := &disk{name: r.Name, size: r.Size}
	file, err := f.openSource(r.Source, r.Format, r.Raw, f.mergeMark(r))
	if err == nil && r.Merging == "" { // the process may have ended between the mark and the record
		f.unmark(r)
	}
	if d.err = err; err == nil && (file.Size() < r.Size || file.Size() > max(r.Size, r.Growing)) {
		d.err = fmt.Errorf("%s: it has %d bytes, and had %d", r.Source, file.Size(), r.Size)
		file.Close()
	}
	if d.err == nil {
		d.setFile(file)
	}
	return d
}

// setFile makes the disk usable.
func (d *disk) setFile(file cowfile.Origin) {
	d.file, d.ground = file, newGround(firstBytes(file, d.size))
	d.chain = stack.New(d.ground, d.size)
}

// openSource opens a disk. One into which a merge is not complete is refused, but for the merge of own.
func (f *Fleet) openSource(source, format string, raw bool, own merge.DaemonMerge) (cowfile.Origin, error) {
	file, err := f.opts.Open(source, cowfile.OriginOptions{Options: block.Options{ReadOnly: true, Lock: block.LockRead}, Raw: raw, Format: format})
	if err != nil {
		return nil, err
	}
	err = block.WithPath(source, cowfile.CheckSize(file))
	if err == nil && hasSideFile(source) {
		err = own.Check(source)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

func (d *disk) close() error {
	if d.file == nil {
		return nil
	}
	return d.file.Close()
}

// AddDisk adds a base. It is opened for reading, and others may read it too.
func (f *Fleet) AddDisk(ctx context.Context, q api.AddDiskRequest) (api.Disk, error) {
	if err := checkName("name", q.Name); err != nil {
		return api.Disk{}, err
	}
	release, err := f.acquire(ctx)
	if err != nil {
		return api.Disk{}, err
	}
	err = f.free(q.Name)
	release()
	if err != nil {
		return api.Disk{}, err
	}
	file, err := f.openSource(q.Source, q.Format, q.Raw, merge.DaemonMerge{}) // other operations go on: it may wait for a server
	if err != nil {
		return api.Disk{}, err
	}
	if release, err = f.acquire(ctx); err != nil {
		return api.Disk{}, errors.Join(err, file.Close())
	}
	defer release()
	if err := f.free(q.Name); err != nil {
		return api.Disk{}, errors.Join(err, file.Close())
	}
	c := f.newChange("add disk")
	r := diskRecord{Name: q.Name, Source: q.Source, Format: file.Format(), Raw: q.Raw, Size: file.Size(), Created: c.Time}
	d := &disk{name: q.Name, size: file.Size()}
	d.setFile(file)
	c.Disks = []diskRecord{r}
	if q.Writable {
		if err := checkWritable(file); err != nil {
			return api.Disk{}, block.WithPath(q.Source, errors.Join(err, file.Close()))
		}
	}
	f.mu.Lock()
	err = f.append(c, false)
	if err == nil {
		f.disks[q.Name] = d
		f.publish(api.Event{Seq: c.Seq, Kind: api.EventDiskAdded, Name: q.Name, Disk: q.Name, Text: q.Source})
	}
	f.mu.Unlock()
	if err != nil {
		return api.Disk{}, errors.Join(err, file.Close())
	}
	if q.Writable {
		if err := f.makeWritable(d); err != nil {
			return api.Disk{}, fmt.Errorf("the disk was added, and can't be written: %w", err)
		}
	}
	return f.Disk(q.Name)
}

// makeWritable exports a disk itself. ops is held.
func (f *Fleet) makeWritable(d *disk) error {
	if err := f.allowWrites(d); err != nil {
		return err
	}
	f.mu.Lock()
	r := *f.state.Disks[d.name]
	r.Writable = true
	c := f.newChange("writable")
	c.Disks = []diskRecord{r}
	err := f.append(c, false)
	f.mu.Unlock()
	if err != nil {
		return err
	}
	return f.exportDisk(d)
}

// free refuses a name that a disk or node has.
func (f *Fleet) free(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state.taken(name)
}

// RemoveDisk removes a base without children. Nothing of it is changed.
func (f *Fleet) RemoveDisk(ctx context.Context, name string) error {
	release, err := f.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	d, err := f.dropDisk(name)
	if err != nil {
		return err
	}
	f.endExport(ctx, d)
	err = d.finish()
	if d.preserve != nil {
		f.unref(d.preserve)
	}
	return errors.Join(err, d.close())
}

// dropDisk records that a disk is removed.
func (f *Fleet) dropDisk(name string) (*disk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state.Disks[name] == nil {
		return nil, noSuchDisk(name)
	}
	c := f.newChange("remove disk")
	for _, l := range f.state.Layers {
		switch {
		case l.Disk == name && l.Preserve && !l.Sealed:
			c.DropLayers = append(c.DropLayers, l.ID)
		case l.Disk == name:
			return nil, refuse(api.CodeHasChildren, "disk %q has children: %s is one of them", name, f.titleOf(l))
		}
	}
	c.DropDisks = []string{name}
	d := f.disks[name]
	if d.preserve != nil {
		d.preserve.refs.Add(1) // until it was detached
	}
	if err := f.dropLayers(c); err != nil {
		if d.preserve != nil {
			d.preserve.refs.Add(-1)
		}
		return nil, err
	}
	delete(f.disks, name)
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventDiskRemoved, Name: name, Disk: name})
	return d, nil
}

// titleOf is the name of the element that a layer is in. mu is held.
func (f *Fleet) titleOf(l *layerRecord) string {
	if l.Sealed {
		return l.title()
	}
	return l.Node
}

func noSuchDisk(name string) error {
	return refuse(api.CodeNoSuchDisk, "there is no disk %q", name)
}

// maxPolicy bounds the number of a policy's keys, and maxPolicyText the length of a key or value.
const (
	maxPolicy     = 64
	maxPolicyText = 256
)

// SetPolicy changes the policy of a disk: keys and values that are recorded, and that mean nothing to the fleet itself.
func (f *Fleet) SetPolicy(ctx context.Context, q api.PolicyRequest) (api.Disk, error) {
	release, err := f.acquire(ctx)
	if err != nil {
		return api.Disk{}, err
	}
	defer release()
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.state.Disks[q.Disk]
	if r == nil {
		return api.Disk{}, noSuchDisk(q.Disk)
	}
	changed := *r
	changed.Policy = map[string]string{}
	for k, v := range r.Policy {
		changed.Policy[k] = v
	}
	for k, v := range q.Set {
		if k == "" || len(k) > maxPolicyText || len(v) > maxPolicyText {
			return api.Disk{}, refuse(api.CodeBadRequest, "set: keys and values have at most %d bytes, and keys at least one", maxPolicyText)
		}
		if v == "" {
			delete(changed.Policy, k)
		} else {
			changed.Policy[k] = v
		}
	}
	if len(changed.Policy) > maxPolicy {
		return api.Disk{}, refuse(api.CodeBadRequest, "set: a policy has at most %d keys", maxPolicy)
	}
	c := f.newChange("policy")
	c.Disks = []diskRecord{changed}
	if err := f.append(c, false); err != nil {
		return api.Disk{}, err
	}
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventPolicyChanged, Name: q.Disk, Disk: q.Disk})
	return f.diskStatus(f.state.Disks[q.Disk]), nil
}
