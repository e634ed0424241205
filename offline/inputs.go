package offline

import (
	"errors"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/store"
)

// mergeInputs are the open devices of a merge.
type mergeInputs struct {
	origin, cow         block.Device
	originName, cowName string
	siblings            []merge.Sibling
	files               []string // that are open: of the origin first, then of COW devices
	closers
}

// openMerge opens what names stand for: ORIGIN and COW, or a snapshot volume.
func openMerge(names []string, o MergeOptions) (in *mergeInputs, err error) {
	opts := block.Options{ReadOnly: o.DryRun, Used: o.Force}
	a, err := address.Parse(names[0])
	if err != nil {
		return nil, err
	}
	in = &mergeInputs{originName: names[0], files: []string{a.Path}}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.Close())
		}
	}()
	if !a.Plain() {
		err = in.openPart(a, opts, len(names) == 1, o.PVs)
		if err == nil && !o.Force {
			err = merge.CheckFurther(o.PVs...)
		}
	} else if len(names) == 2 {
		if !o.DryRun && !source.IsFile(names[0]) { // before a server is waited for
			err = source.CheckWritable(names[0])
		}
		var origin, cow *source.Disk
		if err == nil {
			origin, cow, err = source.OpenPair(names[0], names[1], o.options())
		}
		if err == nil {
			in.origin, in.cow, in.closers = origin, cow, closers{cow, origin}
			in.cowName, in.files = names[1], append(in.files, names[1])
		}
	} else {
		err = fmt.Errorf("%s: COW is required: it is not an address of a snapshot volume", names[0])
	}
	if err == nil && !a.Plain() && len(names) == 2 {
		in.cowName = names[1]
		in.cow, err = in.openCOW(names[1], opts)
	}
	for _, path := range o.Siblings {
		if err != nil {
			break
		}
		var cow block.Device
		cow, err = in.openCOW(path, opts)
		in.siblings = append(in.siblings, merge.Sibling{Name: path, COW: cow})
	}
	return in, err
}

// openPart opens a partition or a logical volume as the origin, with its snapshots, one of which is to be merged or none.
func (in *mergeInputs) openPart(a address.Address, opts block.Options, snapshot bool, pvs []string) error {
	if err := source.CheckWritable(a.String()); err != nil {
		return err
	}
	var further []lvm.Disk
	for _, path := range pvs {
		pv, err := source.OpenWhole(path, opts)
		if err != nil {
			return err
		}
		in.closers, in.files = append(in.closers, pv), append(in.files, path)
		further = append(further, lvm.Disk{Name: path, Dev: pv})
	}
	d, err := address.OpenDisk(a, opts, "/sys", further...)
	if err != nil {
		return err
	}
	in.origin, in.closers = d.Dev, append(in.closers, d)
	switch {
	case snapshot && d.Snapshot == "":
		return fmt.Errorf("%s: COW is required: it is not a snapshot volume", a)
	case !snapshot && d.Snapshot != "":
		return fmt.Errorf("%s is a snapshot volume: it is merged without COW, or name its origin %q", a, d.Volume.Name)
	case d.Volume == nil:
		return block.WithPath(a.String(), cowfile.OriginOptions{}.Check(d.Dev))
	}
	in.originName, in.cowName = a.Beside(d.Volume.Name, "").String(), a.String()
	in.cow, in.siblings, err = merge.OfVolume(d.Volume, d.Snapshot)
	return block.WithPath(a.String(), err)
}

// openCOW opens a COW file.
func (in *mergeInputs) openCOW(path string, opts block.Options) (block.Device, error) {
	for _, file := range in.files {
		if err := source.CheckDifferent(file, path); err != nil {
			return nil, err
		}
	}
	cow, err := source.OpenWhole(path, opts)
	if err != nil {
		return nil, err
	}
	in.closers, in.files = append(in.closers, cow), append(in.files, path)
	if err := cowfile.CheckStore(path, cow); err != nil {
		return nil, err
	}
	format, err := store.OriginFormat(cow)
	if err == nil && format != ondisk.RawFormat {
		err = fmt.Errorf("the store is for an origin of format %s, which is never merged into", format)
	}
	return cow, block.WithPath(path, err)
}
