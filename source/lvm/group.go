package lvm

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A metadata is one metadata text, read.
type metadata struct {
	name, id   string
	seqno      int64
	systemID   string
	lockType   string
	exported   bool
	locked     bool  // by WRITE_LOCKED
	extent     int64 // bytes
	pvs        []*pvText
	byPV       map[string]*pvText
	volumes    []*volume // in the order of the text, those without data included
	byName     map[string]*volume
	err        error // why no volume can be read
	text       string
	attributes []string // words that say whose the group is
}

// A pvText is a physical volume as the text describes it.
type pvText struct {
	name, id, device string
	flagged          bool  // MISSING
	start            int64 // sectors
	count            int64 // extents
	err              error
}

// A volume is a logical volume of a text. Volumes that join a COW volume and its origin are among them.
type volume struct {
	name, id                          string
	visible, writable, locked, pvmove bool
	extents                           int64 // sum of the segments
	segments                          []segment
	err                               error            // why it can't be read
	joins                             *snapshotSegment // not nil: it has no data
	snapshot                          *snapshotSegment // not nil: it is the COW volume of this snapshot
	snapshots                         []*snapshotSegment
	resolution                        *resolution
	resolving                         bool
	part                              bool // of another volume
}

// A segment is a run of extents of a volume.
type segment struct {
	start, count int64
	kind         string
	*section
}

// A snapshotSegment is the segment of type snapshot, without data: it joins origin and COW volume.
type snapshotSegment struct {
	name        string
	origin, cow *volume
	merging     bool
	extents     int64
	chunk       int64 // sectors, for display
}

var (
	groupStatus = []string{"RESIZEABLE", "READ", "WRITE", "EXPORTED", "CLUSTERED", "SHARED", "PARTIAL"}
	pvStatus    = []string{"ALLOCATABLE", "EXPORTED"}
	lvStatus    = []string{"READ", "WRITE", "VISIBLE", "LOCKED", "PVMOVE", "NOTSYNCED", "REBUILD", "WRITEMOSTLY", "FIXED_MINOR"}
)

// status returns the status words of an object, of which each must be known: an unknown one may change what its bytes mean.
func status(s *section, known []string) ([]string, error) {
	words, err := s.words("status")
	for _, w := range words {
		if !slices.Contains(known, w) {
			return nil, fmt.Errorf("unknown word %.40q in status", w)
		}
	}
	return words, err
}

// readMetadata reads a text of a group (docs/spec/lvm2.md §5.3, §6). An error means that the text can't be used; what is wrong with
// single objects is noted in them.
func readMetadata(text []byte) (*metadata, error) {
	top, err := parse(text)
	if err != nil {
		return nil, err
	}
	if contents, _, err := top.text("contents"); err != nil || contents != "Text Format Volume Group" {
		return nil, fmt.Errorf("contents is not %q", "Text Format Volume Group")
	}
	if _, err := top.need("version", 1, 1); err != nil {
		return nil, err
	}
	m := &metadata{text: string(text), byPV: map[string]*pvText{}, byName: map[string]*volume{}}
	var vg *section
	for _, name := range top.names {
		if s, is := top.values[name].(*section); is {
			if vg != nil {
				return nil, fmt.Errorf("two sections at the top: %.40q and %.40q", m.name, name)
			}
			m.name, vg = name, s
		}
	}
	if vg == nil {
		return nil, fmt.Errorf("no section of a volume group")
	}
	if err := checkName(m.name); err != nil {
		return nil, err
	}
	var ok bool
	if m.id, ok, err = vg.text("id"); err != nil || !ok || !isID(m.id) {
		return nil, fmt.Errorf("volume group %q: malformed UUID %.60q", m.name, m.id)
	}
	if m.seqno, err = vg.need("seqno", 0, math.MaxInt64); err != nil {
		return nil, fmt.Errorf("volume group %q: %w", m.name, err)
	}
	m.err = m.read(vg)
	return m, nil
}

// read reads the section of the group. The error is one of the whole group.
func (m *metadata) read(vg *section) error {
	if format, ok, err := vg.text("format"); err != nil || ok && format != "lvm2" {
		return fmt.Errorf("format is not \"lvm2\"")
	}
	words, err := status(vg, groupStatus)
	if err != nil {
		return err
	}
	flags, err := vg.words("flags")
	if err != nil {
		return err
	}
	m.exported = slices.Contains(words, "EXPORTED")
	m.locked = slices.Contains(flags, "WRITE_LOCKED")
	for _, w := range []string{"EXPORTED", "CLUSTERED", "SHARED", "PARTIAL"} {
		if slices.Contains(words, w) {
			m.attributes = append(m.attributes, strings.ToLower(w))
		}
	}
	if m.systemID, _, err = vg.text("system_id"); err != nil {
		return err
	}
	if m.lockType, _, err = vg.text("lock_type"); err != nil {
		return err
	}
	sectors, err := vg.need("extent_size", 1, math.MaxUint32)
	if err != nil {
		return err
	}
	m.extent = sectors * sectorSize
	pvs, _, err := vg.sub("physical_volumes")
	if err != nil {
		return err
	}
	if err := m.readPVs(pvs); err != nil {
		return err
	}
	lvs, _, err := vg.sub("logical_volumes")
	if err != nil {
		return err
	}
	return m.readVolumes(lvs)
}

func (m *metadata) readPVs(s *section) error {
	if s == nil {
		return nil
	}
	ids := map[string]bool{}
	for _, name := range s.names {
		sub, is := s.values[name].(*section)
		if !is {
			continue
		}
		pv := &pvText{name: name}
		var err error
		if pv.id, _, err = sub.text("id"); err != nil || !isID(pv.id) {
			return fmt.Errorf("physical volume %q: malformed UUID %.60q", name, pv.id)
		}
		if ids[pv.id] {
			return fmt.Errorf("physical volume %s is listed twice", pv.id)
		}
		ids[pv.id] = true
		pv.err = pv.read(sub)
		m.pvs = append(m.pvs, pv)
		m.byPV[name] = pv
	}
	return nil
}

func (pv *pvText) read(s *section) (err error) {
	if _, err = status(s, pvStatus); err != nil {
		return err
	}
	flags, err := s.words("flags")
	if err != nil {
		return err
	}
	pv.flagged = slices.Contains(flags, "MISSING")
	if pv.device, _, err = s.text("device"); err != nil {
		return err
	}
	if pv.start, err = s.need("pe_start", 0, math.MaxInt64/sectorSize); err != nil {
		return err
	}
	pv.count, err = s.need("pe_count", 0, math.MaxInt64)
	return err
}

func (m *metadata) readVolumes(s *section) error {
	if s == nil {
		return nil
	}
	for _, name := range s.names {
		sub, is := s.values[name].(*section)
		if !is {
			continue
		}
		v := &volume{name: name}
		v.err = v.read(sub, m.extent)
		m.volumes = append(m.volumes, v)
		m.byName[name] = v
	}
	for _, v := range m.volumes {
		for _, seg := range v.segments {
			for _, key := range []string{"stripes", "mirrors"} {
				if _, there := seg.values[key]; !there {
					continue
				}
				if _, err := places(seg, key); err != nil {
					return fmt.Errorf("volume %q: %w", v.name, err)
				}
			}
			if seg.kind == "snapshot" {
				if err := m.readSnapshotLink(v, seg); err != nil {
					return fmt.Errorf("snapshot %q: %w", v.name, err)
				}
			}
		}
	}
	return m.checkSnapshotLinks()
}

// read reads a volume and its segments. The error is that of the volume alone.
func (v *volume) read(s *section, extent int64) error {
	if err := checkName(v.name); err != nil {
		return err
	}
	var problem error
	note := func(err error) {
		if problem == nil {
			problem = err
		}
	}
	var err error
	if v.id, _, err = s.text("id"); err != nil || !isID(v.id) {
		note(fmt.Errorf("malformed UUID %.60q", v.id))
	}
	words, err := status(s, lvStatus)
	note(err)
	v.visible = slices.Contains(words, "VISIBLE")
	v.writable = slices.Contains(words, "WRITE")
	v.locked = slices.Contains(words, "LOCKED")
	v.pvmove = slices.Contains(words, "PVMOVE")
	flags, err := s.words("flags")
	note(err)
	for _, w := range flags {
		if strings.HasPrefix(w, "RESHAPE") {
			note(fmt.Errorf("flag %.40q: it is being reshaped", w))
		}
	}
	for _, name := range s.names {
		sub, is := s.values[name].(*section)
		if !is {
			continue
		}
		if !strings.HasPrefix(name, "segment") {
			note(fmt.Errorf("unknown section %.40q", name))
			continue
		}
		seg := segment{section: sub}
		if seg.start, err = sub.need("start_extent", 0, math.MaxInt64); err != nil {
			note(fmt.Errorf("%.40s: %w", name, err))
		}
		if seg.count, err = sub.need("extent_count", 1, math.MaxInt64); err != nil {
			note(fmt.Errorf("%.40s: %w", name, err))
		}
		if seg.kind, _, err = sub.text("type"); err != nil {
			note(fmt.Errorf("%.40s: %w", name, err))
		}
		v.segments = append(v.segments, seg)
	}
	if n, err := s.need("segment_count", 1, math.MaxInt64); err != nil {
		note(err)
	} else if n != int64(len(v.segments)) {
		note(fmt.Errorf("segment_count is %d, and there are %d segments", n, len(v.segments)))
	}
	slices.SortStableFunc(v.segments, func(a, b segment) int {
		if a.start < b.start {
			return -1
		}
		return int(min(1, a.start-b.start))
	})
	for _, seg := range v.segments {
		if seg.start != v.extents {
			note(fmt.Errorf("a segment starts at extent %d, and the one in front of it ends at %d", seg.start, v.extents))
		}
		if seg.count > math.MaxInt64/extent-v.extents {
			note(fmt.Errorf("a segment of %d extents: the volume is too long", seg.count))
			break
		}
		v.extents += seg.count
	}
	return problem
}

// readSnapshotLink reads the segment of a volume that joins an origin and a COW volume (docs/spec/lvm2.md §8). What is wrong here
// makes it uncertain what other volumes show: the error is one of the whole group.
func (m *metadata) readSnapshotLink(v *volume, seg segment) error {
	t := &snapshotSegment{name: v.name, extents: seg.count}
	v.joins = t
	if len(v.segments) != 1 {
		return fmt.Errorf("%d segments", len(v.segments))
	}
	origin, _, err := seg.text("origin")
	if err != nil {
		return err
	}
	cow, hasCOW, err := seg.text("cow_store")
	if err != nil {
		return err
	}
	merging, hasMerging, err := seg.text("merging_store")
	if err != nil {
		return err
	}
	if hasCOW == hasMerging {
		return fmt.Errorf("one of cow_store and merging_store must be there")
	}
	t.merging = hasMerging
	t.chunk, _, _ = seg.number("chunk_size") // for display: the header counts
	if t.origin = m.byName[origin]; t.origin == nil {
		return fmt.Errorf("its origin %.140q does not exist", origin)
	}
	if t.cow = m.byName[cow+merging]; t.cow == nil {
		return fmt.Errorf("its COW volume %.140q does not exist", cow+merging)
	}
	if t.origin == t.cow {
		return fmt.Errorf("%q is its origin and its COW volume", t.cow.name)
	}
	if other := t.cow.snapshot; other != nil {
		return fmt.Errorf("its COW volume %q is that of %q too", t.cow.name, other.name)
	}
	t.cow.snapshot = t
	t.origin.snapshots = append(t.origin.snapshots, t)
	return nil
}

// checkSnapshotLinks refuses snapshots of snapshots, and two merges into one origin.
func (m *metadata) checkSnapshotLinks() error {
	for _, v := range m.volumes {
		t := v.joins
		if t == nil {
			continue
		}
		for _, part := range []*volume{t.origin, t.cow} {
			if part.joins != nil {
				return fmt.Errorf("snapshot %q: %q, which it names, has no data", t.name, part.name)
			}
		}
		if t.origin.snapshot != nil {
			return fmt.Errorf("snapshot %q: its origin %q is the COW volume of a snapshot", t.name, t.origin.name)
		}
		if t.merging && t.origin.merging() != t {
			return fmt.Errorf("two snapshots are to be merged into %q", t.origin.name)
		}
	}
	return nil
}

// merging returns the first snapshot that is to be merged into v.
func (v *volume) merging() *snapshotSegment {
	for _, t := range v.snapshots {
		if t.merging {
			return t
		}
	}
	return nil
}

// checkName refuses names that LVM does not allow. The text allows no other characters than those of isName.
func checkName(name string) error {
	if len(name) > maxName || name == "." || name == ".." || strings.HasPrefix(name, "-") {
		return fmt.Errorf("malformed name %.140q", name)
	}
	return nil
}
