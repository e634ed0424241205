// Package metrics shows what a server reports to Prometheus.
//
//	h := metrics.Handler(func() (monitor.Report, error) { ... })
//	http.Handle("/metrics", h)
//
// Counters are those of the report that the function returns for each scrape, so they are as new as that. Durations are
// histograms for each disk, not for each node: a thousand nodes stay some twenty thousand numbers. docs/operations.md lists
// the metrics.
//
// # Guarantees
//
//   - The handler may be used concurrently, and calls the function concurrently: at most four scrapes are answered at a
//     time, more are answered with status 503.
//   - When the function fails, the scrape still succeeds: dmsnap_up is 0, and there are only the metrics of the process.
//   - The handler asks for no token and reads no other part of a request than its headers: who may scrape is decided by the
//     caller (package web). Nothing in this package is executed for requests of the clients of disks.
//
// It depends on the Prometheus client library (docs/decisions/0013-metrics.md), and nothing of the library depends on it.
package metrics

import (
	"cmp"
	"compress/gzip"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// scrapesAtOnce is how many scrapes are answered at the same time; of more, each is answered with status 503.
const scrapesAtOnce = 4

// Handler answers scrapes with the metrics of the report that latest returns, of this process and of the Go runtime.
// latest may be called concurrently. When it fails, dmsnap_up is 0 and there are no others.
func Handler(latest func() (monitor.Report, error)) http.Handler {
	process := prometheus.NewRegistry()
	process.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	h := &handler{latest: latest, process: process, pages: make(chan *page, scrapesAtOnce)}
	for range scrapesAtOnce {
		h.pages <- &page{}
	}
	return h
}

type handler struct {
	latest  func() (monitor.Report, error)
	process prometheus.Gatherer
	pages   chan *page // those that are not in use
}

// ServeHTTP answers a scrape in the text format.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var p *page
	select {
	case p = <-h.pages:
	default:
		http.Error(w, "too many scrapes at once", http.StatusServiceUnavailable)
		return
	}
	defer func() { h.pages <- p }()
	p.text = p.text[:0]
	p.report(h.latest())
	families, err := h.process.Gather()
	for _, f := range families {
		if _, failed := expfmt.MetricFamilyToText((*appender)(&p.text), f); failed != nil && err == nil {
			err = failed
		}
	}
	if err != nil && len(families) == 0 {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	if !compresses(r) {
		w.Write(p.text)
		return
	}
	w.Header().Set("Content-Encoding", "gzip")
	if p.compressor == nil {
		p.compressor, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed)
	}
	p.compressor.Reset(w)
	p.compressor.Write(p.text)
	p.compressor.Close()
}

// compresses reports whether a reply is compressed: where the client asks for it, and is not on this host, where that takes more
// time than it saves.
func compresses(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err == nil && from.Addr().Unmap().IsLoopback() {
		return false
	}
	for encoding := range strings.SplitSeq(r.Header.Get("Accept-Encoding"), ",") {
		name, parameters, _ := strings.Cut(encoding, ";")
		if strings.TrimSpace(name) == "gzip" && strings.ReplaceAll(parameters, " ", "") != "q=0" {
			return true
		}
	}
	return false
}

// appender is a text as the client library writes to it.
type appender text

func (a *appender) Write(p []byte) (int, error) {
	*a = append(*a, p...)
	return len(p), nil
}

func (a *appender) WriteString(s string) (int, error) {
	*a = append(*a, s...)
	return len(s), nil
}

func (a *appender) WriteByte(b byte) error {
	*a = append(*a, b)
	return nil
}

var _ interface {
	io.ByteWriter
	io.StringWriter
} = (*appender)(nil)

// A page is what one scrape uses; it is used again. A scrape makes the text of some 30,000 numbers, and allocates next to nothing
// for it: neither the collector nor a long burst on one of few processors disturbs requests (docs/decisions/0013-metrics.md).
type page struct {
	text
	sorted     []*monitor.Element
	labels     []string // of the elements in sorted: disk="…",name="…"
	compressor *gzip.Writer
}

// Labels with fixed values.
var (
	opRead, opWrite, opFlush               = label("op", "read"), label("op", "write"), label("op", "flush")
	reasonFilled, reasonPreserved          = label("reason", "filled"), label("reason", "preserved")
	reasonMerge, reasonOwner, reasonReader = label("reason", "merge"), label("reason", "owner"), label("reason", "reader")
)

// The metrics that are not of an element.
var (
	up       = define(gauge, "up", "1 if the server answered.")
	refused  = define(gauge, "changes_refused", "1 if the tree accepts no changes because its state could not be recorded.")
	elements = define(gauge, "elements", "Disks, checkpoints and nodes (snapshots) that there are.")

	durations = define(times, "request_duration_seconds", "Durations of requests to the exports of a disk, waiting included.")
	syncTimes = define(times, "sync_duration_seconds", "Durations of rounds that make exceptions durable, of all stores of a disk.")
	waits     = define(times, "wait_duration_seconds", "How long requests waited, by reason: owner (another request makes an exception for the same chunk), reader (an origin write waits for reads), merge (merge steps and writes wait for each other).")

	fsFree  = define(gauge, "filesystem_free_bytes", "Free bytes of a file system that holds COW files.")
	fsTotal = define(gauge, "filesystem_size_bytes", "Size of a file system that holds COW files.")
	fsFull  = define(gauge, "filesystem_time_to_full_seconds", "When it is full at the rate at which the COW files on it grow.")
)

// A series is a number of each element that has it.
type series struct {
	label string // a third one, after disk and name; "": none
	of    func(e *monitor.Element) (value float64, has bool)
}

// perElement are the metrics of elements, with their series in the order of the label.
var perElement = []struct {
	family
	series []series
}{
	{define(gauge, "healthy", "0 if the element failed: see its error in the tree."), one(func(e *monitor.Element) (float64, bool) {
		return truth(e.State != api.ElementFailed), true
	})},

	{define(gauge, "export_connections", "NBD connections to the export."), one(func(e *monitor.Element) (float64, bool) {
		return float64(e.Connections), e.Activity != nil
	})},
	{define(counter, "export_requests_total", "Requests to the export, whatever way they took."), []series{
		{opFlush, used(func(a *api.Activity) uint64 { return a.Flushes.Count })},
		{opRead, used(func(a *api.Activity) uint64 { return a.Reads.Count })},
		{opWrite, used(func(a *api.Activity) uint64 { return a.Writes.Count })}}},
	{define(counter, "export_bytes_total", "Bytes that were read, or written, zeroed and discarded."), []series{
		{opRead, used(func(a *api.Activity) uint64 { return a.ReadBytes })},
		{opWrite, used(func(a *api.Activity) uint64 { return a.WrittenBytes })}}},
	{define(counter, "export_errors_total", "Requests that failed."), one(used(func(a *api.Activity) uint64 { return a.Errors }))},

	{define(gauge, "store_size_bytes", "Size of the COW device."), one(stored(func(f *api.Figures) float64 { return float64(f.TotalSectors) * sector }))},
	{define(gauge, "store_allocated_bytes", "Bytes of the COW device that are allocated."), one(stored(func(f *api.Figures) float64 { return float64(f.SectorsAllocated) * sector }))},
	{define(gauge, "store_metadata_bytes", "Bytes of the COW device that are metadata."), one(stored(func(f *api.Figures) float64 { return float64(f.MetadataSectors) * sector }))},
	{define(gauge, "store_fill_ratio", "Allocated of size, 0 to 1."), one(stored(func(f *api.Figures) float64 { return f.Percent / 100 }))},
	{define(gauge, "store_exceptions", "Exceptions, which are chunks in the COW device."), one(stored(func(f *api.Figures) float64 { return float64(f.Exceptions) }))},
	{define(gauge, "store_valid", "0 if the snapshot is invalid: its content is lost."), one(stored(func(f *api.Figures) float64 { return truth(f.State != api.StateInvalid) }))},
	{define(gauge, "store_full", "1 if the last write that needed space found none."), one(stored(func(f *api.Figures) float64 { return truth(f.Full) }))},

	{define(counter, "store_copied_bytes_total", "Bytes copied into the COW device: preserved before the origin changed, or filled in around a write."), []series{
		{reasonFilled, counted(func(c *api.Counters) uint64 { return c.FilledBytes })},
		{reasonPreserved, counted(func(c *api.Counters) uint64 { return c.PreservedBytes })}}},
	{define(gauge, "store_write_amplification", "Bytes written to the COW device for each byte that clients wrote, metadata not counted."), one(amplification)},
	{define(counter, "store_syncs_total", "Requests to make exceptions durable."), one(counted(func(c *api.Counters) uint64 { return c.Syncs }))},
	{define(counter, "store_no_room_total", "Writes that found no space, each time."), one(counted(func(c *api.Counters) uint64 { return c.NoRoom }))},

	{define(gauge, "store_fill_bytes_per_second", "How fast the COW device fills, over dmsnap_time_to_full_window_seconds."), one(func(e *monitor.Element) (float64, bool) {
		return e.Rates.FillBytes, grows(e)
	})},
	{define(gauge, "time_to_full_seconds", "When the COW device, or its file system, is full at that rate. Absent: not within 10 years, or not known yet."), one(func(e *monitor.Element) (float64, bool) {
		if !grows(e) || e.Rates.SecondsToFull == nil {
			return 0, false
		}
		return *e.Rates.SecondsToFull, true
	})},
	{define(gauge, "time_to_full_window_seconds", "What the forecast rests on."), one(func(e *monitor.Element) (float64, bool) {
		return e.Rates.WindowSeconds, grows(e)
	})},

	{define(gauge, "merge_running", "1 while the merge is running, 0 when it is paused, done, failed or stopped."), one(merged(func(m *api.TreeMerge) float64 { return truth(m.State == api.MergeRunning) }))},
	{define(gauge, "merge_paused", "1 while the merge is paused."), one(merged(func(m *api.TreeMerge) float64 { return truth(m.State == api.MergePaused) }))},
	{define(gauge, "merge_failed", "1 if the last step of the merge failed."), one(merged(func(m *api.TreeMerge) float64 { return truth(m.State == api.MergeFailed) }))},
	{define(gauge, "merge_copied_bytes", "Bytes that the merge has copied."), one(merged(func(m *api.TreeMerge) float64 { return float64(m.CopiedBytes) }))},
	{define(gauge, "merge_total_bytes", "Bytes that the merge copies in all."), one(merged(func(m *api.TreeMerge) float64 { return float64(m.TotalBytes) }))},
}

const sector = 512

func one(of func(e *monitor.Element) (float64, bool)) []series { return []series{{of: of}} }

// used is a number of an export that is observed.
func used(of func(*api.Activity) uint64) func(*monitor.Element) (float64, bool) {
	return partOf(func(e *monitor.Element) *api.Activity { return e.Activity }, of)
}

func stored(of func(*api.Figures) float64) func(*monitor.Element) (float64, bool) {
	return partOf(func(e *monitor.Element) *api.Figures { return e.Figures }, of)
}

func counted(of func(*api.Counters) uint64) func(*monitor.Element) (float64, bool) {
	return partOf(func(e *monitor.Element) *api.Counters { return e.Counters }, of)
}

func merged(of func(*api.TreeMerge) float64) func(*monitor.Element) (float64, bool) {
	return partOf(func(e *monitor.Element) *api.TreeMerge { return e.Merge }, of)
}

// partOf is a number of a part of elements, which is nil where they have none.
func partOf[Part any, Number uint64 | float64](part func(*monitor.Element) *Part, of func(*Part) Number) func(*monitor.Element) (float64, bool) {
	return func(e *monitor.Element) (float64, bool) {
		p := part(e)
		if p == nil {
			return 0, false
		}
		return float64(of(p)), true
	}
}

// grows reports whether the element has a store that grows: a sealed layer does not.
func grows(e *monitor.Element) bool { return e.Figures != nil && e.Kind != api.KindCheckpoint }

func amplification(e *monitor.Element) (float64, bool) {
	a, c := e.Activity, e.Counters
	if a == nil || c == nil || a.WrittenBytes == 0 {
		return 0, false
	}
	return float64(a.WrittenBytes+c.FilledBytes) / float64(a.WrittenBytes), true
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// single adds a family of one number.
func (p *page) single(f family, value float64) {
	p.begin(f)
	p.sample(f.name, "", "", "", value)
}

// report adds the metrics of a report. err is why there is none.
func (p *page) report(r monitor.Report, err error) {
	if err != nil {
		p.single(up, 0)
		return
	}
	p.single(refused, truth(r.Error != ""))
	p.sort(r.Elements)
	kinds := map[api.Kind]int{api.KindDisk: 0, api.KindCheckpoint: 0, api.KindNode: 0}
	var disks []*histograms
	for i, e := range p.sorted {
		kinds[e.Kind]++
		if i == 0 || p.sorted[i-1].Disk != e.Disk {
			disks = append(disks, &histograms{disk: label("disk", e.Disk)})
		}
		disks[len(disks)-1].add(e)
	}
	p.begin(elements)
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		p.sample(elements.name, "", label("kind", string(kind)), "", float64(kinds[kind]))
	}
	for i := range perElement {
		p.elements(perElement[i].family, perElement[i].series)
	}
	p.histograms(disks)
	p.fileSystems(r.FileSystems)
	p.single(up, 1)
	clear(p.sorted) // a report may be large
}

// sort sorts elements by their disks and names, and makes their labels.
func (p *page) sort(all []monitor.Element) {
	p.sorted = p.sorted[:0]
	for i := range all {
		p.sorted = append(p.sorted, &all[i])
	}
	slices.SortFunc(p.sorted, func(a, b *monitor.Element) int {
		return cmp.Or(cmp.Compare(a.Disk, b.Disk), cmp.Compare(a.Name, b.Name))
	})
	p.labels = p.labels[:0]
	for _, e := range p.sorted {
		p.labels = append(p.labels, label("disk", e.Disk)+","+label("name", e.Name))
	}
}

// elements adds a family with the numbers of all elements that have them.
func (p *page) elements(f family, all []series) {
	begun := false
	for i, e := range p.sorted {
		for k := range all {
			value, has := all[k].of(e)
			if !has {
				continue
			}
			if !begun {
				p.begin(f)
				begun = true
			}
			p.sample(f.name, "", p.labels[i], all[k].label, value)
		}
	}
}

func (p *page) histograms(disks []*histograms) {
	if len(disks) == 0 {
		return
	}
	p.begin(durations)
	for _, h := range disks {
		p.histogram(durations, &h.flushes, h.disk+","+opFlush)
		p.histogram(durations, &h.reads, h.disk+","+opRead)
		p.histogram(durations, &h.writes, h.disk+","+opWrite)
	}
	p.begin(syncTimes)
	for _, h := range disks {
		p.histogram(syncTimes, &h.syncs, h.disk)
	}
	p.begin(waits)
	for _, h := range disks {
		p.histogram(waits, &h.merge, h.disk+","+reasonMerge)
		p.histogram(waits, &h.owner, h.disk+","+reasonOwner)
		p.histogram(waits, &h.reader, h.disk+","+reasonReader)
	}
}

func (p *page) fileSystems(all []monitor.FileSystem) {
	if len(all) == 0 {
		return
	}
	all = slices.SortedFunc(slices.Values(all), func(a, b monitor.FileSystem) int { return cmp.Compare(a.Path, b.Path) })
	p.begin(fsFree)
	for _, f := range all {
		p.sample(fsFree.name, "", label("path", f.Path), "", float64(f.FreeBytes))
	}
	p.begin(fsTotal)
	for _, f := range all {
		p.sample(fsTotal.name, "", label("path", f.Path), "", float64(f.TotalBytes))
	}
	known := slices.DeleteFunc(slices.Clone(all), func(f monitor.FileSystem) bool { return f.SecondsToFull == nil })
	if len(known) == 0 {
		return
	}
	p.begin(fsFull)
	for _, f := range known {
		p.sample(fsFull.name, "", label("path", f.Path), "", *f.SecondsToFull)
	}
}
