package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
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
	if o.cowSize.set && o.cowSize.bytes == 0 {
		return made, errors.New("--cow-size: 0 bytes are too few for a store")
	}
	c, err := cowfile.Create(originPath, cowPath, cowfile.Options{ChunkSectors: sectors, Size: o.cowSize.bytes, Overwrite: o.force, Raw: o.raw})
	if errors.Is(err, cowfile.ErrSize) {
		err = fmt.Errorf("%w: see --cow-size", err)
	}
	return created{cowPath, o.store.String(), sectors, uint64(c.Size) / ondisk.SectorSize}, advise(err)
}
