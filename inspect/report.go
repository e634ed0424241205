package inspect

import (
	"context"
	"encoding/json"
	"fmt"
	"math"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/source"
)

// An Inspection is all that is known of one disk.
type Inspection struct {
	*Disk
	Details []Detail `json:"details"`
	Table
	Next []Step `json:"next"`
}

// A Report is all that is known of disks that were examined together. As JSON, one of a single disk has the fields of its
// Inspection, and not "images".
type Report struct {
	Images       []*Inspection `json:"images"`
	VolumeGroups []Group       `json:"volume_groups"`
	Warnings     []string      `json:"warnings"`
}

// Single is the JSON of a Report of one disk.
type Single struct {
	Inspection
	VolumeGroups []Group  `json:"volume_groups"`
	Warnings     []string `json:"warnings"`
}

// MarshalJSON returns the JSON of r.
func (r *Report) MarshalJSON() ([]byte, error) {
	if len(r.Images) == 1 {
		return json.Marshal(Single{*r.Images[0], r.VolumeGroups, r.Warnings})
	}
	type several Report
	return json.Marshal((*several)(r))
}

// A Detail is a property of what was found, as text for a terminal.
type Detail struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

func printableDetails(found []image.Detail) []Detail {
	list := []Detail{}
	for _, d := range found {
		value := text.Name(d.Text)
		switch {
		case d.IsSize && d.Bytes > math.MaxInt64: // no size: the field is damaged
			value = fmt.Sprintf("%d bytes", d.Bytes)
		case d.IsSize:
			value = bytesize.Text(int64(d.Bytes))
		}
		list = append(list, Detail{d.Name, value})
	}
	return list
}

// Options say how disks are examined.
type Options struct {
	// Source says what is opened to read the disks, and further ones with physical volumes; ReadOnly, Lock and Raw are set by Disks.
	Source  source.Options
	Check   bool              // check the reference counts and tables of qcow2 images
	Command func(Step) string // spells an action as a command; nil: commands are empty
}

// Disks examines the disks that names stand for, and what they hold. An error names its disk.
func Disks(ctx context.Context, names []string, o Options) (*Report, error) {
	var all []*Inspection
	var disks []Image
	var place []int // of each of them in all
	var notes []string
	open := o.Source
	open.ReadOnly, open.Lock = true, block.LockShared
	for _, name := range names {
		// Of a whole disk the bytes themselves are looked at.
		whole := source.Path(name) == name
		open.Raw = whole
		dev, err := source.Open(name, open)
		if err != nil {
			return nil, block.WithPath(name, err)
		}
		defer dev.Close()
		look, err := Look(ctx, name, dev)
		if err != nil {
			return nil, block.WithPath(name, err)
		}
		inside := dev // the disk in an image
		if whole && look.Kind == source.QCOW2 {
			if o.Check {
				if err := look.QCOW2.CheckImage(ctx, dev); err != nil {
					return nil, block.WithPath(name, err)
				}
			}
			open.Raw = false
			if inside, err = source.Open(name, open); err != nil {
				notes = append(notes, fmt.Sprintf("what is in the image is not listed: %v", err))
			} else {
				defer inside.Close()
			}
		}
		if whole && err == nil && (look.Content.Role == image.RawDisk || look.Kind == source.QCOW2) {
			place = append(place, len(all))
			disks = append(disks, Image{Path: name, Dev: inside, InUse: look.InUse})
		}
		all = append(all, &Inspection{Disk: look, Details: printableDetails(look.Content.Details), Table: Table{Partitions: []Partition{}}})
	}
	parts := Parts(disks)
	for n, i := range place {
		all[i].Table = parts.Tables[n]
	}
	for _, i := range all {
		i.Next = i.Steps(parts.Groups)
		for n := range i.Next {
			if o.Command != nil {
				i.Next[n].Command = o.Command(i.Next[n])
			}
		}
	}
	return &Report{all, parts.Groups, append(parts.Warnings, notes...)}, nil
}

// Sound reports whether no check found a problem.
func (r *Report) Sound() bool {
	for _, i := range r.Images {
		if i.QCOW2 != nil && i.QCOW2.Check != nil && !i.QCOW2.Check.Sound() {
			return false
		}
	}
	return true
}

// Known reports whether the kind of every disk is known.
func (r *Report) Known() bool {
	for _, i := range r.Images {
		if i.Content.Kind == image.Unknown {
			return false
		}
	}
	return true
}
