package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/store"
)

// mergeInputs are the open devices of an offline merge.
type mergeInputs struct {
	origin, cow         block.Device
	originName, cowName string
	siblings            []merge.Sibling
	files               []string // that are open: of the origin first, then of COW devices
	closers
}

// open opens what the arguments of an offline merge name: ORIGIN and COW, or a snapshot volume.
func (o *offlineMerge) open(args []string) (in *mergeInputs, err error) {
	opts := block.Options{ReadOnly: o.dryRun, Used: o.force}
	a, err := address.Parse(args[0])
	if err != nil {
		return nil, err
	}
	in = &mergeInputs{originName: args[0], files: []string{a.Path}}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.Close())
		}
	}()
	if !a.Plain() {
		err = in.openPart(a, opts, len(args) == 1, o.disk.pvs)
		if err == nil && !o.force {
			err = merge.CheckFurther(o.disk.pvs...)
		}
	} else if len(args) == 2 {
		var both io.Closer
		if in.origin, in.cow, both, err = o.disk.openPair(args[0], args[1], opts); err == nil {
			in.closers, in.cowName, in.files = closers{both}, args[1], append(in.files, args[1])
		}
	} else {
		err = fmt.Errorf("%s: COW is required: it is not an address of a snapshot volume", args[0])
	}
	if err == nil && !a.Plain() && len(args) == 2 {
		in.cowName = args[1]
		in.cow, err = in.openCOW(args[1], opts)
	}
	for _, path := range o.siblings {
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
	var further []lvm.Disk
	for _, path := range pvs {
		pv, err := openDevice(path, opts)
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
		return checkRawDisk(a.String(), d.Dev, false)
	}
	in.originName, in.cowName = a.Beside(d.Volume.Name, "").String(), a.String()
	in.cow, in.siblings, err = merge.OfVolume(d.Volume, d.Snapshot)
	return about(a.String(), err)
}

// openCOW opens a COW file.
func (in *mergeInputs) openCOW(path string, opts block.Options) (block.Device, error) {
	for _, file := range in.files {
		if err := checkDifferent(file, path); err != nil {
			return nil, err
		}
	}
	cow, err := openDevice(path, opts)
	if err != nil {
		return nil, err
	}
	in.closers, in.files = append(in.closers, cow), append(in.files, path)
	if err := checkStore(path, cow); err != nil {
		return nil, err
	}
	format, err := store.OriginFormat(cow)
	if err == nil && format != ondisk.RawFormat {
		err = fmt.Errorf("the store is for an origin of format %s, which is never merged into", format)
	}
	return cow, about(path, err)
}

// planSiblings notes what the siblings have to preserve, and which other snapshots of the origin may be there. The undo store
// has what is overwritten.
func (in *mergeInputs) planSiblings(undo string, res *mergeResult, work merge.Work) error {
	plan, err := merge.PlanSiblings(in.origin, in.cow, in.siblings)
	if err != nil {
		return about(in.cowName, err)
	}
	for _, s := range plan {
		res.Siblings = append(res.Siblings, mergeSibling{COW: s.Name, Invalid: s.Invalid, Chunks: s.Chunks, Free: s.Free})
	}
	if work.Chunks == 0 {
		return nil
	}
	folders := make([]string, len(in.files))
	for i, file := range in.files {
		folders[i] = filepath.Dir(file)
	}
	kept, err := os.Stat(undo)
	for _, path := range merge.VisibleSiblings(in.origin, in.cow, folders, in.siblings...) {
		if other, statErr := os.Stat(path); err != nil || statErr != nil || !os.SameFile(kept, other) {
			res.Others = append(res.Others, path)
		}
	}
	return nil
}

// warnOfOthers prints a warning about other snapshots of the origin that may be there. JSON has them in a field.
func (in *mergeInputs) warnOfOthers(c *cobra.Command, res *mergeResult, asJSON bool) {
	if len(res.Others) > 0 && !asJSON {
		fmt.Fprintf(c.ErrOrStderr(), "dmsnap: warning: if they are snapshots of %s, these are changed by the merge: %s; --sibling COW preserves one\n",
			in.originName, strings.Join(res.Others, ", "))
	}
}
