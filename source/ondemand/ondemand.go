// Package ondemand shows disks in registries, object stores and web servers as devices that fetch what is read.
//
//	d, err := ondemand.Open(ctx, "oci://registry.example/golden/debian:13", ondemand.Options{Cache: c})
//	defer d.Close()
//	_, err = d.ReadAt(p, off)
//
// # Guarantees
//
//   - What is read was verified: by the digests of package layer, or, of a file on a web server, by its entity tag. A disk stays
//     the one that was opened, wherever its reference points later.
//   - A read that needs the server ends within the timeout of remote.Options; one that fails is block.ErrUnavailable. Reads hold no lock while they wait, except that others which need
//     the same unit of 64 KiB wait for it, too.
//   - A unit is fetched once for all readers of the cache. Reads in order are fetched ahead, several requests at a time.
//   - A reference that was opened before can be opened while the server gives no answer; what is in the cache can be read.
//
// A Disk is only read and may be used concurrently; Close after the last use.
package ondemand

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/remote"
)

// Options say how a disk is opened.
type Options struct {
	Remote remote.Options
	Cache  *cache.Cache // required

	// Record, where not nil, is called with each unit when it is first read, in that order. It may be called concurrently.
	Record func(block.Range)
	// Prefetch are ranges that are fetched in the background from the beginning, in this order.
	Prefetch []block.Range
	// Log, where not nil, is called with events that no read reports.
	Log func(line string)
}

// offlineTimeout bounds the first request where the cache knows the answer of last time.
const offlineTimeout = 5 * time.Second

// A Disk is a disk that is fetched as it is read.
type Disk struct {
	name    string
	size    int64
	id      layer.Digest
	find    func(off int64, r *request) (part, error)
	desc    *layer.Description // nil: a file
	repo    remote.Repository
	index   *index
	units   *unitTable  // nil: a file
	alone   atomic.Bool // reads can't be executed together
	timeout time.Duration
	record  func(block.Range)
	direct  bool     // what is fetched is not kept in the cache, and nothing is fetched ahead
	seen    sync.Map // units that were recorded

	ctx        context.Context
	stop       context.CancelFunc
	background sync.WaitGroup
	slots      chan struct{} // requests at a time
	ahead      readahead
	requests   atomic.Int64
	received   atomic.Int64
}

// A blob is one that is fetched, and its copy in the cache.
type blob struct {
	remote *remote.Blob
	cache  *cache.Blob
	plain  bool // its bytes are the disk's
}

// A part is a range of the disk within one unit. Without a blob it is zeros.
type part struct {
	n     int64 // bytes
	blob  *blob
	unit  int64
	at    int64 // in the unit's content
	frame layer.Frame
}

// Open opens the disk of a reference of package remote, or of a file on a web server.
func Open(ctx context.Context, name string, o Options) (*Disk, error) {
	d := &Disk{timeout: o.Remote.Timeout, record: o.Record, slots: make(chan struct{}, 8)}
	if d.timeout <= 0 {
		d.timeout = remote.DefaultTimeout
	}
	var err error
	if remote.IsFile(name) {
		err = d.openFile(ctx, name, o)
	} else {
		err = d.openLayers(ctx, name, o)
	}
	if err != nil {
		return nil, err
	}
	d.background.Go(func() {
		for _, r := range o.Prefetch {
			if d.prefetch(r.Off, r.Off+r.Length) != nil && d.ctx.Err() != nil {
				return
			}
		}
	})
	return d, nil
}

// begin makes d ready for requests.
func (d *Disk) begin() {
	d.ctx, d.stop = context.WithCancel(context.Background())
	d.ahead.d = d
}

// Name is the reference without credentials.
func (d *Disk) Name() string { return d.name }

// ID is the identity of the content: the digest of its description or, of a file, that of its address, entity tag and size.
func (d *Disk) ID() layer.Digest { return d.id }

// Description returns the description; nil for a file.
func (d *Disk) Description() *layer.Description { return d.desc }

// Repository returns where the disk is; nil for a file.
func (d *Disk) Repository() remote.Repository { return d.repo }

// Fetched returns the number of requests for data and the bytes that they received.
func (d *Disk) Fetched() (requests, bytes int64) { return d.requests.Load(), d.received.Load() }

// openVersion opens the version of a file that the server has, or had when it was last opened and the server gives no answer.
func openVersion(ctx context.Context, name string, o Options) (*remote.File, error) {
	shown := text.WithoutSecrets(name)
	var known remote.Version
	kept, ok := o.Cache.Reference(shown)
	ok = ok && json.Unmarshal(kept, &known) == nil
	ask, cancel := askFor(ctx, ok)
	defer cancel()
	f, err := remote.OpenFile(ask, name, o.Remote)
	switch {
	case err == nil:
		kept, err = json.Marshal(f.Version())
		o.keep(shown, kept)
		return f, err
	case ok && ctx.Err() == nil && errors.Is(err, remote.ErrUnreachable):
		if f, failed := remote.OpenVersion(name, known, o.Remote); failed == nil {
			o.logOffline(err)
			return f, nil
		}
	}
	return nil, err
}

// keep remembers what a name refers to. Without space for that the disk can be read nevertheless, while the server gives answers.
func (o Options) keep(name string, text []byte) {
	if err := o.Cache.SaveReference(name, text); err != nil && o.Log != nil {
		o.Log(fmt.Sprintf("%s: it can't be opened without the server: %v", name, err))
	}
}

// askFor bounds the first request, less where the cache knows the answer of last time.
func askFor(ctx context.Context, known bool) (context.Context, context.CancelFunc) {
	if !known {
		return ctx, func() {}
	}
	return remote.WithTimeout(ctx, offlineTimeout)
}

func (o Options) logOffline(err error) {
	if o.Log != nil {
		o.Log(fmt.Sprintf("%v; the disk of last time is used", err))
	}
}

func (d *Disk) openFile(ctx context.Context, name string, o Options) error {
	f, err := openVersion(ctx, name, o)
	if err != nil {
		return err
	}
	c, err := o.Cache.Blob(cache.File, f.Identity(), f.Name())
	if err != nil {
		return err
	}
	d.name, d.size, d.id = f.Name(), f.Size(), f.Identity()
	b := &blob{f.Blob, c, true}
	d.begin()
	d.find = func(off int64, _ *request) (part, error) {
		unit := off / layer.UnitBytes
		from := unit * layer.UnitBytes
		length := min(layer.UnitBytes, d.size-from)
		return part{n: from + length - off, blob: b, unit: unit, at: off - from, frame: layer.Frame{Off: from, Packed: int(length), Length: int(length)}}, nil
	}
	return nil
}

// describe returns the description that the reference names, or named when it was last looked up and the server gives no answer.
func (d *Disk) describe(ctx context.Context, o Options) ([]byte, error) {
	known, ok := o.Cache.Reference(d.name)
	if ok && strings.Contains(d.name, "@sha256:") {
		return known, nil // it can't name anything else
	}
	ask, cancel := askFor(ctx, ok)
	defer cancel()
	described, err := d.repo.Description(ask)
	switch {
	case err == nil:
		o.keep(d.name, described)
		return described, nil
	case ok && ctx.Err() == nil && errors.Is(err, remote.ErrUnreachable):
		o.logOffline(err)
		return known, nil
	}
	return nil, err
}

func (d *Disk) openLayers(ctx context.Context, name string, o Options) error {
	var err error
	if d.repo, err = remote.Open(name, o.Remote); err != nil {
		return err
	}
	d.name = d.repo.Name()
	text, err := d.describe(ctx, o)
	if err != nil {
		return err
	}
	if d.desc, err = layer.ParseDescription(text); err != nil {
		return block.WithPath(d.name, err)
	}
	d.size, d.id = d.desc.Size, layer.DigestOf(text)
	return d.openIndexed(d.desc.Index, d.desc.Layers, o.Cache)
}

// openIndexed opens the index and the data of layers, and begins.
func (d *Disk) openIndexed(x layer.Index, layers []layer.Layer, kept *cache.Cache) (err error) {
	if d.index, err = d.openIndex(x, layers, kept); err != nil {
		return err
	}
	blobs := make([]*blob, len(layers))
	for i, l := range layers {
		c, err := kept.Blob(cache.Data, l.Data.Digest, d.name)
		if err != nil {
			return err
		}
		blobs[i] = &blob{d.repo.Blob(l.Data), c, false}
	}
	d.units = newUnitTable(d.size, blobs)
	d.find = func(off int64, r *request) (part, error) {
		run, err := d.index.tree.Find(off, r.load)
		switch {
		case err != nil:
			return part{}, block.WithPath(d.name, err)
		case run.Hole:
			return part{n: run.Until - off}, nil
		case run.Zero():
			return part{n: run.End() - off}, nil
		}
		d.units.note(&run, d.size)
		return part{n: run.End() - off, blob: blobs[run.Frame.Layer], unit: run.Unit(), at: run.Skip + off - run.Place, frame: run.Frame}, nil
	}
	d.begin()
	return nil
}

// Size is in bytes.
func (d *Disk) Size() int64 { return d.size }

// WriteAt returns block.ErrReadOnly.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	return 0, errors.Join(block.CheckRange("write", off, int64(len(p)), d.size), block.ErrReadOnly)
}

// Flush does nothing: nothing is written.
func (d *Disk) Flush() error { return nil }

// Identity is that of the content.
func (d *Disk) Identity() string { return "ondemand " + d.id.Hex() }

// mostExtents bounds what one call of Extents returns.
const mostExtents = 64

// Extents reports what the index has no data for as holes. Of a file everything is data.
func (d *Disk) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, d.size); err != nil {
		return nil, err
	}
	r := d.newRequest()
	defer r.end()
	var list []block.Extent
	for n > 0 {
		p, err := d.find(off, r)
		if err != nil {
			return nil, err
		}
		var flags block.ExtentFlags
		if p.blob == nil {
			flags = block.Hole | block.ReadsZero
		}
		length := min(n, p.n)
		off, n = off+length, n-length
		if k := len(list) - 1; k >= 0 && list[k].Flags == flags {
			list[k].Length += length
			continue
		}
		if len(list) == mostExtents {
			break
		}
		list = append(list, block.Extent{Length: length, Flags: flags})
	}
	return list, nil
}

// Close ends what is fetched in the background.
func (d *Disk) Close() error {
	d.stop()
	d.background.Wait()
	return nil
}

// Layer returns layer n of the disk alone, for one who reads it once: what it fetches of its data is not kept in the cache. Where it has nothing,
// zeros are read. Entries says where it has something. Close it before d.
func (d *Disk) Layer(n int, c *cache.Cache) (*Disk, error) {
	l := d.desc.Layers[n]
	one := &Disk{name: d.name, size: d.size, id: l.Index.Digest, desc: d.desc, repo: d.repo, timeout: d.timeout, slots: d.slots, direct: true}
	return one, one.openIndexed(l.Index, []layer.Layer{l}, c)
}

// Entries returns the entries of the disk's index.
func (d *Disk) Entries() iter.Seq2[layer.Entry, error] {
	return func(yield func(layer.Entry, error) bool) {
		for e, err := range d.index.tree.Entries(func(id layer.PageID) ([]byte, error) {
			r := d.newRequest()
			defer r.end()
			return r.load(id)
		}) {
			if !yield(e, err) {
				return
			}
		}
	}
}
