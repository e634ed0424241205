package publish

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"sync"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/store"
)

// A File is a layer that was pulled: a raw image, or a store over the layers before it.
type File struct {
	Path   string       `json:"path"`
	Store  bool         `json:"store"`
	Digest layer.Digest `json:"digest"` // of the layer's index
	Kept   bool         `json:"kept"`   // it was there
}

// Pull writes the layers of d to dir, which is made: BASE.img and STORE.cow, named by their content, so that disks with layers
// in common share files. The base can't be written to by its mode.
func Pull(ctx context.Context, d *ondemand.Disk, dir string, o Options) ([]File, error) {
	if d.Description() == nil {
		return nil, fmt.Errorf("%s: it has no layers", d.Name())
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, err
	}
	var files []File
	for i, l := range d.Description().Layers {
		name := layer.DigestOf(fmt.Appendf(nil, "%s %d", l.Index.Digest, d.Size())).Hex()[:16]
		f := File{Path: filepath.Join(dir, name+".img"), Digest: l.Index.Digest, Store: i > 0}
		if f.Store {
			f.Path = filepath.Join(dir, name+".cow")
		}
		if err := f.pull(ctx, d, i, o); err != nil {
			return files, block.WithPath(f.Path, err)
		}
		files = append(files, f)
	}
	return files, nil
}

func (f *File) pull(ctx context.Context, d *ondemand.Disk, n int, o Options) error {
	from, err := d.Layer(n, o.Cache)
	if err != nil {
		return err
	}
	defer from.Close()
	switch _, err := os.Lstat(f.Path); {
	case err == nil:
		f.Kept = true
		return f.compare(from)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	progress := func(done int64) error {
		if o.Progress != nil {
			o.Progress(done, d.Size())
		}
		return context.Cause(ctx)
	}
	if !f.Store {
		return newfile.Write(f.Path, newfile.Options{RemoveLeft: true}, func(file *os.File) error {
			dev, err := newfile.Device(file, d.Size())
			if err != nil {
				return err
			}
			return errors.Join(fillImage(dev, from, progress), dev.Close(), file.Chmod(0o444))
		})
	}
	l, err := ondisk.NewLayout(d.Description().Layers[n].ChunkSectors)
	if err != nil {
		return err
	}
	size, err := cowfile.FullSize(l, d.Size())
	if err != nil {
		return err
	}
	return newfile.WriteDevice(f.Path, newfile.Options{RemoveLeft: true}, size, func(dev *block.File) error {
		return fillStore(dev, l, from, progress)
	})
}

const (
	pieceBytes = 2 << 20
	pullers    = 8 // pieces that are fetched and written at the same time
)

// fillImage writes what a layer has to an image that reads as zeros.
func fillImage(dev block.Device, from *ondemand.Disk, progress func(int64) error) error {
	pieces := make(chan block.Range)
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var running sync.WaitGroup
	for range pullers {
		running.Go(func() {
			p := make([]byte, pieceBytes)
			for r := range pieces {
				_, err := from.ReadAt(p[:r.Length], r.Off)
				if err == nil {
					err = block.WriteSparse(dev, p[:r.Length], r.Off, block.IntoZeros)
				}
				if err != nil {
					cancel(err)
				}
			}
		})
	}
	err := func() error {
		for r, err := range ranges(from.Entries()) {
			for err == nil && r.Length > 0 {
				piece := block.Range{Off: r.Off, Length: min(r.Length, pieceBytes-r.Off%pieceBytes)}
				select {
				case pieces <- piece:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				r.Off, r.Length = r.Off+piece.Length, r.Length-piece.Length
				err = progress(r.Off)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}()
	close(pieces)
	running.Wait()
	return cmp.Or(context.Cause(ctx), err)
}

// fillStore makes a store of a layer.
func fillStore(dev block.Device, l ondisk.Layout, from *ondemand.Disk, progress func(int64) error) error {
	s, err := store.Create(dev, l, false)
	if err != nil {
		return err
	}
	fill := store.NewFiller(s, pullers<<20) // what is read for it is fetched side by side
	size, chunk := from.Size(), l.ChunkBytes()
	read := func(p []byte, off int64) error {
		n := min(int64(len(p)), max(0, size-off))
		clear(p[n:])
		_, err := from.ReadAt(p[:n], off)
		return err
	}
	for r, err := range ranges(from.Entries()) {
		if err != nil {
			return err
		}
		if r.Off%chunk != 0 || (r.Off+r.Length)%chunk != 0 && r.Off+r.Length != size {
			return fmt.Errorf("%w: a layer with parts of chunks, at byte %d", layer.ErrCorrupt, r.Off)
		}
		if err := fill.Add(l.OriginChunkAt(r.Off), uint64((r.Length+chunk-1)/chunk), read); err != nil {
			return err
		}
		if err := progress(r.Off + r.Length); err != nil {
			return err
		}
	}
	if err := fill.Flush(); err != nil {
		return err
	}
	return s.Sync()
}

// ranges joins entries that follow each other.
func ranges(entries iter.Seq2[layer.Entry, error]) iter.Seq2[block.Range, error] {
	return func(yield func(block.Range, error) bool) {
		var r block.Range
		for e, err := range entries {
			if err != nil {
				yield(r, err)
				return
			}
			if r.Off+r.Length == e.Place && r.Length > 0 {
				r.Length += e.Length
				continue
			}
			if r.Length > 0 && !yield(r, nil) {
				return
			}
			r = block.Range{Off: e.Place, Length: e.Length}
		}
		if r.Length > 0 {
			yield(r, nil)
		}
	}
}

// compare returns an error unless the file is the layer.
func (f *File) compare(from *ondemand.Disk) error {
	dev, err := block.Open(f.Path, block.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer dev.Close()
	produce := produceDevice(dev, nil)
	if f.Store {
		s, err := store.OpenToRead(dev)
		if err != nil {
			return err
		}
		if err := s.Err(); err != nil {
			return err
		}
		produce = storeLayer{s}.produce(from.Size(), nil)
	} else if dev.Size() != from.Size() {
		return errOther
	}
	next, stop := iter.Pull2(from.Entries())
	defer stop()
	err = produce(func(u layer.Unit) error {
		defer layer.Recycle(u.Data)
		sum := layer.DigestOf(u.Data)
		for _, p := range u.Pieces {
			e, err, ok := next()
			if err != nil {
				return err
			}
			if !ok || e.Place != p.Place || e.Length != p.Length || e.Zero() != p.Zero || !p.Zero && e.Frame.Content != sum {
				return errOther
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if _, err, more := next(); more {
		return errors.Join(errOther, err)
	}
	return nil
}
