// Package publish pushes disks with their stores to registries and object stores, and pulls them from there.
//
//	p, err := publish.Push(ctx, repository, disk, stores, publish.Options{})
//	files, err := publish.Pull(ctx, remoteDisk, dir, publish.Options{Cache: c})
//
// Push makes a layer of the base and of each store, each over the one before, in temporary files; it writes the blobs that the
// repository does not have while it makes the next layer, and the reference last. A push that ended early is repeated. Pull makes a raw image of the base and a
// store of each following layer.
//
// # Guarantees
//
//   - Inputs are only read. The reference names the new disk when everything of it is there, or what it named before.
//   - Memory is bounded: a unit of 64 KiB for each processor, and 40 bytes for each 63 units.
//   - Pushing what was pulled makes the same digests.
//   - Files get their names when they are complete and durable. A file that is there is compared with the layer, and never
//     changed.
package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/store"
)

// Options say how a disk is pushed or pulled.
type Options struct {
	Temp     string                  // directory of temporary files, as large as the compressed layers; empty: that of the system
	Cache    *cache.Cache            // for Pull
	Progress func(done, total int64) // bytes of the disk that were read or written; nil: none
}

// A Pushed is a disk that was pushed.
type Pushed struct {
	Reference string       `json:"reference"`
	Digest    layer.Digest `json:"digest"` // of the description
	Size      int64        `json:"size"`   // of the disk in bytes
	Layers    int          `json:"layers"`
	NewLayers int          `json:"new_layers"` // that were made
	Written   int64        `json:"written"`    // bytes of blobs that the repository did not have
}

// A pushing is one push.
type pushing struct {
	o      Options
	to     remote.Repository
	size   int64
	desc   layer.Description
	merged func(yield func(layer.Entry, error) bool) // entries of desc.Index
	above  *spooled                                  // index of all layers together; nil: there is one layer
	files  []*os.File
	pushed Pushed

	ctx     context.Context // ends with the first upload that fails
	fail    context.CancelCauseFunc
	uploads sync.WaitGroup
	slots   chan struct{} // uploads at a time
	written atomic.Int64
}

// mostUploads is how many blobs are written at the same time.
const mostUploads = 3

// spooled is a blob that the repository must have: in a file, or in another repository.
type spooled struct {
	layer.Blob
	media string
	file  *os.File
	from  remote.Repository
}

// Push makes to name the disk base with stores over it, each over the one before. Of a base that is a disk of package
// layer its layers are used as they are.
func Push(ctx context.Context, to remote.Repository, base block.Device, stores []*store.Store, o Options) (Pushed, error) {
	var upper []upper
	for i, s := range stores {
		if err := s.Err(); err != nil {
			return Pushed{}, fmt.Errorf("store %d: %w", i+1, err)
		}
		if err := s.CheckOrigin(base.Size()); err != nil {
			return Pushed{}, fmt.Errorf("store %d: %w", i+1, err)
		}
		upper = append(upper, storeLayer{s})
	}
	return push(ctx, to, base, upper, o)
}

// A Delta is a layer that is no store: what a device shows where its layer holds something.
type Delta struct {
	Device block.Device
	// Changed has the lowest bit of an extent's flags set where the layer holds something. It may stop early, but not before the
	// first byte.
	Changed      func(off, n int64) ([]block.Extent, error)
	ChunkSectors uint32 // of the store that the layer becomes; a power of two
}

// PushDeltas is Push with layers that are no stores.
func PushDeltas(ctx context.Context, to remote.Repository, base block.Device, deltas []Delta, o Options) (Pushed, error) {
	var upper []upper
	for i, d := range deltas {
		if d.Device.Size() > base.Size() {
			return Pushed{}, fmt.Errorf("layer %d has %d bytes, and the base %d", i+1, d.Device.Size(), base.Size())
		}
		upper = append(upper, d)
	}
	return push(ctx, to, base, upper, o)
}

// An upper is a layer over the base.
type upper interface {
	chunkSectors() uint32
	// produce emits the units of which the layer of a disk of size bytes holds something.
	produce(size int64, progress func(done, total int64)) func(emit func(layer.Unit) error) error
}

func push(ctx context.Context, to remote.Repository, base block.Device, upper []upper, o Options) (Pushed, error) {
	p := &pushing{o: o, to: to, size: base.Size(), desc: layer.Description{Version: layer.Version, Size: base.Size()}, slots: make(chan struct{}, mostUploads)}
	p.ctx, p.fail = context.WithCancelCause(ctx)
	defer p.close()
	if err := p.base(base); err != nil {
		return Pushed{}, err
	}
	for _, u := range upper {
		if err := p.over(u); err != nil {
			return Pushed{}, err
		}
	}
	return p.end()
}

// close ends uploads that are under way.
func (p *pushing) close() {
	p.fail(nil)
	p.uploads.Wait()
	for _, f := range p.files {
		f.Close()
	}
}

// spool makes a temporary file without a name.
func (p *pushing) spool() (*os.File, error) {
	f, err := os.CreateTemp(p.o.Temp, "dmsnap-push-*")
	if err != nil {
		return nil, err
	}
	p.files = append(p.files, f)
	return f, os.Remove(f.Name())
}

// base adds the first layer, or those of a disk that is made of layers.
func (p *pushing) base(base block.Device) error {
	d, is := base.(*ondemand.Disk)
	if !is || d.Description() == nil {
		return p.add(0, produceDevice(base, p.o.Progress))
	}
	was := d.Description()
	p.desc.Index, p.desc.Layers, p.merged = was.Index, append(p.desc.Layers, was.Layers...), d.Entries()
	for _, l := range was.Layers {
		p.upload(spooled{l.Data, layer.MediaData, nil, d.Repository()})
		p.upload(spooled{l.Index.Blob, layer.MediaIndex, nil, d.Repository()})
	}
	if len(was.Layers) > 1 {
		p.above = &spooled{was.Index.Blob, layer.MediaIndex, nil, d.Repository()}
	}
	return nil
}

// over adds a layer over those so far.
func (p *pushing) over(u upper) error {
	number, lower := len(p.desc.Layers), p.merged
	if number == layer.MaxLayers {
		return fmt.Errorf("more than %d layers: push what the snapshot shows as a new base", layer.MaxLayers)
	}
	if err := p.add(u.chunkSectors(), u.produce(p.size, p.o.Progress)); err != nil {
		return err
	}
	f, err := p.spool()
	if err != nil {
		return err
	}
	w := layer.NewIndexWriter(f, p.size)
	if err := layer.Merge(w, lower, p.merged, number); err != nil {
		return err
	}
	if p.desc.Index, err = w.Close(); err != nil {
		return err
	}
	p.above = &spooled{p.desc.Index.Blob, layer.MediaIndex, f, nil}
	p.merged, err = entriesOf(f, p.desc.Index, p.size, p.desc.Layers)
	return err
}

// add makes a layer, adds it, and begins to upload it; p.merged are its own entries then.
func (p *pushing) add(chunkSectors uint32, produce func(emit func(layer.Unit) error) error) error {
	data, err := p.spool()
	if err != nil {
		return err
	}
	index, err := p.spool()
	if err != nil {
		return err
	}
	l, err := layer.Write(p.ctx, data, index, p.size, produce)
	if err != nil {
		return err
	}
	l.ChunkSectors = chunkSectors
	p.desc.Index, p.desc.Layers = l.Index, append(p.desc.Layers, l)
	p.upload(spooled{l.Data, layer.MediaData, data, nil})
	p.upload(spooled{l.Index.Blob, layer.MediaIndex, index, nil})
	p.pushed.NewLayers++
	p.merged, err = entriesOf(index, l.Index, p.size, []layer.Layer{l})
	return err
}

// entriesOf returns the entries of an index in a file.
func entriesOf(f io.ReaderAt, x layer.Index, size int64, layers []layer.Layer) (iter.Seq2[layer.Entry, error], error) {
	tree, err := layer.NewTree(x, size, layers)
	if err != nil {
		return nil, err
	}
	pages := map[int64][]byte{} // at most one of each level
	var order []int64
	return tree.Entries(func(id layer.PageID) ([]byte, error) {
		if b := pages[id.Number]; b != nil {
			return b, nil
		}
		b := make([]byte, layer.PageBytes)
		if _, err := f.ReadAt(b, id.Number*layer.PageBytes); err != nil {
			return nil, err
		}
		if order = append(order, id.Number); len(order) > 16 {
			delete(pages, order[0])
			order = order[1:]
		}
		pages[id.Number] = b
		return b, id.Check(b)
	}), nil
}

// upload begins to write a blob, unless the repository has it.
func (p *pushing) upload(b spooled) {
	p.uploads.Go(func() {
		select {
		case p.slots <- struct{}{}:
			defer func() { <-p.slots }()
		case <-p.ctx.Done():
			return
		}
		if err := p.put(p.ctx, b); err != nil {
			p.fail(err)
		}
	})
}

// end waits until the repository has all blobs, and makes the reference name the disk.
func (p *pushing) end() (Pushed, error) {
	text, err := p.desc.Encode()
	if err != nil {
		return Pushed{}, err
	}
	if p.above != nil {
		p.upload(*p.above)
	}
	if p.uploads.Wait(); p.ctx.Err() != nil {
		return Pushed{}, context.Cause(p.ctx)
	}
	if err := p.to.PutDescription(p.ctx, &p.desc); err != nil {
		return Pushed{}, err
	}
	p.pushed.Written = p.written.Load()
	p.pushed.Reference, p.pushed.Digest, p.pushed.Size, p.pushed.Layers = p.to.Name(), layer.DigestOf(text), p.size, len(p.desc.Layers)
	return p.pushed, nil
}

func (p *pushing) put(ctx context.Context, b spooled) error {
	if has, err := p.to.Has(ctx, b.Blob); has || err != nil {
		return err
	}
	var content io.ReaderAt = b.file
	if b.from != nil {
		if mounted, err := p.to.Mount(ctx, b.Blob, b.media, b.from); mounted || err != nil {
			return err
		}
		content = remoteReader{ctx, b.from.Blob(b.Blob)}
	}
	if err := p.to.Put(ctx, b.Blob, b.media, content); err != nil {
		return err
	}
	p.written.Add(b.Size)
	return nil
}

// remoteReader reads a blob of another repository.
type remoteReader struct {
	ctx  context.Context
	blob *remote.Blob
}

func (r remoteReader) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), r.blob.Size()-off)
	if n <= 0 {
		return 0, io.EOF
	}
	if err := r.blob.ReadRange(r.ctx, p[:n], off); err != nil {
		return 0, err
	}
	if int(n) < len(p) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// errOther reports a file that is not what was pulled.
var errOther = errors.New("it has other content than the layer")
