package metrics_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/metrics"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

func scrape(t testing.TB, latest func() (monitor.Report, error)) string {
	t.Helper()
	w := httptest.NewRecorder()
	metrics.Handler(latest).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// report is one disk with a node that was written and is filling, and one whose merge runs.
func report() monitor.Report {
	full := 120.0
	l := func(n uint64, below float64) api.Latency {
		return api.Latency{Count: n, Seconds: 0.5, Buckets: []api.Bucket{{Below: below, Count: n}}}
	}
	node := func(name string) monitor.Element {
		return monitor.Element{Element: api.Element{Name: name, Kind: api.KindNode, Parent: "base", Disk: "base", State: api.ElementOK, Connections: 2,
			Figures:  &api.Figures{State: api.StateOK, Valid: true, Exceptions: 7, SectorsAllocated: 100, TotalSectors: 400, MetadataSectors: 16, Percent: 25},
			Counters: &api.Counters{PreservedBytes: 4096, FilledBytes: 1000, Syncs: 3, Rounds: l(3, 0.001024)},
			Activity: &api.Activity{Reads: l(10, 1e-6), Writes: l(20, 0), Flushes: l(1, 0.000512), ReadBytes: 40960, WrittenBytes: 2000, Errors: 1}},
			Rates: monitor.Rates{FillBytes: 1024, WindowSeconds: 60, SecondsToFull: &full}}
	}
	vm1, vm2 := node("vm1"), node(`vm"2\ü`)
	vm2.Merge = &api.TreeMerge{Node: vm2.Name, State: api.MergeRunning, CopiedBytes: 5, TotalBytes: 9}
	vm2.State, vm2.Error = api.ElementFailed, "no disk"
	return monitor.Report{Elements: []monitor.Element{{Element: api.Element{Name: "base", Disk: "base", Kind: api.KindDisk}}, vm1, vm2},
		FileSystems: []monitor.FileSystem{{Path: "/srv", FreeBytes: 1 << 30, TotalBytes: 2 << 30, SecondsToFull: &full}}}
}

func TestMetrics(t *testing.T) {
	text := scrape(t, func() (monitor.Report, error) { return report(), nil })
	for _, want := range []string{
		"dmsnap_up 1",
		`dmsnap_elements{kind="node"} 2`,
		`dmsnap_elements{kind="checkpoint"} 0`,
		`dmsnap_export_requests_total{disk="base",name="vm1",op="write"} 20`,
		`dmsnap_export_bytes_total{disk="base",name="vm1",op="read"} 40960`,
		`dmsnap_store_fill_ratio{disk="base",name="vm1"} 0.25`,
		`dmsnap_store_allocated_bytes{disk="base",name="vm1"} 51200`,
		`dmsnap_store_copied_bytes_total{disk="base",name="vm1",reason="preserved"} 4096`,
		`dmsnap_store_write_amplification{disk="base",name="vm1"} 1.5`,
		`dmsnap_time_to_full_seconds{disk="base",name="vm1"} 120`,
		`dmsnap_time_to_full_window_seconds{disk="base",name="vm1"} 60`,
		`dmsnap_healthy{disk="base",name="vm\"2\\ü"} 0`,
		`dmsnap_merge_running{disk="base",name="vm\"2\\ü"} 1`,
		// Of both nodes together: reads below a microsecond, writes in the bucket without a bound.
		`dmsnap_request_duration_seconds_bucket{disk="base",op="read",le="1e-06"} 20`,
		`dmsnap_request_duration_seconds_bucket{disk="base",op="write",le="8.388608"} 0`,
		`dmsnap_request_duration_seconds_bucket{disk="base",op="write",le="+Inf"} 40`,
		`dmsnap_request_duration_seconds_count{disk="base",op="read"} 20`,
		`dmsnap_request_duration_seconds_sum{disk="base",op="read"} 1`,
		`dmsnap_sync_duration_seconds_bucket{disk="base",le="0.001024"} 6`,
		`dmsnap_sync_duration_seconds_bucket{disk="base",le="0.000512"} 0`,
		`dmsnap_filesystem_free_bytes{path="/srv"} 1.073741824e+09`,
		"process_resident_memory_bytes",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is missing", want)
		}
	}
	if t.Failed() {
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "dmsnap") {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
}

func TestServerThatFails(t *testing.T) {
	text := scrape(t, func() (monitor.Report, error) { return report(), errors.New("no server") })
	if !strings.Contains(text, "dmsnap_up 0") || strings.Contains(text, "dmsnap_elements") {
		t.Error(text)
	}
}

// TestNamesWithoutUTF8: a path may have any bytes.
func TestNamesWithoutUTF8(t *testing.T) {
	r := report()
	r.FileSystems[0].Path = "/srv/\xff"
	text := scrape(t, func() (monitor.Report, error) { return r, nil })
	if want := "dmsnap_filesystem_free_bytes{path=\"/srv/\uFFFD\"} 1"; !strings.Contains(text, want) {
		t.Errorf("%s is missing", want)
	}
}

// TestPromtool has Prometheus' own tool judge names, units and help.
func TestPromtool(t *testing.T) {
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("SKIPPED: no promtool (Debian: prometheus)")
	}
	text := scrape(t, func() (monitor.Report, error) { return report(), nil })
	c := exec.Command(tool, "check", "metrics")
	c.Stdin = strings.NewReader(text)
	if out, err := c.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("%v: %s", err, out)
	}
}

func TestElevenHundredNodes(t *testing.T) {
	r := tree(1, 1100)
	latest := func() (monitor.Report, error) { return r, nil }
	h := metrics.Handler(latest)
	best := time.Hour
	for range 5 { // the machine may be busy
		began := time.Now()
		h.ServeHTTP(discard{http.Header{}}, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		best = min(best, time.Since(began))
	}
	t.Logf("a scrape of 1,100 nodes takes %v", best)
	if limit := 2 * time.Second; best > limit {
		t.Errorf("more than %v", limit)
	}
}

type discard struct{ h http.Header }

func (d discard) Header() http.Header         { return d.h }
func (d discard) Write(p []byte) (int, error) { return io.Discard.Write(p) }
func (d discard) WriteHeader(int)             {}

// BenchmarkScrape writes the text of 1,100 nodes, also compressed, as Prometheus asks for it.
func BenchmarkScrape(b *testing.B) {
	r := tree(1, 1100)
	h := metrics.Handler(func() (monitor.Report, error) { return r, nil })
	for _, encoding := range []string{"identity", "gzip"} {
		b.Run(encoding, func(b *testing.B) {
			q := httptest.NewRequest(http.MethodGet, "/metrics", nil)
			q.Header.Set("Accept-Encoding", encoding)
			for b.Loop() {
				h.ServeHTTP(discard{http.Header{}}, q)
			}
		})
	}
}

func Example() {
	h := metrics.Handler(func() (monitor.Report, error) { return monitor.Report{}, nil })
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if strings.HasPrefix(line, "dmsnap_up") {
			fmt.Print(line)
		}
	}
	// Output: dmsnap_up 1
}
