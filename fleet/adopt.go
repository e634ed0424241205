package fleet

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// Adopt makes an existing store the top of a new node over a disk. The file stays where it is, and stays there when the node
// is dropped.
func (f *Fleet) Adopt(ctx context.Context, q api.AdoptRequest) (api.Element, error) {
	if err := checkName("node", q.Node); err != nil {
		return api.Element{}, err
	}
	if !filepath.IsAbs(q.COW) {
		return api.Element{}, refuse(api.CodeBadRequest, "cow: %q is not an absolute path", q.COW)
	}
	release, err := f.acquire(ctx)
	if err != nil {
		return api.Element{}, err
	}
	err = f.adopt(q)
	release()
	if err != nil {
		return api.Element{}, err
	}
	return f.Element(q.Node)
}

// adopt is Adopt. ops is held.
func (f *Fleet) adopt(q api.AdoptRequest) (err error) {
	path := filepath.Clean(q.COW)
	if err := f.free(q.Node); err != nil {
		return err
	}
	b, err := f.baseOfDisk(q.Disk)
	if err != nil {
		return err
	}
	if filepath.Dir(path) == f.names.path {
		return refuse(api.CodeSealed, "cow: %s is a layer of this fleet", path)
	}
	l := &layer{id: f.nextID(), path: path, disk: b.disk}
	l.refs.Store(1)
	l.durable.Store(true)
	if l.file, err = cowfile.OpenDevice(path, block.Options{}); err != nil {
		return err
	}
	l.device = f.newDevice(l, l.file, ondisk.Layout{}, false) // the rest is known when it is attached
	n := &node{name: q.Node, disk: b.disk, dev: newNodeDevice(f, q.Node, b.size)}
	t := newTop{node: n, layer: l}
	if err = f.checkAdopted(l, b); err == nil {
		err = t.attach(f, b, b.size)
	}
	if err == nil {
		err = t.view.snap.CheckOrigin()
	}
	if errors.Is(err, store.ErrOriginTooSmall) {
		err = refuse(api.CodeOriginTooSmall, "%s: %v", path, err)
	}
	c := f.newChange("adopt")
	t.record.File, t.record.Durable = path, true
	t.addTo(c)
	if err == nil {
		f.accounts.add(l)
		err = f.recordTops(c, t)
	}
	if err != nil {
		f.accounts.remove(l)
		return errors.Join(err, l.file.Close())
	}
	n.dev.view.Store(t.view)
	err = f.export(n)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes[n.name] = n
	f.publish(api.Event{Seq: c.Seq, Kind: api.EventAdopted, Name: n.name, Parent: q.Disk, Disk: q.Disk, Text: path})
	f.notice()
	return err
}

// baseOfDisk is baseOf of a disk.
func (f *Fleet) baseOfDisk(name string) (base, error) {
	f.mu.Lock()
	r := f.state.Disks[name]
	f.mu.Unlock()
	if r == nil {
		return base{}, noSuchDisk(name)
	}
	if err := f.prepareDisk(name); err != nil {
		return base{}, err
	}
	return f.baseOf(name)
}

// checkAdopted refuses a device that is no store, or one that is not for a disk.
func (f *Fleet) checkAdopted(l *layer, b base) error {
	if err := cowfile.CheckStore(l.path, l.file); err != nil {
		return err
	}
	if b.disk.file.Overlaps(l.file) {
		return refuse(api.CodeBadRequest, "cow: %s is the disk itself", l.path)
	}
	label, err := store.OriginFormat(l.file)
	if err == nil && label != ondisk.RawFormat && label != b.disk.file.Format() {
		err = refuse(api.CodeBadRequest, "cow: %s is for a disk of format %s, and %q has %s", l.path, label, b.disk.name, b.disk.file.Format())
	}
	return err
}
