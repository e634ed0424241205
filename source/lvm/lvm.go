// Package lvm reads volume groups of LVM2 in disks and disk images, without device-mapper, root or activation. Each logical
// volume is a [block.Device]: linear, striped, mirror and raid1 volumes, thick snapshots as they appear when active, and
// the devices below them.
//
//	set, err := lvm.Scan([]lvm.Disk{{Name: "disk.img", Dev: disk}}, 0)
//	group, err := set.Group("vg")
//	volume, err := group.Volume("root")
//	dev, err := volume.Open(lvm.Active)
//
// # Guarantees
//
// Metadata is never written. A volume of which it is not certain which bytes it has is refused, with the reason; the rest of its
// group stays readable. Metadata is taken for hostile: memory and time are bounded by its length. Names in it
// hold the letters, digits and signs that LVM allows; other strings may hold anything, so quote them.
//
// Linear and striped volumes, origins below their snapshots and COW volumes can be written. Mirrors, views, what a pvmove
// moves, and groups that are exported, locked or shared can only be read. A write to an origin changes its snapshots unless they
// preserve what it overwrites: [Volume.OpenOrigin] returns them all. A group that is active on this host, which
// [Group.CheckInactive] finds out, must not be written to.
//
// The format, and what a reader refuses, is in docs/spec/lvm2.md.
package lvm

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/partition"
)

var (
	// ErrNotFound reports a group or a volume that is not there.
	ErrNotFound = errors.New("not found")
	// ErrAmbiguous reports a name that two groups have: choose by UUID.
	ErrAmbiguous = errors.New("ambiguous")
	// ErrNoSnapshot reports a volume that is no snapshot.
	ErrNoSnapshot = errors.New("no snapshot volume")
	// ErrUnreadable is wrapped by each reason why a volume can't be opened.
	ErrUnreadable = errors.New("can't be read")
)

// A Disk is a disk, or an image of one, that may hold physical volumes.
type Disk struct {
	Name string // for messages and lists
	Dev  block.Device
}

// A Set is what was found on some disks.
type Set struct {
	PVs    []*PV
	Groups []*Group // by name, then by UUID
	Tables []*partition.Table
	// Warnings are those about disks and physical volumes; groups have their own.
	Warnings []string
}

// A PV is a physical volume that was found.
type PV struct {
	ID        string // UUID
	Disk      string // name of the disk
	Partition int    // 0: the whole disk
	Size      int64  // bytes
	Group     *Group // that uses it; nil: none
	Outdated  bool   // Group does not list it any more

	dev   block.Device
	areas []span
	texts []*metadata
	inUse bool
}

// Place is the address of the disk or partition.
func (p *PV) Place() string {
	if p.Partition == 0 {
		return p.Disk
	}
	return fmt.Sprintf("%s#p%d", p.Disk, p.Partition)
}

// A Group is a volume group.
type Group struct {
	Name, ID   string
	Seqno      int64
	ExtentSize int64 // bytes
	SystemID   string
	LockType   string
	Exported   bool
	// Attributes are words that say that another host may use the group now: "exported", "foreign", "shared", …
	Attributes []string
	Missing    []MissingPV
	Volumes    []*Volume // by name; volumes that only join an origin and a COW volume are left out
	Err        error     // why none of the volumes can be read
	Warnings   []string

	meta *metadata
	pvs  map[string]*PV // by the name in the text
}

// A MissingPV is a physical volume that a group lists and that can't be used.
type MissingPV struct {
	ID     string
	Device string // where it was last; from the text: quote it
	Reason string
}

// Scan looks for physical volumes on the disks and in all their partitions, and reads the groups that they hold. sectorSize
// is that of the disks in bytes, 0: find out.
//
// The error is one of reading a disk. Damage is none: it is in the warnings, and in the errors of what it concerns.
// A disk that is there twice counts once.
func Scan(disks []Disk, sectorSize int) (*Set, error) {
	s := &Set{}
	for i, d := range disks {
		if slices.ContainsFunc(disks[:i], func(o Disk) bool { return block.Same(o.Dev, d.Dev) }) {
			s.Tables = append(s.Tables, nil)
			continue
		}
		if err := s.scanDisk(d, sectorSize); err != nil {
			return nil, block.WithPath(d.Name, err)
		}
	}
	s.makeGroups()
	return s, nil
}

// scanDisk finds the physical volumes of a disk.
func (s *Set) scanDisk(d Disk, sectorSize int) error {
	table, found, err := scanPartitions(d, sectorSize)
	if err != nil {
		return err
	}
	if len(found) == 0 && table != nil && table.Scheme == partition.MBR && sectorSize == 0 {
		other, more, err := scanPartitions(d, 4096)
		if err != nil {
			return err
		}
		if len(more) > 0 {
			table, found = other, more
			s.warn("%s: no physical volume in sectors of 512 bytes, so the partition table counts sectors of 4096", d.Name)
		}
	}
	s.Tables = append(s.Tables, table)
	if table != nil {
		for _, w := range table.Warnings {
			s.warn("%s: %s", d.Name, w)
		}
	}
	whole, err := s.readPV(d.Name, 0, d.Dev)
	if err != nil {
		return err
	}
	switch {
	case whole != nil && len(found) > 0:
		s.warn("%s: a label of a physical volume in front of the partitions is ignored", d.Name)
		whole = nil
	case whole != nil && table != nil && len(table.Partitions) > 0:
		s.warn("%s: a physical volume on a disk that has a partition table: LVM does not use it", d.Name)
	}
	for _, c := range found {
		pv, err := s.readPV(d.Name, c.number, c.dev)
		if err != nil {
			return err
		}
		s.PVs = append(s.PVs, pv)
	}
	if whole != nil {
		s.PVs = append(s.PVs, whole)
	}
	return nil
}

// A candidate is a partition with a label.
type candidate struct {
	number int
	dev    block.Device
}

// scanPartitions returns the partition table of a disk, nil without one, and the partitions with a label.
func scanPartitions(d Disk, sectorSize int) (*partition.Table, []candidate, error) {
	table, err := partition.Read(d.Dev, sectorSize)
	if errors.Is(err, partition.ErrNoTable) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var found []candidate
	for _, p := range table.Partitions {
		if p.Extended {
			continue
		}
		dev, err := table.Open(p.Number)
		if err != nil {
			return nil, nil, err
		}
		switch l, err := readLabel(dev); {
		case err != nil:
			return nil, nil, fmt.Errorf("partition %d: %w", p.Number, err)
		case l != nil:
			found = append(found, candidate{p.Number, dev})
		}
	}
	return table, found, nil
}

// readPV reads label and metadata of a physical volume; nil where there is no label.
func (s *Set) readPV(disk string, number int, dev block.Device) (*PV, error) {
	l, err := readLabel(dev)
	if l == nil || err != nil {
		return nil, err
	}
	pv := &PV{ID: l.id, Disk: disk, Partition: number, Size: dev.Size(), dev: dev, areas: l.areas, inUse: l.inUse}
	for _, w := range l.warnings {
		s.warn("%s: %s", pv.Place(), w)
	}
	if l.size > uint64(dev.Size()) {
		s.warn("%s: the physical volume had %d bytes, %d are there", pv.Place(), l.size, dev.Size())
	}
	for _, a := range l.areas {
		text, err := readArea(dev, a)
		var damage *badArea
		switch {
		case errors.As(err, &damage):
			s.warn("%s: the metadata area at byte %d is ignored: %v", pv.Place(), a.off, err)
			continue
		case err != nil:
			return nil, fmt.Errorf("%s: %w", pv.Place(), err)
		case text == nil:
			continue
		}
		m, err := s.readText(text)
		if err != nil {
			s.warn("%s: the text in the metadata area at byte %d is ignored: %v", pv.Place(), a.off, err)
			continue
		}
		pv.texts = append(pv.texts, m)
	}
	return pv, nil
}

// readText reads a text, or returns the result of one with the same bytes that was read before.
func (s *Set) readText(text []byte) (*metadata, error) {
	for _, pv := range s.PVs {
		for _, m := range pv.texts {
			if m.text == string(text) {
				return m, nil
			}
		}
	}
	return readMetadata(text)
}

// maxWarnings bounds the warnings of a set.
const maxWarnings = 1000

func (s *Set) warn(format string, args ...any) {
	if len(s.Warnings) < maxWarnings {
		s.Warnings = append(s.Warnings, fmt.Sprintf(format, args...))
	}
}

// makeGroups chooses the text of each group and matches its physical volumes (docs/spec/lvm2.md §6.3 to §6.5).
func (s *Set) makeGroups() {
	byID := map[string][]*metadata{}
	for _, pv := range s.PVs {
		for _, m := range pv.texts {
			if !slices.ContainsFunc(byID[m.id], func(o *metadata) bool { return o.text == m.text }) {
				byID[m.id] = append(byID[m.id], m)
			}
		}
	}
	for _, texts := range byID {
		s.Groups = append(s.Groups, newGroup(texts))
	}
	slices.SortFunc(s.Groups, func(a, b *Group) int {
		return strings.Compare(a.Name+"\x00"+a.ID, b.Name+"\x00"+b.ID)
	})
	for _, g := range s.Groups {
		s.matchPVs(g)
	}
	for _, g := range s.Groups {
		g.fill()
	}
	for _, pv := range s.PVs {
		if pv.Group == nil {
			state := "no volume group uses it"
			if pv.inUse {
				state = "its volume group was not found"
			}
			s.warn("%s: physical volume %s: %s", pv.Place(), pv.ID, state)
		}
	}
}

// newGroup returns the group of these texts, by the newest.
func newGroup(texts []*metadata) *Group {
	newest := slices.MaxFunc(texts, func(a, b *metadata) int { return int(min(1, max(-1, a.seqno-b.seqno))) })
	g := &Group{Name: newest.name, ID: newest.id, Seqno: newest.seqno, ExtentSize: newest.extent, SystemID: newest.systemID,
		LockType: newest.lockType, Exported: newest.exported, Attributes: slices.Clone(newest.attributes), Err: newest.err,
		meta: newest, pvs: map[string]*PV{}}
	if g.SystemID != "" {
		g.Attributes = append(g.Attributes, "foreign")
	}
	if g.LockType != "" && g.LockType != "none" && !slices.Contains(g.Attributes, "shared") {
		g.Attributes = append(g.Attributes, "shared")
	}
	for _, m := range texts {
		switch {
		case m == newest:
		case m.seqno == newest.seqno:
			g.Err = fmt.Errorf("two metadata texts of sequence number %d that differ: each of the physical volumes was written without the other; "+
				"read one of them alone", m.seqno)
		default:
			g.warn("metadata of sequence number %d is ignored, there is that of %d", m.seqno, newest.seqno)
		}
	}
	return g
}

func (g *Group) warn(format string, args ...any) {
	if len(g.Warnings) < maxWarnings {
		g.Warnings = append(g.Warnings, fmt.Sprintf(format, args...))
	}
}

// matchPVs finds the physical volumes of a group by their UUIDs.
func (s *Set) matchPVs(g *Group) {
	for _, text := range g.meta.pvs {
		var found []*PV
		for _, pv := range s.PVs {
			if pv.ID == text.id {
				found = append(found, pv)
			}
		}
		reason := ""
		switch {
		case len(found) == 0:
			reason = "not found"
		case len(found) > 1:
			var places []string
			for _, pv := range found {
				pv.Group = g
				places = append(places, pv.Place())
			}
			if g.Err == nil {
				g.Err = fmt.Errorf("physical volume %s is there more than once: %s", text.id, strings.Join(places, ", "))
			}
			continue
		case len(found[0].texts) > 0 && !slices.ContainsFunc(found[0].texts, func(m *metadata) bool { return m.id == g.ID }):
			reason = "it belongs to another volume group now"
		case found[0].Group != nil:
			reason = "two volume groups list it"
			g.warn("physical volume %s is listed by volume group %q too", text.id, found[0].Group.Name)
			if other := found[0].Group; other.Err == nil {
				other.Err = fmt.Errorf("physical volume %s is listed by volume group %q too", text.id, g.Name)
			}
		default:
			found[0].Group = g
			if reason = "it was changed while this one was missing"; !text.flagged {
				g.pvs[text.name] = found[0]
				continue
			}
		}
		g.Missing = append(g.Missing, MissingPV{text.id, text.device, reason})
	}
	for _, pv := range s.PVs {
		if pv.Group == nil && slices.ContainsFunc(pv.texts, func(m *metadata) bool { return m.id == g.ID }) &&
			!slices.ContainsFunc(g.meta.pvs, func(t *pvText) bool { return t.id == pv.ID }) {
			pv.Group = g
			if slices.ContainsFunc(pv.texts, func(m *metadata) bool { return m.id == g.ID && m.seqno == g.Seqno }) {
				continue // neither it nor the text that does not list it is older: newGroup has refused the group
			}
			pv.Outdated = true
			g.warn("%s: physical volume %s is outdated: the group does not list it any more", pv.Place(), pv.ID)
		}
	}
}

// Group returns the group of this name or UUID (with or without hyphens). The error wraps ErrNotFound or ErrAmbiguous.
func (s *Set) Group(name string) (*Group, error) {
	var found []*Group
	for _, g := range s.Groups {
		if g.ID == name || strings.ReplaceAll(g.ID, "-", "") == name {
			return g, nil
		}
		if g.Name == name {
			found = append(found, g)
		}
	}
	switch len(found) {
	case 0:
		var names []string
		for _, g := range s.Groups {
			names = append(names, fmt.Sprintf("%q", g.Name))
		}
		if names == nil {
			return nil, fmt.Errorf("volume group %q: %w: there is none", name, ErrNotFound)
		}
		return nil, fmt.Errorf("volume group %q: %w: there are %s", name, ErrNotFound, strings.Join(names, ", "))
	case 1:
		return found[0], nil
	}
	var ids []string
	for _, g := range found {
		ids = append(ids, g.ID)
	}
	return nil, fmt.Errorf("volume group %q is %w: choose one by its UUID: %s", name, ErrAmbiguous, strings.Join(ids, ", "))
}

// Volume returns the volume of this name. The error wraps ErrNotFound, or says why no volume of the group can be read.
func (g *Group) Volume(name string) (*Volume, error) {
	for _, v := range g.Volumes {
		if v.Name == name {
			return v, nil
		}
	}
	if g.Err != nil {
		return nil, fmt.Errorf("volume group %q %w: %w", g.Name, ErrUnreadable, g.Err)
	}
	return nil, fmt.Errorf("logical volume %q of volume group %q: %w", name, g.Name, ErrNotFound)
}
