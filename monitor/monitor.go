package monitor

import (
	"math"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// A Report is the state of a server at one moment, with rates.
type Report struct {
	At          time.Time      `json:"at"`
	Server      api.ServerKind `json:"server,omitempty"`
	Elements    []Element      `json:"elements"` // in the order of the tree
	FileSystems []FileSystem   `json:"file_systems"`
	Error       string         `json:"error,omitempty"` // why the tree accepts no changes
}

// An Element is an element of the tree with its rates.
type Element struct {
	api.Element
	Rates Rates `json:"rates"`
}

// Rates are how fast numbers of an element grow.
type Rates struct {
	// For each second, between the last two reports.
	Reads        float64 `json:"reads"`
	Writes       float64 `json:"writes"`
	ReadBytes    float64 `json:"read_bytes"`
	WrittenBytes float64 `json:"written_bytes"`

	// Bytes of its COW device that are allocated for each second, over a window of so many seconds.
	FillBytes     float64 `json:"fill_bytes"`
	WindowSeconds float64 `json:"window_seconds"`
	// SecondsToFull is when the COW device, or the file system that holds it, is full at this rate; nil: not within 10 years,
	// or not known yet.
	SecondsToFull *float64 `json:"seconds_to_full,omitempty"`
}

// A FileSystem is one that holds files of layers.
type FileSystem struct {
	Path          string   `json:"path"` // a folder of files of layers
	FreeBytes     int64    `json:"free_bytes"`
	TotalBytes    int64    `json:"total_bytes"`
	FillBytes     float64  `json:"fill_bytes"` // for each second, by the layers on it
	SecondsToFull *float64 `json:"seconds_to_full,omitempty"`
}

// A Sampler makes reports. The zero value is ready. It is not for concurrent use.
type Sampler struct {
	// Span is the time that rates of fill are measured over; 0: 5 minutes.
	Span time.Duration

	last     time.Time
	elements map[string]*series
}

// series is what is remembered of an element, by its name.
type series struct {
	fill     Window
	activity api.Activity
	active   bool // activity was seen once
	rates    Rates
	created  time.Time
	seen     bool // in this step
}

const (
	// leastWindow is how long the fill of a store is observed before its rate says something.
	leastWindow = 4 * time.Second
	// leastStep is how long requests are counted before their rate says something.
	leastStep = 200 * time.Millisecond
)

// Step makes the report of a tree that was read at the time now. Steps are about a second apart; one that is closer to
// the last has the rates of requests of that.
func (s *Sampler) Step(now time.Time, t api.Tree) Report {
	r := Report{At: now, Server: t.Server, Error: t.Error, Elements: make([]Element, 0, len(t.Elements)), FileSystems: []FileSystem{}}
	if s.elements == nil {
		s.elements = map[string]*series{}
	}
	passed := now.Sub(s.last)
	early := passed >= 0 && passed < leastStep && !s.last.IsZero()
	for _, e := range t.Elements {
		v := s.elements[e.Name]
		if v == nil || !v.created.Equal(e.Created) { // another element of the same name begins anew
			v = &series{created: e.Created, fill: Window{Span: s.Span}}
			s.elements[e.Name] = v
		}
		v.seen = true
		if !early || !v.active {
			v.count(passed.Seconds(), e.Activity)
		}
		v.step(now, e)
		r.Elements = append(r.Elements, Element{e, v.rates})
	}
	for name, v := range s.elements {
		if !v.seen {
			delete(s.elements, name)
		}
		v.seen = false
	}
	if !early {
		s.last = now
	}
	r.addFileSystems()
	return r
}

// Same says that at the time now the tree is what it was at the last step, false: some element was filling then, so that its rate
// has changed.
func (s *Sampler) Same(now time.Time) bool {
	for _, v := range s.elements {
		if v.rates.FillBytes != 0 {
			return false
		}
	}
	for _, v := range s.elements {
		v.fill.Same(now)
	}
	return true
}

// count computes the rates of requests from what was counted until now, and seconds ago.
func (v *series) count(seconds float64, a *api.Activity) {
	if a == nil {
		return
	}
	if v.active && seconds > 0 {
		rate := func(now, before uint64) float64 {
			if now < before { // it was counted anew
				return 0
			}
			return float64(now-before) / seconds
		}
		v.rates.Reads = rate(a.Reads.Count, v.activity.Reads.Count)
		v.rates.Writes = rate(a.Writes.Count, v.activity.Writes.Count)
		v.rates.ReadBytes = rate(a.ReadBytes, v.activity.ReadBytes)
		v.rates.WrittenBytes = rate(a.WrittenBytes, v.activity.WrittenBytes)
	}
	v.activity, v.active = *a, true
}

// step computes how fast the store of an element fills.
func (v *series) step(now time.Time, e api.Element) {
	f := e.Figures
	if f == nil {
		return
	}
	const sector = 512
	v.fill.Add(now, float64(f.SectorsAllocated)*sector)
	rate, over := v.fill.Rate()
	v.rates.FillBytes, v.rates.WindowSeconds, v.rates.SecondsToFull = rate, over.Seconds(), nil
	if over >= leastWindow && f.TotalSectors >= f.SectorsAllocated {
		v.rates.SecondsToFull = secondsToFull(float64(f.TotalSectors-f.SectorsAllocated)*sector, rate)
	}
}

// secondsToFull is when free bytes are used up at a rate, nil when that is not within 10 years.
func secondsToFull(free, rate float64) *float64 {
	const tenYears = 10 * 365 * 24 * 3600
	if rate <= 0 || free/rate > tenYears {
		return nil
	}
	s := free / rate
	return &s
}

// freeSpace returns the identity of the file system that holds a folder, and its bytes. Tests replace it.
var freeSpace = func(dir string) (id any, free, total int64, ok bool) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return nil, 0, 0, false
	}
	size := uint64(st.Frsize)
	bytes := func(blocks uint64) int64 { return int64(min(blocks, math.MaxInt64/max(size, 1)) * size) }
	return st.Fsid, bytes(st.Bavail), bytes(st.Blocks), true
}

// addFileSystems adds the file systems of the report's files, and bounds the forecasts of its elements by theirs.
func (r *Report) addFileSystems() {
	place := map[string]int{} // of a folder in r.FileSystems; -1: not known
	byID := map[any]int{}
	of := func(e *Element) int {
		if e.Figures == nil || e.File == "" || strings.HasPrefix(e.File, "/dev/") {
			return -1
		}
		dir := filepath.Dir(e.File)
		if i, known := place[dir]; known {
			return i
		}
		place[dir] = -1
		id, free, total, ok := freeSpace(dir)
		if !ok {
			return -1
		}
		i, known := byID[id]
		if !known {
			i = len(r.FileSystems)
			r.FileSystems = append(r.FileSystems, FileSystem{Path: dir, FreeBytes: free, TotalBytes: total})
			byID[id] = i
		}
		place[dir] = i
		return i
	}
	ready := map[int]bool{} // some element of it was observed long enough
	for i := range r.Elements {
		if k := of(&r.Elements[i]); k >= 0 {
			r.FileSystems[k].FillBytes += r.Elements[i].Rates.FillBytes
			ready[k] = ready[k] || r.Elements[i].Rates.WindowSeconds >= leastWindow.Seconds()
		}
	}
	for k := range r.FileSystems {
		if f := &r.FileSystems[k]; ready[k] {
			f.SecondsToFull = secondsToFull(float64(f.FreeBytes), f.FillBytes)
		}
	}
	for i := range r.Elements {
		e := &r.Elements[i]
		k := of(e)
		if k < 0 || e.Rates.FillBytes <= 0 || r.FileSystems[k].SecondsToFull == nil {
			continue
		}
		if own := e.Rates.SecondsToFull; own == nil || *own > *r.FileSystems[k].SecondsToFull {
			e.Rates.SecondsToFull = r.FileSystems[k].SecondsToFull
		}
	}
}

// Find returns the element of a name, or nil.
func (r Report) Find(name string) *Element {
	i := slices.IndexFunc(r.Elements, func(e Element) bool { return e.Name == name })
	if i < 0 {
		return nil
	}
	return &r.Elements[i]
}

// Percent is the fill of an element's COW device in percent, 0 without one.
func (e *Element) Percent() float64 {
	if e.Figures == nil {
		return 0
	}
	return e.Figures.Percent
}
