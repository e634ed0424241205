package fleet

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/stack"
)

// A disk is an open base.
type disk struct {
	name string
	size int64
	err  error // why it can't be used

	// Written with ops held.
	file  cowfile.Origin // nil: err
	chain *stack.Chain   // the disk itself, for layers without a parent
}

// A ground is the device at the bottom of chains: the disk, until something is written to it; then a preserve layer, which
// shows the disk as it was. It is replaced while it is used, and shows the same before and after.
type ground struct {
	block.Forward
	behind groundHolder
}

type groundHolder struct {
	mu  sync.RWMutex // held for writing by replace
	dev block.Device
}

func (g *groundHolder) Acquire() block.Device {
	g.mu.RLock()
	return g.dev
}

func (g *groundHolder) Release() { g.mu.RUnlock() }

func newGround(dev block.Device) *ground {
	g := &ground{behind: groundHolder{dev: dev}}
	g.Forward = block.NewHeldForward(&g.behind)
	return g
}

// replace makes dev the device, while no request is in flight.
func (g *ground) replace(dev block.Device) {
	g.behind.mu.Lock()
	defer g.behind.mu.Unlock()
	g.behind.dev = dev
}

// openDisk opens the disk of a record.
func (f *Fleet) openDisk(r *diskRecord) *disk {
	d := &disk{name: r.Name, size: r.Size}
	d.file, d.err = f.openSource(r.Source, r.Format, r.Raw)
	if d.err == nil && d.file.Size() != r.Size {
		d.err = fmt.Errorf("%s: it has %d bytes, and had %d", r.Source, d.file.Size(), r.Size)
		d.file.Close()
	}
	if d.err != nil {
		d.file = nil
		return d
	}
	d.chain = stack.New(newGround(d.file), d.size)
	return d
}

func (f *Fleet) openSource(source, format string, raw bool) (cowfile.Origin, error) {
	file, err := f.opts.Open(source, cowfile.OriginOptions{Options: block.Options{ReadOnly: true, Lock: block.LockRead}, Raw: raw, Format: format})
	if err != nil {
		return nil, err
	}
	if err := cowfile.CheckSize(file); err != nil {
		file.Close()
		return nil, block.WithPath(source, err)
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
	defer release()
	if err := f.free(q.Name); err != nil {
		return api.Disk{}, err
	}
	file, err := f.openSource(q.Source, q.Format, q.Raw)
	if err != nil {
		return api.Disk{}, err
	}
	c := f.newChange("add disk")
	r := diskRecord{Name: q.Name, Source: q.Source, Format: file.Format(), Raw: q.Raw, Size: file.Size(), Created: c.Time}
	d := &disk{name: q.Name, size: file.Size(), file: file}
	d.chain = stack.New(newGround(file), d.size)
	c.Disks = []diskRecord{r}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.append(c, false); err != nil {
		return api.Disk{}, errors.Join(err, file.Close())
	}
	f.disks[q.Name] = d
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventDiskAdded, Name: q.Name, Disk: q.Name, Text: q.Source})
	return f.diskStatus(f.state.Disks[q.Name]), nil
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
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state.Disks[name] == nil {
		return noSuchDisk(name)
	}
	for _, l := range f.state.Layers {
		if l.Disk == name {
			return refuse(api.CodeHasChildren, "disk %q has children: %s is one of them", name, f.titleOf(l))
		}
	}
	c := f.newChange("remove disk")
	c.DropDisks = []string{name}
	if err := f.append(c, true); err != nil {
		return err
	}
	d := f.disks[name]
	delete(f.disks, name)
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventDiskRemoved, Name: name, Disk: name})
	return d.close()
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

// fullPolicies are the engine's values of the policy "on-full".
var fullPolicies = map[string]snapshot.FullPolicy{
	"": snapshot.FullFail, "fail": snapshot.FullFail, "pause": snapshot.FullPause, "invalidate": snapshot.FullInvalidate,
}

// maxPolicy bounds the number of a policy's keys, and maxPolicyText the length of a key or value.
const (
	maxPolicy     = 64
	maxPolicyText = 256
)

// SetPolicy changes the policy of a disk: keys and values, of which the fleet itself uses "on-full", from the next layer on.
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
		if _, known := fullPolicies[v]; k == "on-full" && !known {
			return api.Disk{}, refuse(api.CodeBadRequest, "set: on-full: %q is not one of fail, pause, invalidate", v)
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
