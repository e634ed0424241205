package cowfile

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// Options are the properties of a new store.
type Options struct {
	ChunkSectors uint32 // 0: 8, chunks of 4 KiB
	Size         int64  // of the COW file in bytes; 0: large enough for every chunk of the origin
	Overwrite    bool   // overwrite the content of the COW device
	Raw          bool   // the origin is a raw disk, whatever signatures are in it
	Open         Opener // of the origin; nil: OpenRaw
	Format       string // of the origin, for CreateFor; "": ondisk.RawFormat

	// Device returns the device on which CreateUnsynced makes the store, over its file; nil: the file.
	Device func(*block.File, ondisk.Layout) block.Device
}

// ErrSize reports an Options.Size that is too small, or 0 where no file is large enough for every chunk of the origin.
var ErrSize = errors.New("size of the COW file")

// Created describes a new store.
type Created struct {
	Layout ondisk.Layout
	Size   int64  // of the COW device, in bytes
	Format string // of the origin

	path    string
	isNew   bool  // the file was made
	wasSize int64 // of a file that was there
	vacant  bool  // and was empty
}

// Remove removes a file that was made for a COW device; that it is gone is durable when Remove returns nil.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return block.SyncDirectory(filepath.Dir(path))
}

// Undo reverts Create, as long as the store is not in use: a file that was made is removed, an empty one is as it was.
// A store that overwrote other content stays.
func (c Created) Undo() error {
	switch {
	case c.isNew:
		return Remove(c.path)
	case !c.vacant:
		return nil
	}
	cow, err := OpenDevice(c.path, block.Options{})
	if err != nil {
		return err
	}
	err = block.Zero(cow, 0, c.Layout.ChunkBytes(), 0)
	if err == nil {
		err = cow.Flush()
	}
	if err == nil && c.Size != c.wasSize {
		err = os.Truncate(c.path, c.wasSize)
	}
	return block.WithPath(c.path, errors.Join(err, cow.Close()))
}

// Create makes an empty store on a COW device for an origin, of which only the size is used. A COW file that does not
// exist is made, sparse; it has its name only when the store is complete and durable. An existing file or block device
// is used at its size, or made Options.Size long, when it is empty (image.CheckEmpty) or Options.Overwrite is set. When Create fails no file is left that was not there before.
//
// The format of an origin that is not raw is recorded in the store (ondisk.OriginLabel).
func Create(originPath, cowPath string, o Options) (Created, error) {
	if _, err := o.layout(); err != nil {
		return Created{}, err
	}
	open := o.Open
	if open == nil {
		open = OpenRaw
	}
	// Others may write to the origin meanwhile: only its size is needed.
	origin, err := open(originPath, OriginOptions{Options: block.Options{ReadOnly: true, Lock: block.LockShared}, Raw: o.Raw})
	if err != nil {
		return Created{}, err
	}
	defer origin.Close()
	if err := CheckSize(origin); err != nil {
		return Created{}, block.WithPath(originPath, err)
	}
	if err := CheckCOW(origin, originPath, cowPath); err != nil {
		return Created{}, err
	}
	o.Format = origin.Format()
	return CreateFor(origin, cowPath, o)
}

// layout is that of a new store.
func (o *Options) layout() (ondisk.Layout, error) {
	return ondisk.NewLayout(cmp.Or(o.ChunkSectors, ondisk.DefaultChunkSectors))
}

// CreateFor is Create for an origin that is open, and another disk than the COW device. Its format is Options.Format.
func CreateFor(origin block.Device, cowPath string, o Options) (c Created, err error) {
	if c.Layout, err = o.layout(); err != nil {
		return c, err
	}
	if err := store.CheckBlockSize(c.Layout, origin); err != nil {
		return c, fmt.Errorf("origin: %w", err)
	}
	if c.Size, err = o.size(c.Layout, origin.Size()); err != nil {
		return c, block.WithPath(cowPath, err)
	}
	c.Format = cmp.Or(o.Format, ondisk.RawFormat)
	c.path = cowPath
	if _, err = os.Lstat(cowPath); errors.Is(err, fs.ErrNotExist) {
		c.isNew = true
		err = newfile.Write(cowPath, newfile.Options{}, func(f *os.File) error {
			cow, err := newfile.Device(f, c.Size)
			if err != nil {
				return err
			}
			return o.makeStore(cow, unnamed{cow}, &c)
		})
	} else {
		var cow *block.File
		if cow, err = OpenDevice(cowPath, block.Options{Used: o.Overwrite}); err != nil {
			return c, err
		}
		err = o.makeStore(cow, cow, &c)
	}
	return c, block.WithPath(cowPath, err)
}

// CreateUnsynced makes a COW file that does not exist, with an empty store for an origin of originSize bytes, and opens it.
// Of o it uses ChunkSectors, Size, Format and Device. Nothing is flushed: the store is durable with its first Sync, and the name with
// block.SyncDirectory. A crash before may leave no file, one of any size that is all zeros, or the empty store (see
// store.CreateUnsynced). It fails with fs.ErrExist when there is a file, and leaves none when it fails otherwise.
func CreateUnsynced(path string, originSize int64, o Options) (*block.File, *store.Store, error) {
	l, err := o.layout()
	if err != nil {
		return nil, nil, err
	}
	size, err := o.size(l, originSize)
	if err != nil {
		return nil, nil, block.WithPath(path, err)
	}
	f, err := block.CreateUnsynced(path, size)
	if err != nil {
		return nil, nil, block.WithPath(path, err)
	}
	var dev block.Device = f
	if o.Device != nil {
		dev = o.Device(f, l)
	}
	st, err := store.CreateUnsynced(dev, l, o.Format)
	if err != nil {
		os.Remove(path)
		return nil, nil, block.WithPath(path, errors.Join(err, f.Close()))
	}
	return f, st, nil
}

// size is the size of a new COW file for an origin of the given number of bytes.
func (o *Options) size(l ondisk.Layout, origin int64) (int64, error) {
	if o.Size != 0 {
		if least := 2 * l.ChunkBytes(); o.Size < least {
			return 0, fmt.Errorf("%w: %d bytes are too few for a store: header and first area need %d", ErrSize, o.Size, least)
		}
		return o.Size, nil
	}
	return FullSize(l, origin)
}

// FullSize returns the size in bytes of a COW file that can never overflow, for an origin of so many bytes. Errors: ErrSize.
func FullSize(l ondisk.Layout, origin int64) (int64, error) {
	chunks := l.ChunksNeeded(l.Chunks(origin, true))
	if chunks > uint64(math.MaxInt64/l.ChunkBytes()) {
		return 0, fmt.Errorf("%w: no file is large enough to keep every chunk of this origin", ErrSize)
	}
	return int64(chunks) * l.ChunkBytes(), nil
}

// makeStore makes the store on an open COW device, through dev, and closes it. A file that is empty gets c.Size, which
// becomes the size that the device has; when that fails it gets its own size back.
func (o *Options) makeStore(cow *block.File, dev block.Device, c *Created) (err error) {
	c.wasSize, c.vacant = cow.Size(), !o.Overwrite
	defer func() {
		if err != nil && cow.Size() != c.wasSize {
			err = errors.Join(err, os.Truncate(cow.Path(), c.wasSize))
		}
		err = errors.Join(err, cow.Close())
	}()
	if !o.Overwrite {
		if err := image.CheckEmpty(cow); err != nil {
			return err
		}
	}
	if cow.Size() == 0 || o.Size != 0 {
		if err := cow.Grow(c.Size); err != nil {
			return err
		}
	}
	c.Size = cow.Size()
	_, err = store.CreateFor(dev, c.Layout, true, c.Format)
	return err
}

// unnamed is a file that has its name only when newfile.Write has made it durable as a whole. It can't be found before,
// so the order in which its parts become durable does not matter, and one flush is enough: on a disk each costs as much
// as the rest of Create.
type unnamed struct{ *block.File }

func (unnamed) Flush() error { return nil }

func (u unnamed) WriteDurableAt(p []byte, off int64) error {
	_, err := u.WriteAt(p, off)
	return err
}

// CreateScratch makes a COW file that holds every chunk of an origin of the given number of bytes and no store, for a
// transient snapshot.
func CreateScratch(path string, originSize int64, chunkSectors uint32) error {
	l, err := ondisk.NewLayout(chunkSectors)
	if err != nil {
		return err
	}
	f, err := block.Create(path, int64(l.Chunks(originSize, true))*l.ChunkBytes())
	if err != nil {
		return block.WithPath(path, err)
	}
	return f.Close()
}
