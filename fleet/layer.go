package fleet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
)

// A layer is an open layer. Its file is closed, and removed when its record was dropped, when nothing refers to it: neither
// the tree nor a view.
type layer struct {
	id   uint64
	path string
	disk *disk
	refs atomic.Int64

	// Written with Fleet.mu held, before others can find the layer or when it is sealed.
	file   *block.File  // nil: err
	device *layerDevice // file, within limits
	chain  *stack.Chain // the disk with this layer on top; nil while it is written
	err    error        // why it can't be used

	generation *generation // of a preserve layer

	// durable: the file and the store in it are. complete: all that a sealed layer holds is.
	durable, complete atomic.Bool

	mu    sync.Mutex
	store *store.Store // nil once it is complete
	stack *stack.Layer // of a sealed one
	bytes int64        // allocated, of a complete one

	usage usage

	busy string // the operation that uses it; Fleet.mu is held
	drop bool   // its file is removed when nothing refers to it; Fleet.mu is held
}

// path returns the path of a layer's file.
func (f *Fleet) path(r *layerRecord) string {
	if r.File != "" {
		return r.File
	}
	return filepath.Join(f.names.path, layerFile(r.ID))
}

// createLayer makes the file of a new layer for a disk of size bytes. Nothing of it is durable, and nothing names it yet.
func (f *Fleet) createLayer(d *disk, id uint64, size int64) (*layer, error) {
	l := &layer{id: id, path: filepath.Join(f.names.path, layerFile(id)), disk: d}
	l.refs.Store(1)
	if err := f.createFile(l, size); err != nil {
		return nil, err
	}
	f.accounts.add(l)
	return l, nil
}

// createFile makes the file of a layer.
func (f *Fleet) createFile(l *layer, size int64) (err error) {
	l.file, l.store, err = cowfile.CreateUnsynced(l.path, size, cowfile.Options{ChunkSectors: f.opts.ChunkSectors, Format: ondisk.RawFormat,
		Device: func(file *block.File, layout ondisk.Layout) block.Device {
			l.device = f.newDevice(l, file, layout, false)
			return l.device
		}})
	if block.IsNoSpace(err) {
		return refuseNoSpace(err)
	}
	if err == nil {
		f.names.made.Add(1)
	}
	return err
}

// discard removes a layer that was made for an operation that failed.
func (f *Fleet) discard(l *layer) error {
	f.accounts.remove(l)
	return errors.Join(l.file.Close(), os.Remove(l.path))
}

// openLayer opens the layer of a record, without the chain that it is in. A file that never was durable is made again: it
// is empty.
func (f *Fleet) openLayer(d *disk, r *layerRecord) *layer {
	l := &layer{id: r.ID, path: f.path(r), disk: d}
	l.refs.Store(1)
	l.durable.Store(r.Durable)
	l.complete.Store(r.Complete)
	if l.err = f.openFile(l, r); l.err != nil {
		l.err = block.WithPath(l.path, l.err)
		l.closeFile()
		return l
	}
	f.accounts.add(l)
	return l
}

func (f *Fleet) openFile(l *layer, r *layerRecord) (err error) {
	if !r.Durable && r.File == "" {
		if blank, err := isBlank(l.path); err != nil {
			return err
		} else if blank {
			if err := os.Remove(l.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return f.createFile(l, r.Size)
		}
	}
	if l.file, err = block.Open(l.path, block.Options{ReadOnly: r.Complete}); err != nil {
		return err
	}
	l.device = f.newDevice(l, l.file, ondisk.Layout{}, true)
	if r.Complete {
		l.store, err = store.OpenToRead(l.device)
	} else {
		l.store, err = store.Open(l.device)
	}
	if err == nil {
		l.device.layout = l.store.Layout()
	}
	if err == nil && !r.Sealed && l.store.Sealed() { // writes to it would make it invalid
		err = errors.New("it has the label of a sealed layer, and by the state it is written")
	}
	if err == nil && (r.Sealed || r.Preserve) {
		err = l.store.Err() // invalid: what it held is lost
	}
	return err
}

// isBlank reports whether a layer's file does not exist, or holds no store: a crash may leave it so before it is durable.
func isBlank(path string) (bool, error) {
	dev, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockNone})
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer dev.Close()
	if dev.Size() < ondisk.SectorSize {
		return true, nil
	}
	h, err := store.ReadHeader(dev)
	return h.Magic == 0, err
}

// seal makes an open layer one that is read only, over the chain below. Nothing writes to its store from now on. mu of the
// fleet is held, or the layer is not in use yet.
func (l *layer) seal(below *stack.Chain, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stack = stack.NewLayer(l.store)
	l.chain = below.With(l.stack, size)
}

// completed says that all that a sealed layer holds is durable, and so is the record of the seal: a label that a crash leaves
// on a layer that is written still would refuse the writes. From now on the file is not written, whatever opens it.
func (l *layer) completed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.store == nil || l.stack == nil {
		return
	}
	if l.file != nil && !l.file.ReadOnly() {
		// Best effort: the lock of the directory and the record protect it as well.
		l.store.Seal()
		os.Chmod(l.path, 0o444)
	}
	l.stack.SetDurable()
	l.store = nil
	l.complete.Store(true)
}

// sync makes durable what the layer holds.
func (l *layer) sync() error {
	l.mu.Lock()
	st := l.store
	l.mu.Unlock()
	if st == nil {
		return nil
	}
	if err := st.Sync(); err != nil {
		return fmt.Errorf("%s: %w", l.path, err)
	}
	return nil
}

// allocated is what the file uses on its file system, in bytes.
func (l *layer) allocated() int64 {
	l.mu.Lock()
	known := l.bytes
	l.mu.Unlock()
	if known > 0 {
		return known
	}
	n := allocatedBytes(l.path)
	if l.complete.Load() {
		l.mu.Lock()
		l.bytes = n
		l.mu.Unlock()
	}
	return n
}

func (l *layer) closeFile() error {
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	if errors.Is(err, fs.ErrClosed) {
		err = nil
	}
	return block.WithPath(l.path, err)
}

func refuseNoSpace(err error) error { return refuse("no_space", "%v", err) }
