package server

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// Exports of snapshots say where others differ, of all that happened before the question; one that is merged is left out.
func TestBitmaps(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{})
	q := p.beside(t)
	defer q.check(t)
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	dev := func(name string) block.Device {
		t.Helper()
		d, err := s.Device(name)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	writeAt(t, s.Origin(), "before", 8*4096) // preserved by disk alone
	if _, err := s.Attach(api.AttachRequest{Name: "beside", COW: q.cow}); err != nil {
		t.Fatal(err)
	}
	writeAt(t, s.Origin(), "after", 16*4096) // preserved by both
	writeAt(t, dev("beside"), "own", 20*4096)
	chunks := func(of nbd.ContextFunc) (list []int64) {
		t.Helper()
		for off := int64(0); off < s.Origin().Size(); {
			extents, err := of(off, s.Origin().Size()-off)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range extents {
				for at := off; e.Flags == 1 && at < off+e.Length; at += 4096 {
					list = append(list, at/4096)
				}
				off += e.Length
			}
		}
		return list
	}
	names := func(name string) string { return strings.Join(slices.Sorted(maps.Keys(s.bitmaps(name))), " ") }
	const toDisk, toBeside = "qemu:dirty-bitmap:disk", "qemu:dirty-bitmap:beside"
	if names("disk") != toBeside || names("beside") != toDisk || names("origin") != "" {
		t.Fatalf("%q, %q", names("disk"), names("beside"))
	}
	for name, other := range map[string]string{"disk": toBeside, "beside": toDisk} {
		if got := chunks(s.bitmaps(name)[other]); !slices.Equal(got, []int64{8, 16, 20}) {
			t.Errorf("%s: chunks %v", name, got)
		}
	}
	if st, err := s.Snapshot("beside"); err != nil || st.Changes != 1 {
		t.Errorf("changes %d, %v", st.Changes, err)
	}
	// A client that has the context when the merge begins gets an error, not a wrong answer.
	asked := s.bitmaps("disk")[toBeside]
	if _, err := s.StartMerge("beside"); err != nil {
		t.Fatal(err)
	}
	if _, err := asked(0, 4096); err == nil || !strings.Contains(err.Error(), "is merged") {
		t.Errorf("while it is merged: %v", err)
	}
	if names("disk") != "" || names("beside") != "" {
		t.Errorf("%q, %q while one is merged", names("disk"), names("beside"))
	}
}
