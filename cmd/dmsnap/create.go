package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source"
)

// creation holds the options of a new store.
type creation struct {
	chunkSize sizeFlag
	cowSize   sizeFlag
	store     storeFlag
	force     bool
	disk      diskFlags
	json      bool
}

func newCreate() *cobra.Command {
	var o creation
	c := &cobra.Command{
		Use:   "create ORIGIN COW",
		Short: "Create an empty snapshot store for an origin",
		Long: `Create an empty snapshot store on COW. Of the origin, only the size and the format are read.

If COW does not exist, it becomes a sparse file, just large enough that it can never become full, unless --cow-size
sets another size. An existing file or block device keeps its size (an empty file gets the size of a new one). It
must be empty: zeros wherever "dmsnap inspect" and blkid(8) look, at both ends. --force creates the store over
existing content, which is lost.

ORIGIN may be a qcow2 image, an NBD URI, or a part of a disk (DISK#p2, DISK#VG/LV). The format of an image is recorded in
COW; a store without that record has a raw origin. An ORIGIN that is a VMDK image, compressed, or otherwise known not to be
a raw disk is refused. --raw says that its own bytes are the disk.

A create that fails leaves no incomplete file.`,
		Example: `  dmsnap create disk.img new.cow
  dmsnap create disk.img large.cow --chunk-size 64KiB --cow-size 10GiB`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			_, stop := untilSignal() // signals are ignored: this takes little time and must not be left incomplete
			defer stop()
			made, err := o.create(args[0], args[1])
			if err != nil {
				return err
			}
			return printResult(c, o.json, made, "%s: empty store, %s a chunk, space for %s of changes; the origin is %s\n", made.Path,
				bytesText(int64(made.ChunkSectors)*ondisk.SectorSize), bytesText(made.roomBytes()), made.OriginFormat)
		},
	}
	f := c.Flags()
	f.Var(&o.chunkSize, "chunk-size", "size of a chunk, a power of two from 512 to 1GiB (default 4KiB)")
	f.Var(&o.cowSize, "cow-size", "size of the COW file (default: large enough never to become full)")
	f.Var(&o.store, "store", "how the store will be used: P or PO; the on-disk format is the same")
	f.BoolVar(&o.force, "force", false, "create the store over existing content")
	o.disk.add(f)
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
	OriginFormat string `json:"origin_format"` // raw or qcow2
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
	if o.cowSize.set && o.cowSize.bytes == 0 {
		return made, errors.New("--cow-size: 0 bytes are too few for a store")
	}
	s, err := o.disk.options(block.Options{})
	if err != nil {
		return made, err
	}
	if err = checkDifferent(originPath, cowPath); err == nil {
		err = source.CheckComplete(originPath)
	}
	if err != nil {
		return made, err
	}
	c, err := cowfile.Create(originPath, cowPath, cowfile.Options{ChunkSectors: sectors, Size: o.cowSize.bytes, Overwrite: o.force, Raw: o.disk.raw, Open: source.Opener(s)})
	if errors.Is(err, cowfile.ErrSize) {
		err = fmt.Errorf("%w: see --cow-size", err)
	}
	return created{cowPath, o.store.String(), sectors, uint64(c.Size) / ondisk.SectorSize, c.Format}, advise(err)
}
