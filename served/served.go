// Package served reads what running servers keep, for streams and registries: the checkpoints of a fleet's daemon and the snapshots
// of a served disk, while their clients write.
//
//	d, err := served.Open(ctx, api.NewClient(control), "vm1@tuesday", "vm1@monday", source.NBDOptions{})
//	...
//	sent, err := stream.Send(ctx, w, d.Source, stream.SendOptions{Complete: d.Check})
//
// Everything is read over NBD, with the map of what changed, so that the server does what it does for any client: a connection that
// ends, however it ends, leaves nothing.
//
// # Guarantees
//
//   - Checkpoints are read, which never change, and never what a node or a disk is being written. What is read of them is
//     durable in the daemon.
//   - A snapshot of a served disk that a client writes to while it is read is noticed by Check.
package served

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/stream"
)

// bitmap begins the meta contexts that say what changed since the name that follows.
const bitmap = "qemu:dirty-bitmap:"

// A Disk is what a server keeps, open for reading.
type Disk struct {
	Name   string         // of the checkpoint or snapshot that is read
	Since  string         // of what it is compared with; empty: it is sent as a whole
	Source *stream.Source // for stream.Send

	check func() error
	open  []io.Closer
}

// Close closes the connections.
func (d *Disk) Close() error {
	var errs []error
	for _, c := range d.open {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Check returns an error when what was read may be no state that the disk ever had.
func (d *Disk) Check() error {
	if d.check == nil {
		return nil
	}
	return d.check()
}

// export opens an export, which Close closes.
func (d *Disk) export(uri string, o source.NBDOptions, contexts ...string) (*source.Export, error) {
	x, err := source.OpenExport(uri, o, contexts...)
	if err == nil {
		d.open = append(d.open, x)
	}
	return x, err
}

// Open opens what is to be sent: of a daemon the checkpoint of a name, or a node, whose state at this moment becomes a checkpoint
// without a name unless it has that as one already; of a server of one disk a snapshot. since, unless it is empty, is what the
// receiver has: a checkpoint below, of a node's own also without the node's name, or the disk; or another snapshot.
//
// Errors: those of the API; names that are not there, or not below; those of connecting.
func Open(ctx context.Context, ctl *api.Client, name, since string, o source.NBDOptions) (*Disk, error) {
	d := new(Disk)
	layers, err := layersOf(ctx, ctl, name)
	if e := (*api.Error)(nil); errors.As(err, &e) && e.Code == api.CodeNoSuchRequest {
		err = d.snapshot(ctx, ctl, name, since, o)
	} else if err == nil {
		err = d.checkpoint(layers, since, o)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// layersOf returns what a checkpoint, or a node as it is now, is made of.
func layersOf(ctx context.Context, ctl *api.Client, name string) ([]api.Layer, error) {
	of := ctl.Seal
	if strings.Contains(name, "@") {
		of = ctl.Layers
	}
	l, err := of(ctx, name)
	if err == nil && len(l.Layers) == 0 {
		err = fmt.Errorf("the server has no layers of %s", name)
	}
	return l.Layers, err
}

// checkpoint opens the uppermost layer, compared with one below.
func (d *Disk) checkpoint(layers []api.Layer, since string, o source.NBDOptions) error {
	top := layers[len(layers)-1]
	d.Name = top.Name
	if since == "" {
		x, err := d.export(top.URI, o)
		if err == nil {
			d.Source = stream.Whole(x)
		}
		return err
	}
	lower, err := find(layers, since)
	if err != nil {
		return err
	}
	d.Since = lower.Name
	return d.compare(top.URI, lower.URI, lower.Name, lower.Name == top.Name, o)
}

// find returns the layer of a name. A checkpoint of the same node may be named without it.
func find(layers []api.Layer, name string) (api.Layer, error) {
	top := layers[len(layers)-1].Name
	node, _, _ := strings.Cut(top, "@")
	var names []string
	for _, l := range layers {
		if l.Name == name || l.Name == node+"@"+name {
			return l, nil
		}
		names = append(names, l.Name)
	}
	return api.Layer{}, fmt.Errorf("%s is not made of %s: it is made of %s", top, name, strings.Join(names, ", "))
}

// compare makes the source of what the export at uri has and that at since has not.
func (d *Disk) compare(uri, since, name string, same bool, o source.NBDOptions) error {
	contexts := []string{bitmap + name}
	if same {
		contexts = nil
	}
	is, err := d.export(uri, o, contexts...)
	if err != nil {
		return err
	}
	was, err := d.export(since, o)
	if err != nil {
		return err
	}
	var old block.Device = was
	switch {
	case old.Size() > is.Size():
		return fmt.Errorf("%s has %d bytes, and what is compared with it %d", name, old.Size(), is.Size())
	case old.Size() < is.Size(): // a node that was made larger
		old = stack.New(old, is.Size())
	}
	d.Source = stream.Of(old, is, func(off, n int64) ([]block.Extent, error) {
		if same {
			return []block.Extent{{Length: n}}, nil
		}
		return is.BlockStatus(bitmap+name, off, n)
	})
	return nil
}

// snapshot opens a snapshot of a served disk.
func (d *Disk) snapshot(ctx context.Context, ctl *api.Client, name, since string, o source.NBDOptions) error {
	d.Name, d.Since = name, since
	before := map[string]uint64{}
	uris := map[string]string{}
	unchanged := func() error {
		for _, name := range []string{name, since} {
			if name == "" {
				continue
			}
			s, err := ctl.Snapshot(ctx, name)
			switch changes, known := before[name]; {
			case err != nil:
				return err
			case s.Merged || s.State == api.StateMerging || s.State == api.StateMergeFailed:
				return fmt.Errorf("snapshot %q is merged into the origin, which is written", name)
			case known && s.Changes != changes:
				return fmt.Errorf("snapshot %q was written to while it was read: send it while nobody writes to it", name)
			default:
				before[name], uris[name] = s.Changes, s.URI
			}
		}
		return nil
	}
	if err := unchanged(); err != nil {
		return err
	}
	d.check = unchanged
	if since != "" {
		return d.compare(uris[name], uris[since], since, name == since, o)
	}
	x, err := d.export(uris[name], o)
	if err == nil {
		d.Source = stream.Whole(x)
	}
	return err
}

// A Tree is a checkpoint of a daemon as a base with layers over it, open for reading.
type Tree struct {
	Disk
	base   block.Device
	deltas []publish.Delta // bottom-up
}

// Push is publish.Push of the tree.
func (t *Tree) Push(ctx context.Context, to remote.Repository, o publish.Options) (publish.Pushed, error) {
	return publish.PushDeltas(ctx, to, t.base, t.deltas, o)
}

// OpenTree opens the checkpoint of a name, or a node as Open does, to be pushed: the disk beneath it is the base, each
// checkpoint with a name is a layer, and so is what follows the last of them. A base that was never written and is in a registry is
// opened there.
func OpenTree(ctx context.Context, ctl *api.Client, name string, o source.Options) (*Tree, error) {
	layers, err := layersOf(ctx, ctl, name)
	if err != nil {
		return nil, err
	}
	t := new(Tree)
	if err := t.fill(layers, o); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (t *Tree) fill(layers []api.Layer, o source.Options) error {
	bottom, top := layers[0], layers[len(layers)-1]
	t.Name = top.Name
	if err := t.openBase(bottom, top.SizeBytes, o); err != nil {
		return err
	}
	below := bottom
	for i, l := range layers[1:] {
		if strings.Contains(l.Name, "@~") && i+2 < len(layers) { // it has no name
			continue
		}
		context := bitmap + below.Name
		x, err := t.export(l.URI, o.NBD, context)
		if err != nil {
			return err
		}
		t.deltas = append(t.deltas, publish.Delta{Device: x, ChunkSectors: l.ChunkSectors,
			Changed: func(off, n int64) ([]block.Extent, error) { return x.BlockStatus(context, off, n) }})
		below = l
	}
	return nil
}

// openBase opens what lies beneath all layers, as a disk of size bytes.
func (t *Tree) openBase(l api.Layer, size int64, o source.Options) error {
	if strings.HasPrefix(l.Source, "oci://") { // with a digest, or the daemon had not taken it
		o.ReadOnly = true
		d, err := source.Open(l.Source, o)
		if err != nil {
			return err
		}
		t.open = append(t.open, d)
		if t.base = d; d.Fetched() != nil {
			t.base = d.Fetched()
		}
		if t.base.Size() != size {
			return fmt.Errorf("%s has %d bytes, and %s %d: a base in a registry has the size of the disk", l.Name, t.base.Size(), t.Name, size)
		}
		return nil
	}
	x, err := t.export(l.URI, o.NBD)
	if err != nil {
		return err
	}
	if t.base = x; x.Size() < size {
		t.base = stack.New(x, size)
	}
	return nil
}
