package monitor

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// noFileSystems hides those of this machine.
func noFileSystems(t *testing.T) {
	real := freeSpace
	freeSpace = func(string) (any, int64, int64, bool) { return nil, 0, 0, false }
	t.Cleanup(func() { freeSpace = real })
}

// node is a tree with a disk and one node, whose store has so many sectors allocated of 2,000,000.
func node(allocated uint64) api.Tree {
	const total = 2_000_000
	return api.Tree{Elements: []api.Element{
		{Name: "base", Kind: api.KindDisk, Disk: "base"},
		{Name: "vm1", Kind: api.KindNode, Parent: "base", Disk: "base", File: "/srv/vm1.cow", Created: start,
			Figures: &api.Figures{Valid: true, State: api.StateOK, SectorsAllocated: allocated, TotalSectors: total, Percent: 100 * float64(allocated) / total}}}}
}

func TestRatesOfActivity(t *testing.T) {
	noFileSystems(t)
	var s Sampler
	tree := node(0)
	a := &api.Activity{Writes: api.Latency{Count: 100}, WrittenBytes: 1 << 20}
	tree.Elements[1].Activity = a
	if v := s.Step(at(0), tree).Find("vm1"); v.Rates.Writes != 0 {
		t.Errorf("from one report: %+v", v.Rates)
	}
	a.Writes.Count, a.WrittenBytes, a.Reads.Count, a.ReadBytes = 300, 3<<20, 50, 4096
	v := s.Step(at(2), tree).Find("vm1")
	if v.Rates.Writes != 100 || v.Rates.WrittenBytes != 1<<20 || v.Rates.Reads != 25 || v.Rates.ReadBytes != 2048 {
		t.Errorf("rates %+v", v.Rates)
	}
	a.Writes.Count++ // a moment later: too early for another rate
	if v := s.Step(at(2.01), tree).Find("vm1"); v.Rates.Writes != 100 {
		t.Errorf("after a moment: rates %+v", v.Rates)
	}
	a.Writes.Count = 400
	if v := s.Step(at(3), tree).Find("vm1"); v.Rates.Writes != 100 {
		t.Errorf("after the next second: rates %+v", v.Rates)
	}
	a.Writes.Count = 10 // counted anew
	if v := s.Step(at(4), tree).Find("vm1"); v.Rates.Writes != 0 {
		t.Errorf("after a restart %+v", v.Rates)
	}
}

func TestTimeToFull(t *testing.T) {
	noFileSystems(t)
	var s Sampler
	for i := range 31 { // 1,000 sectors a second
		r := s.Step(at(float64(i)), node(uint64(i)*1000))
		v := r.Find("vm1")
		if i < 4 && v.Rates.SecondsToFull != nil {
			t.Errorf("after %d s already %v", i, *v.Rates.SecondsToFull)
		}
		if i == 30 && (v.Rates.SecondsToFull == nil || *v.Rates.SecondsToFull != 1970 || v.Rates.WindowSeconds != 30 || v.Rates.FillBytes != 512000) {
			t.Errorf("rates %+v", v.Rates)
		}
	}
	// Another element of the same name.
	other := node(5000)
	other.Elements[1].Created = at(31)
	if v := s.Step(at(31), other).Find("vm1"); v.Rates.FillBytes != 0 || v.Rates.SecondsToFull != nil {
		t.Errorf("a new element has the rates of the old one: %+v", v.Rates)
	}
	s.Step(at(32), api.Tree{})
	if len(s.elements) != 0 {
		t.Error("what is gone is remembered")
	}
}

// A store that is larger than its file system is full when that is.
func TestFileSystemBoundsTheForecast(t *testing.T) {
	real := freeSpace
	defer func() { freeSpace = real }()
	freeSpace = func(dir string) (any, int64, int64, bool) { return "fs of " + dir[:4], 100 << 20, 1 << 30, true }
	var s Sampler
	tree := node(0)
	second := tree.Elements[1]
	second.Name, second.File = "vm2", "/srv/other/vm2.cow"
	figures := *second.Figures
	second.Figures = &figures
	tree.Elements = append(tree.Elements, second)
	s.Step(at(0), tree)
	tree.Elements[1].Figures.SectorsAllocated = 10 << 11 // 10 MiB in 10 s
	figures.SectorsAllocated = 40 << 11
	r := s.Step(at(10), tree)
	if len(r.FileSystems) != 1 || r.FileSystems[0].FillBytes != 5<<20 || *r.FileSystems[0].SecondsToFull != 20 {
		t.Fatalf("%+v", r.FileSystems)
	}
	for _, name := range []string{"vm1", "vm2"} {
		if got := r.Find(name).Rates.SecondsToFull; got == nil || *got != 20 {
			t.Errorf("%s is full in %v s", name, got)
		}
	}
}

func TestRealFileSystem(t *testing.T) {
	_, free, total, ok := freeSpace(t.TempDir())
	if !ok || free < 0 || total <= 0 || free > total {
		t.Errorf("%d of %d bytes are free, %v", free, total, ok)
	}
}

// text says what alerts began (+) and ended (-).
func text(list []Alert) string {
	var words []string
	for _, a := range list {
		sign := map[string]string{firing: "+", resolved: "-"}[a.State]
		word := sign + string(a.Kind)
		if a.Kind == AlertFill {
			word += fmt.Sprint(a.Threshold)
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func TestAlerts(t *testing.T) {
	noFileSystems(t)
	var s Sampler
	a := Alerts{Thresholds: Thresholds{TimeToFull: -1}}
	clock := 0.0
	for i, step := range []struct {
		change  func(*api.Tree)
		percent float64
		want    string
	}{
		{nil, 79.9, ""},
		{nil, 80, "+fill80"},
		{nil, 85, ""},
		{nil, 79, ""},
		{nil, 78.5, ""},
		{nil, 77.9, "-fill80"},
		{nil, 96, "+fill80 +fill90 +fill95"},
		{func(t *api.Tree) { t.Elements[1].Figures.Full = true }, 96, "+full"},
		{func(t *api.Tree) { t.Elements[1].Figures.State = api.StateInvalid }, 96, "+invalid -full"},
		{nil, 10, "-fill80 -fill90 -fill95 -invalid"},
		{func(t *api.Tree) { t.Elements[1].Figures.Error = "no disk" }, 10, "+failed"},
		{func(t *api.Tree) { t.Elements[1].Figures.Error = "no disk" }, 10, ""},
		{func(t *api.Tree) { t.Error = "no space" }, 10, "+changes_refused -failed"},
		{func(t *api.Tree) { t.Elements[0].Merge = &api.TreeMerge{Node: "vm1", State: api.MergeRunning} }, 10, "-changes_refused"},
		{func(t *api.Tree) { t.Elements[0].Merge = &api.TreeMerge{Node: "vm1", State: api.MergeDone} }, 10, "+merge_done"},
		{func(t *api.Tree) { t.Elements[0].Merge = &api.TreeMerge{Node: "vm1", State: api.MergeDone} }, 10, ""},
		{nil, 10, ""},
		{func(t *api.Tree) { t.Elements[0].State = api.ElementFailed }, 10, "+failed"},
		{func(t *api.Tree) { t.Elements = nil }, 10, "-failed"},
	} {
		clock++
		tree := node(uint64(step.percent * 20_000))
		if step.change != nil {
			step.change(&tree)
		}
		if got := text(a.Step(s.Step(at(clock), tree))); got != step.want {
			t.Errorf("step %d: %q, want %q", i, got, step.want)
		}
	}
}

func TestAlertOfTimeToFull(t *testing.T) {
	noFileSystems(t)
	var s Sampler
	a := Alerts{Thresholds: Thresholds{Fill: []float64{}, TimeToFull: 1000 * time.Second}}
	var when []float64
	for i := range 1500 { // 1,000 sectors a second: full after 2,000 s
		for _, alert := range a.Step(s.Step(at(float64(i)), node(uint64(i)*1000))) {
			when = append(when, float64(i))
			if alert.Kind != AlertTimeToFull || alert.State != firing || math.Abs(alert.Value-1000) > 50 || !strings.Contains(alert.Message, "full in 17 min") {
				t.Errorf("%+v", alert)
			}
		}
	}
	if len(when) != 1 || math.Abs(when[0]-1000) > 50 {
		t.Errorf("alerts at %v s", when)
	}
	// It stops growing.
	var ended string
	for i := range 400 {
		if got := text(a.Step(s.Step(at(1500+float64(i)), node(1_500_000)))); got != "" {
			ended += got
		}
	}
	if ended != "-time_to_full" {
		t.Errorf("%q", ended)
	}
}

func TestDuration(t *testing.T) {
	for seconds, want := range map[float64]string{0: "0 s", 99: "99 s", 100: "2 min", 3600: "60 min", 7200: "2.0 h", 200000: "2 days"} {
		if got := Duration(seconds); got != want {
			t.Errorf("%v s: %q, want %q", seconds, got, want)
		}
	}
}

func Example() {
	var s Sampler
	begin := time.Unix(0, 0)
	for i := range 11 { // 100 sectors a second of 10,000
		f := &api.Figures{SectorsAllocated: uint64(i) * 100, TotalSectors: 10_000}
		r := s.Step(begin.Add(time.Duration(i)*time.Second), api.Tree{Elements: []api.Element{{Name: "vm1", Kind: api.KindNode, Figures: f}}})
		if i == 10 {
			fmt.Println("full in", Duration(*r.Find("vm1").Rates.SecondsToFull))
		}
	}
	// Output: full in 90 s
}
