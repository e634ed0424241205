package fleet

import (
	"testing"

	"github.com/dmsnap/dmsnap/server/api"
)

// TestHeatMap follows what is in the layers of a node and of its checkpoint, and what clients write.
func TestHeatMap(t *testing.T) {
	f := newFleet(t, Options{Observe: true})
	f.fork("golden", "vm1")
	c := f.dial("vm1")
	const parts = 16
	part := int64(testSize / parts)
	put(t, c, 0, "first")
	put(t, c, 3*part, "second")
	stored := func(name string) (list []int) {
		t.Helper()
		h, err := f.HeatMap(name, parts)
		if err != nil || len(h.Stored) != parts || h.SizeBytes != testSize {
			t.Fatalf("%s: %+v, %v", name, h, err)
		}
		for i, x := range h.Stored {
			if x > 0 {
				list = append(list, i)
			}
		}
		return list
	}
	equal := func(name string, want ...int) {
		t.Helper()
		got := stored(name)
		if len(got) != len(want) {
			t.Fatalf("%s has parts %v, want %v", name, got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("%s has parts %v, want %v", name, got, want)
			}
		}
	}
	equal("vm1", 0, 3)
	f.checkpoint("before", "vm1")
	put(t, c, 5*part, "third")
	equal("vm1@before", 0, 3)
	equal("vm1", 5)
	equal("golden")
	h, err := f.HeatMap("vm1", parts)
	if err != nil || h.Writes[0] != 1 || h.Writes[3] != 1 || h.Writes[5] != 1 || h.Writes[7] != 0 {
		t.Errorf("writes %v, %v", h.Writes, err)
	}
	e, err := f.Element("vm1")
	if err != nil || e.Activity == nil || e.Activity.Writes.Count != 3 || e.Activity.WrittenBytes != uint64(len("firstsecondthird")) {
		t.Errorf("%+v, %v", e.Activity, err)
	}
	if _, err := f.HeatMap("nothing", parts); err == nil {
		t.Error("a map of nothing")
	}
}

// A disk that is exported is observed as well.
func TestHeatMapOfADisk(t *testing.T) {
	f := newFleet(t, Options{Observe: true})
	if err := f.RemoveDisk(t.Context(), "golden"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "golden", Source: f.golden, Raw: true, Writable: true}); err != nil {
		t.Fatal(err)
	}
	f.fork("golden", "vm1")
	put(t, f.dial("golden"), testSize/2, "new")
	h, err := f.HeatMap("golden", 4)
	if err != nil || h.Writes[2] != 1 || h.Writes[0] != 0 || h.Stored[2] != 0 {
		t.Errorf("%+v, %v", h, err)
	}
	if e, err := f.Element("golden"); err != nil || e.Activity == nil || e.Activity.WrittenBytes != 3 {
		t.Errorf("%+v, %v", e.Activity, err)
	}
}
