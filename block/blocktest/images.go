package blocktest

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
)

// A Cut is the moment of a power cut: what was durable on each device, and the writes that were not.
// It does not change when the devices go on, and may be used concurrently.
type Cut struct {
	devices []*Crash
	durable [][]byte      // by device
	sizes   []int64       // by device
	writes  []sectorWrite // not durable, in order
	sectors []cutSector   // the same by sector, in the order of the first write to each
	place   []versionPlace
}

// cutSector is a sector with what it may hold after the cut: 0 stands for what was durable, v > 0 for
// versions[v-1].
type cutSector struct {
	device   int
	sector   int64
	versions [][]byte
}

// versionPlace says which version of which sector a write is.
type versionPlace struct {
	sector  int // index in Cut.sectors
	version int // as chosen, so > 0
}

// Cut returns the state after a power cut at this moment. The devices themselves continue.
func (p *Power) Cut() *Cut {
	p.mu.RLock()
	defer p.mu.RUnlock()
	x := &Cut{devices: slices.Clone(p.devices), writes: slices.Clone(p.writes)}
	for _, c := range x.devices {
		x.durable = append(x.durable, slices.Clone(c.durable))
		x.sizes = append(x.sizes, c.size)
	}
	type key struct {
		dev    *Crash
		sector int64
	}
	index := make(map[key]int)
	for _, w := range x.writes {
		k := key{w.dev, w.sector}
		i, ok := index[k]
		if !ok {
			i = len(x.sectors)
			index[k] = i
			x.sectors = append(x.sectors, cutSector{slices.Index(x.devices, w.dev), w.sector, nil})
		}
		s := &x.sectors[i]
		s.versions = append(s.versions, w.data)
		x.place = append(x.place, versionPlace{i, len(s.versions)})
	}
	return x
}

// Count returns the number of different choices of what survived, at most limit. (Two of them may give
// equal disks, where a write did not change a sector.)
func (x *Cut) Count(limit int) int {
	n := 1
	for _, s := range x.sectors {
		n *= len(s.versions) + 1
		if n >= limit {
			return limit
		}
	}
	return n
}

// Choices say which of the possible disks [Cut.Images] shows. The zero value shows the systematic
// ones.
type Choices struct {
	// All shows every possible choice, each once and nothing else, where there are at most that many. 0 means 64.
	All int
	// Limit bounds each systematic series (prefixes, sectors left out, sectors alone) to that many members, evenly
	// spaced. 0 means no bound.
	Limit int
	// Random is the number of random choices shown after the systematic ones, drawn with Seed.
	Random int
	Seed   uint64
}

// Images shows what the disks could hold after the cut, one possibility at a time. Unless there are so
// few that all are shown (see Choices.All), they are, in this order:
//
//   - nothing survived that was not durable; everything survived;
//   - every prefix of the writes, sector by sector, in the order of writing over all devices;
//   - every write of a sector left out, with the later ones of the same sector, and all others there;
//   - every write of a sector alone;
//   - random choices: for each sector any of its versions, some choices sparse, some dense.
//
// One image is in memory at a time, beside the cut itself.
func (x *Cut) Images(o Choices) iter.Seq[*Image] {
	return func(yield func(*Image) bool) {
		for choice := range x.choices(o) {
			if !yield(&Image{x, slices.Clone(choice)}) {
				return
			}
		}
	}
}

// choices yields for each image a version of each sector. The slice is used again.
func (x *Cut) choices(o Choices) iter.Seq[[]int] {
	if o.All == 0 {
		o.All = 64
	}
	if x.Count(o.All+1) <= o.All {
		return x.every()
	}
	return func(yield func([]int) bool) {
		for _, series := range []func(Choices) iter.Seq[[]int]{x.extremes, x.prefixes, x.omissions, x.singles, x.random} {
			for choice := range series(o) {
				if !yield(choice) {
					return
				}
			}
		}
	}
}

// every yields all choices, counting with the sectors as digits.
func (x *Cut) every() iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		choice := make([]int, len(x.sectors))
		for yield(choice) {
			i := 0
			for ; i < len(choice) && choice[i] == len(x.sectors[i].versions); i++ {
				choice[i] = 0
			}
			if i == len(choice) {
				return
			}
			choice[i]++
		}
	}
}

// newest is the choice in which everything survived.
func (x *Cut) newest() []int {
	choice := make([]int, len(x.sectors))
	for i, s := range x.sectors {
		choice[i] = len(s.versions)
	}
	return choice
}

// extremes yields nothing and everything.
func (x *Cut) extremes(Choices) iter.Seq[[]int] {
	return slices.Values([][]int{make([]int, len(x.sectors)), x.newest()})
}

// prefixes yields the first 1, 2, … n-1 writes.
func (x *Cut) prefixes(o Choices) iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		choice := make([]int, len(x.sectors))
		n := len(x.place) - 1
		for k := range n {
			choice[x.place[k].sector] = x.place[k].version
			if o.takes(k, n) && !yield(choice) {
				return
			}
		}
	}
}

// omissions yields everything but one write and the later ones of its sector.
func (x *Cut) omissions(o Choices) iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		choice := x.newest()
		for k, p := range x.place {
			if !o.takes(k, len(x.place)) {
				continue
			}
			choice[p.sector] = p.version - 1
			if !yield(choice) {
				return
			}
			choice[p.sector] = len(x.sectors[p.sector].versions)
		}
	}
}

// singles yields one write and no other.
func (x *Cut) singles(o Choices) iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		choice := make([]int, len(x.sectors))
		for k, p := range x.place {
			if !o.takes(k, len(x.place)) {
				continue
			}
			choice[p.sector] = p.version
			if !yield(choice) {
				return
			}
			choice[p.sector] = 0
		}
	}
}

// random yields o.Random choices. Each has its own density: with fair coins alone, a choice from many
// sectors would never be nearly nothing or nearly everything, where the interesting ones are.
func (x *Cut) random(o Choices) iter.Seq[[]int] {
	return func(yield func([]int) bool) {
		r := rand.New(rand.NewPCG(o.Seed, uint64(len(x.place))))
		choice := make([]int, len(x.sectors))
		for range o.Random {
			density := r.Float64()
			for i, s := range x.sectors {
				choice[i] = 0
				if r.Float64() < density {
					choice[i] = 1 + r.IntN(len(s.versions))
				}
			}
			if !yield(choice) {
				return
			}
		}
	}
}

// takes reports whether member k of a series of n is among o.Limit evenly spaced ones.
func (o Choices) takes(k, n int) bool {
	return o.Limit <= 0 || n <= o.Limit || (k+1)*o.Limit/n > k*o.Limit/n
}

// An Image is one possibility of what the disks hold after a power cut.
type Image struct {
	cut    *Cut
	choice []int
}

// Disk returns the content of a device, which is the caller's to change. A device that is not of the
// same Power panics.
func (m *Image) Disk(c *Crash) []byte {
	d := slices.Index(m.cut.devices, c)
	if d < 0 {
		panic("blocktest: a device of another Power")
	}
	disk := slices.Clone(m.cut.durable[d])
	for i, s := range m.cut.sectors {
		if v := m.choice[i]; v > 0 && s.device == d {
			copy(c.sector(disk, s.sector), s.versions[v-1])
		}
	}
	return disk[:m.cut.sizes[d]]
}

// String lists, of the writes that were not durable, those whose content is on the disk: "3 of 5 unflushed
// sectors survived: COW 8, COW 9 (write 2 of 2), ORIGIN 0".
func (m *Image) String() string {
	const most = 40 // a message is for reading
	var list []string
	survived := 0
	for i, s := range m.cut.sectors {
		v := m.choice[i]
		if v == 0 {
			continue
		}
		if survived++; survived > most {
			continue
		}
		name := sectorWrite{dev: m.cut.devices[s.device], sector: s.sector}.String()
		if n := len(s.versions); n > 1 {
			name += fmt.Sprintf(" (write %d of %d)", v, n)
		}
		list = append(list, name)
	}
	str := fmt.Sprintf("%d of %d unflushed sectors survived", survived, len(m.cut.sectors))
	if survived > 0 {
		str += ": " + strings.Join(list, ", ")
	}
	if survived > most {
		str += ", …"
	}
	return str
}
