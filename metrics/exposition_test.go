package metrics_test

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

var update = flag.Bool("update", false, "write testdata/exposition.txt anew")

// tree is a report of disks with so many nodes each, with everything that an element can have, each number another one.
func tree(disks, nodes int) monitor.Report {
	r := monitor.Report{Server: api.ServerOfFleet}
	seed := uint64(0)
	n := func() uint64 { seed++; return seed * 7919 % 1_000_003 }
	times := func() (l api.Latency) {
		for i := range latency.Buckets {
			b := api.Bucket{Below: latency.Bound(i).Seconds(), Count: n() % 5}
			if i == latency.Buckets-1 {
				b.Below = 0
			}
			l.Count += b.Count
			l.Buckets = append(l.Buckets, b)
		}
		l.Seconds = float64(n()) / 1024
		return l
	}
	used := func() *api.Activity {
		return &api.Activity{Reads: times(), Writes: times(), Flushes: times(), ReadBytes: n() << 20, WrittenBytes: n() << 20, Errors: n()}
	}
	for d := range disks {
		disk := fmt.Sprint("disk-", d)
		r.Elements = append(r.Elements, monitor.Element{Element: api.Element{Name: disk, Kind: api.KindDisk, Disk: disk, State: api.ElementOK, Activity: used()}})
		for i := range nodes {
			f := &api.Figures{State: api.StateOK, Valid: true, Exceptions: n(), SectorsAllocated: n(), TotalSectors: 1_000_003, MetadataSectors: n(), Percent: float64(n()) / 10_001, Full: i%7 == 1}
			e := monitor.Element{Element: api.Element{Name: fmt.Sprintf("vm-%d-%d", d, i), Kind: api.KindNode, Parent: disk, Disk: disk, State: api.ElementOK,
				Connections: int64(n()), Figures: f}}
			switch {
			case i%5 == 4:
				e.Kind = api.KindCheckpoint
			default:
				e.Counters = &api.Counters{PreservedBytes: n(), FilledBytes: n(), Syncs: n(), NoRoom: n(), Rounds: times(), OwnerWaits: times(), ReadWaits: times(), MergeWaits: times()}
				e.Activity = used()
				e.Rates = monitor.Rates{FillBytes: float64(n()), WindowSeconds: 60}
			}
			switch i % 6 {
			case 1:
				left := float64(n())
				e.Rates.SecondsToFull = &left
			case 2:
				e.Merge = &api.TreeMerge{Node: e.Name, State: api.MergeRunning, CopiedBytes: int64(n()), TotalBytes: int64(n())}
			case 3:
				e.Merge = &api.TreeMerge{Node: e.Name, State: api.MergeFailed}
				e.State, f.State = api.ElementFailed, api.StateInvalid
			}
			r.Elements = append(r.Elements, e)
		}
	}
	full := 12.5
	r.FileSystems = []monitor.FileSystem{{Path: "/srv/b", FreeBytes: 5, TotalBytes: 7}, {Path: `/srv/"a`, FreeBytes: 1 << 40, TotalBytes: 1 << 41, SecondsToFull: &full}}
	return r
}

// TestExposition compares all that is said of a report with what the client library's own collectors wrote of the same one.
func TestExposition(t *testing.T) {
	r := tree(2, 5)
	slices.Reverse(r.Elements) // the order of a report is not that of the text
	text := scrape(t, func() (monitor.Report, error) { return r, nil })
	families := strings.SplitAfter(strings.ReplaceAll(text, "# HELP ", "\x00# HELP "), "\x00")
	slices.Sort(families) // their order means nothing
	var own strings.Builder
	for line := range strings.Lines(strings.ReplaceAll(strings.Join(families, ""), "\x00", "")) {
		if strings.Contains(line, "dmsnap_") {
			own.WriteString(line)
		}
	}
	const path = "testdata/exposition.txt"
	if *update {
		if err := os.WriteFile(path, []byte(own.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, lines := strings.Split(own.String(), "\n"), strings.Split(string(want), "\n")
	for i := range min(len(got), len(lines)) {
		if got[i] != lines[i] {
			t.Fatalf("line %d is\n%s, want\n%s", i+1, got[i], lines[i])
		}
	}
	if len(got) != len(lines) {
		t.Errorf("%d lines, want %d", len(got), len(lines))
	}
}
