package fleet

import (
	"testing"
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
