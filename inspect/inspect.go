// Package inspect finds out what is on a disk: an exception store and its state, a disk with stores beside it, partitions,
// volume groups of LVM with their volumes and snapshots.
//
//	d, err := inspect.Look(ctx, "disk.img", dev)
//	parts := inspect.Parts([]inspect.Image{{Path: "disk.img", Dev: dev, InUse: d.InUse}})
//
// [Disks] does all of it for names of package source, and [TextWriter] shows results to people. The types have the names of
// the JSON of the command dmsnap.
//
// # Guarantees
//
//   - Nothing is written, and no lock is taken that excludes a writer: disks in use are read as well. What is read of one
//     while it is written may be of different moments; [OpenStore] and [Check] read damage again before they report it.
//   - For [Look], [Parts] and [Disks] the content of a disk is never an error: damage and unknown content are described in the
//     results, and an error is one of opening or reading a disk. Functions that are given a store return its errors.
//   - Text that comes from a disk is as it is there: quote it. A TextWriter does.
//   - Functions may be called concurrently, also for the same device. A result belongs to the caller, and its methods must
//     not be called concurrently.
package inspect

import (
	"context"
	"errors"
	"os"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// A Disk is a file or device, and what belongs to it by its name.
type Disk struct {
	Path    string   `json:"path"`
	Kind    string   `json:"kind"` // a name of package image
	About   string   `json:"about"`
	Bytes   int64    `json:"bytes"`
	InUse   bool     `json:"in_use"` // another program has it open for writing
	Store   *Store   `json:"store,omitempty"`
	QCOW2   *QCOW2   `json:"qcow2,omitempty"`
	Merging *Merging `json:"merging,omitempty"` // of an origin: the merge into it that is not complete
	Beside  []Beside `json:"beside"`            // stores with names made from that of this disk

	Content image.Content `json:"-"`
}

// A Store describes an exception store.
type Store struct {
	Header   Header                `json:"header"`
	Opens    bool                  `json:"opens"`
	Figures  *api.Figures          `json:"figures,omitempty"` // of one that opens
	Problems map[check.Code]uint64 `json:"problems"`          // how often each was found
	Origin   string                `json:"origin,omitempty"`  // a file whose name is that of the store without its suffix

	Report *check.Report `json:"-"`
}

// A Header is the header of a store as found.
type Header struct {
	Valid        uint32 `json:"valid"`
	Version      uint32 `json:"version"`
	ChunkSectors uint32 `json:"chunk_sectors"`
}

// Merging is an incomplete merge, by its side file.
type Merging struct {
	SideFile   string `json:"side_file"`
	COW        string `json:"cow"`
	TakingBack bool   `json:"taking_back"`       // COW is the undo store of an earlier merge
	InPart     bool   `json:"in_part,omitempty"` // COW is merged, and was made when that merge had begun: an older undo store reverts the rest
	Error      string `json:"error,omitempty"`   // why the side file can't be read
}

// Beside is a store that was found by a name made from that of the disk.
type Beside struct {
	Path       string `json:"path"`
	State      string `json:"state"` // ok, invalid or damaged
	Exceptions uint64 `json:"exceptions"`
	Fits       bool   `json:"fits"` // no exception is past the end of the disk
	InUse      bool   `json:"in_use"`
}

// Look examines dev, which was opened at path, and the files whose names belong to it. The error is one of reading dev.
func Look(ctx context.Context, path string, dev block.Device) (*Disk, error) {
	c, err := image.Probe(dev)
	if err != nil {
		return nil, err
	}
	d := &Disk{Path: path, Kind: c.Name, About: c.About, Bytes: dev.Size(), InUse: block.HasWriter(path), Beside: []Beside{}, Content: c}
	if c.Kind == image.Store {
		if d.Store, err = lookAtStore(ctx, path, dev, d.InUse); err != nil {
			return nil, err
		}
	} else {
		d.Beside = storesBeside(path, dev.Size())
	}
	if c.Name == "qcow2" {
		d.QCOW2 = lookAtImage(ctx, dev)
	}
	d.Merging = mergeInto(path)
	return d, nil
}

// lookAtStore reads the store on dev, sound or not.
func lookAtStore(ctx context.Context, path string, dev block.Device, written bool) (*Store, error) {
	r, err := Check(ctx, dev, check.Options{}, written)
	if err != nil {
		return nil, err
	}
	h := r.Header
	s := &Store{Header: Header{h.Valid, h.Version, h.ChunkSectors}, Problems: r.Found, Origin: originBeside(path), Report: r}
	if st, err := OpenStore(dev, written); err == nil {
		figures := Figures(st)
		s.Figures, s.Opens = &figures, !r.Has(check.ChunkNotBlocks)
	}
	return s, nil
}

// mergeInto reads the side file of an origin.
func mergeInto(path string) *Merging {
	half, err := merge.ReadSideFile(path)
	switch {
	case errors.Is(err, merge.ErrUnfinished):
		return &Merging{SideFile: merge.SideFilePath(path), Error: err.Error()}
	case half == nil: // or the origin can't be found again
		return nil
	}
	return &Merging{SideFile: half.Path(), COW: half.COW(), TakingBack: half.TakingBack(), InPart: half.InPart()}
}

// originBeside finds the file that a store's name is made from: disk.img for disk.img.cow or disk.cow.
func originBeside(path string) string {
	stem, ok := strings.CutSuffix(path, ".cow")
	if !ok {
		return ""
	}
	for _, p := range []string{stem, stem + ".img", stem + ".raw"} {
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() {
			return p
		}
	}
	return ""
}

// storesBeside finds stores that are named after the disk at path.
func storesBeside(path string, size int64) []Beside {
	found := []Beside{}
	names := []string{path + ".cow"}
	for _, end := range []string{".img", ".raw"} {
		if stem, ok := strings.CutSuffix(path, end); ok {
			names = append(names, stem+".cow")
		}
	}
	for _, name := range names {
		cow, err := block.Open(name, block.Options{ReadOnly: true, Lock: block.LockShared})
		if err != nil {
			continue
		}
		if h, err := store.ReadHeader(cow); err == nil && h.Magic == ondisk.Magic {
			found = append(found, lookBeside(name, cow, size))
		}
		cow.Close()
	}
	return found
}

func lookBeside(name string, cow block.Device, size int64) Beside {
	b := Beside{Path: name, State: "damaged", InUse: block.HasWriter(name)}
	if st, err := OpenStore(cow, b.InUse); err == nil {
		b.State, b.Exceptions = string(SnapshotStatus(st).State), st.Len()
		b.Fits = st.CheckOrigin(size) == nil
	}
	return b
}

// Check checks a store. With written, which says that it has a writer, problems are checked again: see [OpenStore].
func Check(ctx context.Context, cow block.Device, o check.Options, written bool) (*check.Report, error) {
	r, err := check.Run(ctx, cow, o)
	for range 4 {
		if err != nil || r.Clean() || !written {
			break
		}
		time.Sleep(20 * time.Millisecond)
		block.Refresh(cow) // it may have grown; after an error the old size is used
		r, err = check.Run(ctx, cow, o)
	}
	return r, err
}
