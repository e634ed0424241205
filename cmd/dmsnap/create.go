package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// creation is what a new store is to be like.
type creation struct {
	chunkSize sizeFlag
	cowSize   sizeFlag
	store     storeFlag
	force     bool
	raw       bool
	json      bool
}

func newCreate() *cobra.Command {
	var o creation
	c := &cobra.Command{
		Use:   "create ORIGIN COW",
		Short: "Make an empty snapshot store for an origin",
		Long: `Make an empty snapshot store on COW. The origin is only looked at for its size.

A COW that does not exist is made as a sparse file, just large enough never to overflow whatever is
written, unless --cow-size says otherwise. An existing file or block device is used at the size it has
(an empty file is made as large as a new one) when it holds nothing: zeros wherever "dmsnap inspect" and blkid(8)
look, at both ends. --force makes a store over whatever is there, which is lost.

An ORIGIN that is a qcow2 or VMDK image, compressed, or otherwise known to be no raw disk is refused, unless --raw
says that its own bytes are the disk.

When create fails no half-made file is left.`,
		Example: `  dmsnap create disk.img disk.cow
  dmsnap create disk.img disk.cow --chunk-size 64KiB --cow-size 10GiB`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			_, stop := untilSignal() // a signal waits: this is soon done, and leaves nothing half-made
			defer stop()
			made, err := o.create(args[0], args[1])
			if err != nil {
				return err
			}
			if o.json {
				return printJSON(c, made)
			}
			return printf(c, "%s: empty store, %s a chunk, room for %s of changes\n", made.Path,
				bytesText(int64(made.ChunkSectors)*ondisk.SectorSize), bytesText(made.roomBytes()))
		},
	}
	f := c.Flags()
	f.Var(&o.chunkSize, "chunk-size", "size of a chunk, a power of two from 512 to 1GiB (default 4KiB)")
	f.Var(&o.cowSize, "cow-size", "size of the COW file (default: never overflows)")
	f.Var(&o.store, "store", "what the store is going to be used as: P or PO; the disk is the same for both")
	f.BoolVar(&o.force, "force", false, "make the store over whatever is there")
	addRaw(f, &o.raw)
	f.BoolVar(&o.json, "json", false, "print JSON")
	return c
}

// storeFlag is the value of --store.
type storeFlag struct{ snapshot.StoreType }

func (f *storeFlag) Set(s string) error {
	for _, t := range []snapshot.StoreType{snapshot.Persistent, snapshot.PersistentOverflow, snapshot.Transient} {
		if s == t.String() {
			f.StoreType = t
			return nil
		}
	}
	return errors.New("must be P, PO or N")
}

func (f *storeFlag) Type() string { return "P|PO|N" }

// created is what create prints as JSON.
type created struct {
	Path         string `json:"path"`
	Store        string `json:"store"`
	ChunkSectors uint32 `json:"chunk_sectors"`
	TotalSectors uint64 `json:"total_sectors"`
}

// roomBytes is how much data fits before the snapshot overflows, in bytes.
func (m created) roomBytes() int64 {
	l := ondisk.Layout{ChunkSectors: m.ChunkSectors}
	return int64(l.Room(l.Chunks(int64(m.TotalSectors)*ondisk.SectorSize, false))) * l.ChunkBytes()
}

// create makes a store as o says.
func (o *creation) create(originPath, cowPath string) (made created, err error) {
	if o.store.StoreType == snapshot.Transient {
		return made, errors.New("--store N keeps its exceptions in memory: there is nothing to create")
	}
	sectors, err := o.chunkSize.chunkSectors()
	if err != nil {
		return made, err
	}
	layout, err := ondisk.NewLayout(sectors)
	if err != nil {
		return made, err
	}
	if err := checkDifferent(originPath, cowPath); err != nil {
		return made, err
	}
	// Others may write to the origin now as ever; its size is all that is asked of it.
	origin, err := openOrigin(originPath, block.Options{ReadOnly: true, Lock: block.LockShared}, o.raw)
	if err != nil {
		return made, err
	}
	defer origin.Close()
	if err := store.CheckBlockSize(layout, origin); err != nil {
		return made, about(originPath, err)
	}
	size, err := o.size(layout, origin.Size())
	if err != nil {
		return made, about(cowPath, err)
	}
	if _, err = os.Lstat(cowPath); errors.Is(err, fs.ErrNotExist) {
		err = newfile.Write(cowPath, newfile.Options{}, func(f *os.File) error {
			cow, err := newfile.Device(f, size)
			if err != nil {
				return err
			}
			return o.makeStore(cow, unnamed{cow}, layout, &size)
		})
	} else {
		var cow *block.File
		if cow, err = openDevice(cowPath, block.Options{}); err != nil {
			return made, err
		}
		err = o.makeStore(cow, cow, layout, &size)
	}
	return created{cowPath, o.store.String(), sectors, uint64(size) / ondisk.SectorSize}, about(cowPath, err)
}

// size is how large a COW file for an origin of so many bytes is made.
func (o *creation) size(l ondisk.Layout, origin int64) (int64, error) {
	if o.cowSize.set {
		if least := 2 * l.ChunkBytes(); o.cowSize.bytes < least {
			return 0, fmt.Errorf("--cow-size: %d bytes are too few for a store: header and first area need %d", o.cowSize.bytes, least)
		}
		return o.cowSize.bytes, nil
	}
	chunks := l.ChunksNeeded(l.Chunks(origin, true))
	if chunks > uint64(math.MaxInt64/l.ChunkBytes()) {
		return 0, errors.New("no file is large enough to keep every chunk of this origin: give --cow-size")
	}
	return int64(chunks) * l.ChunkBytes(), nil
}

// makeStore makes the store on an open device, and closes it. size is what a file that is empty gets, and then
// what the device has.
func (o *creation) makeStore(cow *block.File, as block.Device, l ondisk.Layout, size *int64) (err error) {
	defer func() { err = errors.Join(err, cow.Close()) }()
	if !o.force {
		if err := checkVacant(cow); err != nil {
			return err
		}
	}
	if cow.Size() == 0 || o.cowSize.set {
		if err := cow.Grow(*size); err != nil {
			return err
		}
	}
	*size = cow.Size()
	_, err = store.Create(as, l, true)
	return err
}

// unnamed is a file that has its name only when newfile.Write has made it durable as a whole. Nobody finds a store in
// it before, so the order in which its parts get there is all the same, and one flush does: on a disk each
// costs as much as all the rest of create.
type unnamed struct{ *block.File }

func (unnamed) Flush() error { return nil }

func (u unnamed) WriteDurableAt(p []byte, off int64) error {
	_, err := u.WriteAt(p, off)
	return err
}

// checkVacant refuses to make a store, or scratch space, where something is.
func checkVacant(cow block.Device) error {
	err := image.CheckEmpty(cow)
	var found *image.NotEmptyError
	switch {
	case errors.Is(err, store.ErrExists):
		return fmt.Errorf("%w: --force makes a new one over it", err)
	case errors.As(err, &found):
		return fmt.Errorf("%w; --force overwrites it", err)
	}
	return err
}
