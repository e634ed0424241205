package inspect

import (
	"errors"
	"fmt"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/source/partition"
)

// An Image is a disk that may have partitions and physical volumes.
type Image struct {
	Path  string
	Dev   block.Device // the disk in it
	InUse bool
}

// Contents are the parts of some disks.
type Contents struct {
	Tables   []Table // of each image
	Groups   []Group // by name
	Warnings []string
}

// A Table is the partition table of a disk.
type Table struct {
	Scheme     string      `json:"partition_table,omitempty"` // mbr or gpt; empty: none
	Partitions []Partition `json:"partitions"`                // by number
}

// A Partition is a part of a disk. Type and Name are as in the partition table.
type Partition struct {
	Address string `json:"address"`
	Number  int    `json:"number"`
	Start   int64  `json:"start_bytes"`
	Size    int64  `json:"size_bytes"`
	Type    string `json:"type"`
	Name    string `json:"name,omitempty"`
	Kind    string `json:"kind"`  // what it holds, a name of package image
	About   string `json:"about"` // the same in words
	Group   string `json:"volume_group,omitempty"`
}

// A Group is a volume group.
type Group struct {
	Name       string      `json:"name"`
	ID         string      `json:"uuid"`
	Seqno      int64       `json:"seqno"`
	ExtentSize int64       `json:"extent_bytes"`
	SystemID   string      `json:"system_id,omitempty"`
	Attributes []string    `json:"attributes"` // words that say that another host may use the group now
	PVs        []PV        `json:"physical_volumes"`
	Missing    []MissingPV `json:"missing"`
	Error      string      `json:"error,omitempty"` // why none of the volumes can be read
	Warnings   []string    `json:"warnings"`
	Volumes    []Volume    `json:"volumes"` // by name

	Images []string `json:"-"` // paths of the images that hold its physical volumes; the first is that of the addresses
}

// Writable reports whether a volume is of those that may be written: linear and striped ones, not read-only, of groups that no other
// host may use.
func (g Group) Writable(volume string) bool {
	return len(g.Attributes) == 0 && slices.ContainsFunc(g.Volumes, func(v Volume) bool {
		return v.Name == volume && (v.Type == "linear" || v.Type == "striped") && v.Readable && !v.ReadOnly
	})
}

// A PV is a physical volume that was found.
type PV struct {
	Address  string `json:"address"`
	ID       string `json:"uuid"`
	Size     int64  `json:"size_bytes"`
	Outdated bool   `json:"outdated,omitempty"`
}

// A MissingPV is a physical volume that a group lists and that can't be used.
type MissingPV struct {
	ID     string `json:"uuid"`
	Device string `json:"device"` // where it was last
	Reason string `json:"reason"`
}

// A Volume is a logical volume.
type Volume struct {
	Address  string `json:"address"`
	Name     string `json:"name"`
	ID       string `json:"uuid"`
	Type     string `json:"type"` // linear, striped, mirror, raid1, snapshot, or the word of the metadata
	Size     int64  `json:"size_bytes"`
	COWSize  int64  `json:"cow_bytes,omitempty"` // of a snapshot
	Origin   string `json:"origin"`              // of a snapshot
	Merging  bool   `json:"merging,omitempty"`   // a snapshot that is to be merged, or its origin
	Visible  bool   `json:"visible"`             // no part of another volume
	ReadOnly bool   `json:"read_only"`
	Readable bool   `json:"readable"`
	Reason   string `json:"reason"` // why not
	*Status         // of a snapshot whose store can be loaded

	Damaged bool `json:"-"` // a snapshot whose store can't be loaded
}

// Parts lists the partitions and volume groups of disks, which are read once. What can't be read is in the warnings, or in the
// reason of a volume.
func Parts(images []Image) *Contents {
	c := &Contents{Tables: make([]Table, len(images)), Groups: []Group{}, Warnings: []string{}}
	var disks []lvm.Disk
	for i, img := range images {
		c.Tables[i].Partitions = []Partition{}
		disks = append(disks, lvm.Disk{Name: img.Path, Dev: img.Dev})
	}
	set, err := lvm.Scan(disks, 0)
	if err != nil {
		c.Warnings = append(c.Warnings, fmt.Sprintf("partitions and volume groups are not listed: %v", err))
		return c
	}
	c.Warnings = append(c.Warnings, set.Warnings...)
	for i, t := range set.Tables {
		if t != nil {
			c.Tables[i] = c.table(images[i].Path, t, set)
		}
	}
	for _, g := range set.Groups {
		c.Groups = append(c.Groups, group(g, set, images))
	}
	return c
}

// table lists the partitions of a disk.
func (c *Contents) table(path string, t *partition.Table, set *lvm.Set) Table {
	out := Table{string(t.Scheme), []Partition{}}
	for _, p := range t.Partitions {
		part := Partition{Address: address.Address{Path: path, Partition: p.Number}.String(), Number: p.Number,
			Start: p.Start, Size: p.Size, Type: p.Type, Name: p.Name, Kind: "extended", About: "extended partition, which holds the logical ones"}
		if !p.Extended {
			dev, err := t.Open(p.Number)
			var found image.Content
			if err == nil {
				found, err = image.Probe(dev)
			}
			if err != nil {
				c.Warnings = append(c.Warnings, block.WithPath(part.Address, err).Error())
			}
			part.Kind, part.About = found.Name, found.About
		}
		for _, pv := range set.PVs {
			if pv.Disk == path && pv.Partition == p.Number && pv.Group != nil {
				part.Group = pv.Group.Name
			}
		}
		out.Partitions = append(out.Partitions, part)
	}
	return out
}

func group(g *lvm.Group, set *lvm.Set, images []Image) Group {
	out := Group{Name: g.Name, ID: g.ID, Seqno: g.Seqno, ExtentSize: g.ExtentSize, SystemID: g.SystemID,
		Attributes: append([]string{}, g.Attributes...), PVs: []PV{}, Missing: []MissingPV{}, Volumes: []Volume{}}
	inUse := false
	for _, pv := range set.PVs { // in the order of the images
		if pv.Group != g {
			continue
		}
		out.PVs = append(out.PVs, PV{pv.Place(), pv.ID, pv.Size, pv.Outdated})
		inUse = inUse || slices.ContainsFunc(images, func(img Image) bool { return img.Path == pv.Disk && img.InUse })
		if !slices.Contains(out.Images, pv.Disk) {
			out.Images = append(out.Images, pv.Disk)
		}
	}
	for _, m := range g.Missing {
		out.Missing = append(out.Missing, MissingPV(m))
	}
	if g.Err != nil {
		out.Error = g.Err.Error()
	}
	a := address.Address{Group: g.Name}
	if len(out.Images) > 0 {
		a.Path = out.Images[0]
	}
	if slices.ContainsFunc(set.Groups, func(o *lvm.Group) bool { return o != g && o.Name == g.Name }) {
		a.Group = g.ID
	}
	for _, v := range g.Volumes {
		a.Volume = v.Name
		out.Volumes = append(out.Volumes, volume(a, v, inUse))
	}
	out.Warnings = append([]string{}, g.Warnings...) // some are found as stores are read
	return out
}

func volume(a address.Address, v *lvm.Volume, inUse bool) Volume {
	out := Volume{Address: a.String(), Name: v.Name, ID: v.ID, Type: v.Type, Size: v.Size, COWSize: v.COWSize, Origin: v.Origin,
		Merging: v.Merging, Visible: v.Visible, ReadOnly: v.ReadOnly, Readable: v.Readable, Reason: v.Reason}
	if v.Origin == "" {
		return out
	}
	cow, err := v.Open(lvm.COW)
	if err != nil {
		return out
	}
	status, err := StatusOf(out.Address, cow, inUse)
	switch {
	case errors.Is(err, ondisk.ErrNoStore): // never used: it shows its origin
	case err != nil:
		out.Damaged = true
		if out.Readable {
			out.Readable, out.Reason = false, fmt.Sprintf("COW volume %q: %v", v.Name, err)
		}
	default:
		out.Status = &status
	}
	return out
}
