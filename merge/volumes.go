package merge

import (
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/lvm"
)

// OfVolume returns what Offline needs to merge into a logical volume: the COW device of its snapshot of that name, nil where
// name is empty, and all its other snapshots. Nothing is written.
//
// It is refused where the volume or one of its snapshots can't be written, where another snapshot of it is to be merged or partly
// is, and where the snapshot was never used: then there is nothing to merge.
func OfVolume(o *lvm.Origin, name string) (cow block.Device, siblings []Sibling, err error) {
	if err := o.CheckWritable(); err != nil {
		return nil, nil, err
	}
	for _, s := range o.Snapshots {
		switch {
		case s.Name == name && s.Unused:
			return nil, nil, fmt.Errorf("snapshot %q was never used: there is nothing to merge", name)
		case s.Name == name:
			cow = s.COW
		case s.Merging:
			return nil, nil, fmt.Errorf("snapshot %q is to be merged into %q, or partly is: merge it first", s.Name, o.Name)
		default:
			siblings = append(siblings, Sibling{Name: s.Name, COW: s.COW, Size: s.Size, ChunkSectors: s.Chunk})
		}
	}
	return cow, siblings, nil
}
