package lvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/mapped"
)

// maxLevels bounds how volumes refer to volumes.
const maxLevels = 8

// A resolution is what a volume's own segments come to.
type resolution struct {
	dev      *mapped.Device // nil: err says why
	writable bool           // each byte is in one place
	levels   int
	err      error
}

// resolve maps the bytes of a volume, each volume once (docs/spec/lvm2.md §7). level is 0 for a volume that was asked for.
func (g *Group) resolve(v *volume, level int) *resolution {
	switch {
	case v.resolution != nil:
		return v.resolution
	case v.resolving:
		return &resolution{err: fmt.Errorf("%q refers to itself", v.name)}
	case level > maxLevels:
		return &resolution{err: fmt.Errorf("volumes refer to volumes in more than %d levels", maxLevels)}
	}
	v.resolving = true
	// The permission of a snapshot is that of what it shows: the kernel writes to the COW volume all the same.
	r := &resolution{writable: (v.writable || v.snapshot != nil) && !v.locked && !v.pvmove, levels: 1}
	r.err = v.err
	if r.err == nil && v.joins != nil {
		r.err = fmt.Errorf("%q has no data", v.name)
	}
	var targets []mapped.Target
	for _, seg := range v.segments {
		if r.err != nil {
			break
		}
		var t mapped.Target
		if t, r.err = g.target(v, seg, r, level); r.err == nil {
			targets = append(targets, t)
		}
	}
	if r.err == nil && r.levels > maxLevels {
		r.err = fmt.Errorf("volumes refer to volumes in more than %d levels", maxLevels)
	}
	if r.err == nil {
		r.dev, r.err = mapped.New(g.identity(v, targets), targets)
	}
	if r.err == nil && !r.writable {
		r.dev = r.dev.ReadOnly()
	}
	v.resolving = false
	v.resolution = r
	return r
}

// identity is the identity of a volume's device: its ids, and a disk below, so that a clone of the disk is another one.
func (g *Group) identity(v *volume, targets []mapped.Target) string {
	for _, t := range targets {
		for _, a := range t.Areas {
			return fmt.Sprintf("lvm %s %s on %s", g.ID, v.id, block.Identity(a.Dev))
		}
	}
	return ""
}

// target maps a segment of v. What it finds out about v goes into r.
func (g *Group) target(v *volume, seg segment, r *resolution, level int) (mapped.Target, error) {
	t := mapped.Target{Length: seg.count * g.meta.extent}
	var err error
	switch kind := seg.kind; {
	case kind == "striped" || kind == "linear":
		err = g.striped(&t, seg, r, level)
	case kind == "zero":
		r.writable = false
	case kind == "error":
		err = errors.New("a segment of type error has no data")
	case kind == "mirror" && v.pvmove:
		err = g.moved(&t, seg, r, level)
	case kind == "mirror":
		err = g.mirror(&t, seg, r, level)
	case kind == "raid1":
		err = g.raid1(&t, v, seg, r, level)
	default:
		err = fmt.Errorf("segments of type %.40q are not supported", kind)
	}
	return t, err
}

// A place is an entry of a list of stripes or mirrors.
type place struct {
	name   string
	extent int64
}

// places reads a list of names and extents.
func places(seg segment, key string) ([]place, error) {
	list, _, err := seg.list(key)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 || len(list)%2 != 0 {
		return nil, fmt.Errorf("%s: %d values, must be pairs of a name and an extent", key, len(list))
	}
	var all []place
	for i := 0; i < len(list); i += 2 {
		name, isName := list[i].(string)
		extent, isNumber := list[i+1].(int64)
		if !isName || !isNumber || extent < 0 {
			return nil, fmt.Errorf("%s: values must be pairs of a name and an extent", key)
		}
		all = append(all, place{name, extent})
	}
	return all, nil
}

// area returns the place of n bytes: of a physical volume, else of a volume.
func (g *Group) area(p place, n int64, r *resolution, level int) (mapped.Area, error) {
	if p.extent > (math.MaxInt64-n)/g.meta.extent {
		return mapped.Area{}, fmt.Errorf("extent %d of %q is out of range", p.extent, p.name)
	}
	off := p.extent * g.meta.extent
	if text := g.meta.byPV[p.name]; text != nil {
		pv := g.pvs[text.name]
		switch {
		case text.err != nil:
			return mapped.Area{}, fmt.Errorf("physical volume %s: %w", text.id, text.err)
		case pv == nil:
			return mapped.Area{}, fmt.Errorf("physical volume %s, last at %q, is missing", text.id, text.device)
		case n/g.meta.extent > text.count || p.extent > text.count-n/g.meta.extent:
			return mapped.Area{}, fmt.Errorf("%d extents from extent %d are behind the end of physical volume %s, which has %d",
				n/g.meta.extent, p.extent, text.id, text.count)
		case text.start*sectorSize > pv.dev.Size()-n || off > pv.dev.Size()-n-text.start*sectorSize:
			return mapped.Area{}, fmt.Errorf("%d bytes from extent %d are behind the end of %s, which has %d bytes: was it cut?",
				n, p.extent, pv.Place(), pv.dev.Size())
		}
		off += text.start * sectorSize
		if pv.holdsMetadata(off, n) {
			r.writable = false
		}
		return mapped.Area{Dev: pv.dev, Off: off}, nil
	}
	sub := g.meta.byName[p.name]
	if sub == nil {
		return mapped.Area{}, fmt.Errorf("%.140q is neither a physical nor a logical volume", p.name)
	}
	sub.part = true
	under := g.resolve(sub, level+1)
	if under.err != nil {
		return mapped.Area{}, fmt.Errorf("volume %q: %w", sub.name, under.err)
	}
	if n > under.dev.Size() || off > under.dev.Size()-n {
		return mapped.Area{}, fmt.Errorf("%d bytes from extent %d are behind the end of volume %q", n, p.extent, sub.name)
	}
	r.levels = max(r.levels, under.levels+1)
	r.writable = r.writable && under.writable
	return mapped.Area{Dev: under.dev, Off: off}, nil
}

// holdsMetadata reports whether a range shares bytes with the labels or the metadata areas.
func (p *PV) holdsMetadata(off, n int64) bool {
	for _, s := range append([]span{{0, labelSectors * sectorSize}}, p.areas...) {
		if uint64(off+n) > s.off && (s.size > math.MaxUint64-s.off || uint64(off) < s.off+s.size) {
			return true
		}
	}
	return false
}

// striped maps a linear or striped segment (docs/spec/lvm2.md §7.2).
func (g *Group) striped(t *mapped.Target, seg segment, r *resolution, level int) error {
	stripes, err := places(seg, "stripes")
	if err != nil {
		return err
	}
	k, ok, err := seg.number("stripe_count")
	if err != nil || !ok || k != int64(len(stripes)) {
		return fmt.Errorf("stripe_count is %d, and stripes has %d", k, len(stripes))
	}
	if k > 1 {
		size, err := seg.need("stripe_size", 1, math.MaxUint32)
		if err != nil {
			return err
		}
		if size&(size-1) != 0 {
			return fmt.Errorf("stripe_size is %d, must be a power of two", size)
		}
		if seg.count%k != 0 {
			return fmt.Errorf("%d extents can't be divided into %d stripes", seg.count, k)
		}
		t.Stripe = size * sectorSize
	}
	for _, p := range stripes {
		a, err := g.area(p, t.Length/k, r, level)
		if err != nil {
			return err
		}
		t.Areas = append(t.Areas, a)
	}
	return nil
}

// moved maps a segment of a pvmove: the new place where it was moved, else the old one (docs/spec/lvm2.md §7.6).
func (g *Group) moved(t *mapped.Target, seg segment, r *resolution, level int) error {
	legs, err := places(seg, "mirrors")
	if err != nil {
		return err
	}
	if len(legs) != 2 {
		return fmt.Errorf("a pvmove with %d places", len(legs))
	}
	done, err := seg.need("extents_moved", 0, math.MaxInt64)
	if err != nil {
		return err
	}
	leg := legs[0]
	switch done {
	case 0:
	case seg.count:
		leg = legs[1]
	default:
		return fmt.Errorf("extents_moved is %d of %d: it is not known which place holds the data", done, seg.count)
	}
	a, err := g.area(leg, t.Length, r, level)
	t.Areas = []mapped.Area{a}
	return err
}

// mirror maps a segment of the old kind of mirror to its first leg (docs/spec/lvm2.md §7.3).
func (g *Group) mirror(t *mapped.Target, seg segment, r *resolution, level int) error {
	legs, err := places(seg, "mirrors")
	if err != nil {
		return err
	}
	if n, ok, err := seg.number("mirror_count"); err != nil || !ok || n != int64(len(legs)) {
		return fmt.Errorf("mirror_count is %d, and mirrors has %d", n, len(legs))
	}
	r.writable = false
	a, err := g.area(legs[0], t.Length, r, level)
	if err != nil {
		return fmt.Errorf("the first leg of the mirror: %w", err)
	}
	t.Areas = []mapped.Area{a}
	return nil
}

// A leg is one of a raid1.
type leg struct {
	area                     mapped.Area
	err                      error // why it can't be used
	position                 uint32
	events, failed, recovery uint64
}

const raidMagic = "DmRd"

// raid1 maps a segment to the lowest leg that is good by the superblocks (docs/spec/lvm2.md §7.4).
func (g *Group) raid1(t *mapped.Target, v *volume, seg segment, r *resolution, level int) error {
	if len(v.segments) != 1 {
		return fmt.Errorf("a raid1 of %d segments", len(v.segments))
	}
	if _, there := seg.values["data_offset"]; there {
		return errors.New("a raid1 with data_offset is not supported")
	}
	names, err := seg.words("raids")
	if err != nil {
		return err
	}
	count, ok, err := seg.number("device_count")
	if err != nil || !ok || len(names) == 0 || len(names)%2 != 0 || count != int64(len(names)/2) || count > 64 {
		return fmt.Errorf("device_count is %d, and raids has %d names", count, len(names))
	}
	r.writable = false
	var legs []*leg
	newest := uint64(0)
	for i := range int(count) {
		l := g.readLeg(names[2*i], names[2*i+1], t.Length, r, level)
		legs = append(legs, l)
		if l.err == nil {
			newest = max(newest, l.events)
		}
	}
	failed := uint64(0)
	for _, l := range legs {
		if l.err == nil && l.events == newest {
			failed |= l.failed
		}
	}
	var reasons []string
	for i, l := range legs {
		switch {
		case l.err != nil:
			reasons = append(reasons, fmt.Sprintf("leg %d: %v", i, l.err))
		case l.events != newest:
			reasons = append(reasons, fmt.Sprintf("leg %d is old (%d events of %d)", i, l.events, newest))
		case failed>>i&1 != 0:
			reasons = append(reasons, fmt.Sprintf("leg %d has failed", i))
		case int(l.position) != i:
			reasons = append(reasons, fmt.Sprintf("leg %d is marked as leg %d", i, l.position))
		case l.recovery < uint64(t.Length/sectorSize):
			reasons = append(reasons, fmt.Sprintf("leg %d is filled up to sector %d", i, l.recovery))
		default:
			t.Areas = []mapped.Area{l.area}
			return nil
		}
	}
	return fmt.Errorf("raid1 without a good leg: %s", strings.Join(reasons, "; "))
}

// readLeg reads the superblock of a leg.
func (g *Group) readLeg(meta, image string, n int64, r *resolution, level int) *leg {
	l := &leg{}
	var a mapped.Area
	if a, l.err = g.area(place{meta, 0}, g.meta.extent, r, level); l.err != nil {
		return l
	}
	var sb [sectorSize]byte
	if _, l.err = a.Dev.ReadAt(sb[:], a.Off); l.err != nil {
		return l
	}
	if string(sb[:4]) != raidMagic {
		l.err = errors.New("no superblock")
		return l
	}
	le := binary.LittleEndian
	l.position, l.events, l.failed, l.recovery = le.Uint32(sb[12:]), le.Uint64(sb[16:]), le.Uint64(sb[24:]), le.Uint64(sb[32:])
	l.area, l.err = g.area(place{image, 0}, n, r, level)
	return l
}

// A use is a run of extents of a physical volume that a volume uses.
type use struct {
	start, count int64
	volume       *volume
}

// refuseOverlaps refuses volumes that share extents: it is not certain whose data they hold.
func (m *metadata) refuseOverlaps() {
	uses := map[*pvText][]use{}
	for _, v := range m.volumes {
		for _, seg := range v.segments {
			list, k := "stripes", int64(1)
			if seg.kind == "mirror" {
				list = "mirrors"
			}
			all, err := places(seg, list)
			if err != nil {
				continue // refused when it is resolved
			}
			if list == "stripes" {
				k = int64(len(all))
			}
			for _, p := range all {
				if pv := m.byPV[p.name]; pv != nil && p.extent <= math.MaxInt64-seg.count {
					uses[pv] = append(uses[pv], use{p.extent, seg.count / k, v})
				}
			}
		}
	}
	for _, list := range uses {
		slices.SortFunc(list, func(a, b use) int {
			if a.start < b.start {
				return -1
			}
			return int(min(1, a.start-b.start))
		})
		last := use{volume: nil}
		for _, u := range list {
			if last.volume != nil && u.start < last.start+last.count {
				refuseOverlap(u.volume, last.volume)
				refuseOverlap(last.volume, u.volume)
			}
			if last.volume == nil || u.start+u.count > last.start+last.count {
				last = u
			}
		}
	}
}

func refuseOverlap(v, other *volume) {
	if v.err == nil {
		v.err = fmt.Errorf("it shares extents with volume %q", other.name)
	}
}
