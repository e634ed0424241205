// Package metrics shows what a server reports to Prometheus.
//
//	h := metrics.Handler(func() (monitor.Report, error) { ... })
//	http.Handle("/metrics", h)
//
// Counters are those of the report that the function returns for each scrape, so they are as new as that. Durations are
// histograms for each disk, not for each node: a thousand nodes stay some twenty thousand numbers. Nothing in this package
// touches the path of a request. It depends on the Prometheus client library, and nothing of the library depends on it.
package metrics

import (
	"cmp"
	"maps"
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// Handler answers scrapes with the metrics of the report that latest returns, of this process and of the Go runtime.
// latest may be called concurrently. When it fails, dmsnap_up is 0 and there are no others.
func Handler(latest func() (monitor.Report, error)) http.Handler {
	process := prometheus.NewRegistry()
	process.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(gatherer{latest, process}, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// gatherer is a prometheus.Gatherer. It makes the families of a report itself: a registry checks, hashes and sorts each of
// some 30,000 numbers at each scrape, which takes most of its time (docs/decisions/0013-metrics.md).
type gatherer struct {
	latest  func() (monitor.Report, error)
	process prometheus.Gatherer
}

// Gather returns the families in the order of their names.
func (g gatherer) Gather() ([]*dto.MetricFamily, error) {
	list, err := g.process.Gather()
	list = append(list, g.families()...)
	slices.SortFunc(list, func(a, b *dto.MetricFamily) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return list, err
}

const (
	gauge   = dto.MetricType_GAUGE
	counter = dto.MetricType_COUNTER
	times   = dto.MetricType_HISTOGRAM
)

// Labels with fixed values.
var (
	opRead, opWrite, opFlush               = label("op", "read"), label("op", "write"), label("op", "flush")
	reasonFilled, reasonPreserved          = label("reason", "filled"), label("reason", "preserved")
	reasonMerge, reasonOwner, reasonReader = label("reason", "merge"), label("reason", "owner"), label("reason", "reader")
)

// The metrics.
var (
	up       = define(gauge, "up", "1 if the server answered.")
	refused  = define(gauge, "changes_refused", "1 if the tree accepts no changes because its state could not be recorded.")
	elements = define(gauge, "elements", "Disks, checkpoints and nodes (snapshots) that there are.")

	healthy     = define(gauge, "healthy", "0 if the element failed: see its error in the tree.")
	connections = define(gauge, "export_connections", "NBD connections to the export.")
	requests    = define(counter, "export_requests_total", "Requests to the export, whatever way they took.")
	bytes       = define(counter, "export_bytes_total", "Bytes that were read, or written, zeroed and discarded.")
	errors      = define(counter, "export_errors_total", "Requests that failed.")

	storeSize      = define(gauge, "store_size_bytes", "Size of the COW device.")
	storeAllocated = define(gauge, "store_allocated_bytes", "Bytes of the COW device that are allocated.")
	storeMetadata  = define(gauge, "store_metadata_bytes", "Bytes of the COW device that are metadata.")
	storeFill      = define(gauge, "store_fill_ratio", "Allocated of size, 0 to 1.")
	exceptions     = define(gauge, "store_exceptions", "Exceptions, which are chunks in the COW device.")
	valid          = define(gauge, "store_valid", "0 if the snapshot is invalid: its content is lost.")
	full           = define(gauge, "store_full", "1 if the last write that needed space found none.")
	copied         = define(counter, "store_copied_bytes_total", "Bytes copied into the COW device: preserved before the origin changed, or filled in around a write.")
	amplification  = define(gauge, "store_write_amplification", "Bytes written to the COW device for each byte that clients wrote, metadata not counted.")
	syncs          = define(counter, "store_syncs_total", "Requests to make exceptions durable.")
	noRoom         = define(counter, "store_no_room_total", "Writes that found no space, each time.")

	fillRate   = define(gauge, "store_fill_bytes_per_second", "How fast the COW device fills, over dmsnap_time_to_full_window_seconds.")
	timeToFull = define(gauge, "time_to_full_seconds", "When the COW device, or its file system, is full at that rate. Absent: not within 10 years, or not known yet.")
	window     = define(gauge, "time_to_full_window_seconds", "What the forecast rests on.")

	merging     = define(gauge, "merge_running", "1 while the merge is running, 0 when it is paused, done, failed or stopped.")
	mergeFailed = define(gauge, "merge_failed", "1 if the last step of the merge failed.")
	mergeCopied = define(gauge, "merge_copied_bytes", "Bytes that the merge has copied.")
	mergeTotal  = define(gauge, "merge_total_bytes", "Bytes that the merge copies in all.")

	durations = define(times, "request_duration_seconds", "Durations of requests to the exports of a disk, waiting included.")
	syncTimes = define(times, "sync_duration_seconds", "Durations of rounds that make exceptions durable, of all stores of a disk.")
	waits     = define(times, "wait_duration_seconds", "How long requests waited, by reason: owner (another request makes an exception for the same chunk), reader (an origin write waits for reads), merge (merge steps and writes wait for each other).")

	fsFree  = define(gauge, "filesystem_free_bytes", "Free bytes of a file system that holds COW files.")
	fsTotal = define(gauge, "filesystem_size_bytes", "Size of a file system that holds COW files.")
	fsFull  = define(gauge, "filesystem_time_to_full_seconds", "When it is full at the rate at which the COW files on it grow.")
)

// families returns the metrics of one report.
func (g gatherer) families() []*dto.MetricFamily {
	r, err := g.latest()
	c := newCollection()
	c.number(up, truth(err == nil))
	if err != nil {
		return c.made()
	}
	c.number(refused, truth(r.Error != ""))
	sorted := make([]*monitor.Element, len(r.Elements))
	for i := range r.Elements {
		sorted[i] = &r.Elements[i]
	}
	slices.SortFunc(sorted, func(a, b *monitor.Element) int {
		return cmp.Or(cmp.Compare(a.Disk, b.Disk), cmp.Compare(a.Name, b.Name))
	})
	kinds := map[api.Kind]int{api.KindDisk: 0, api.KindCheckpoint: 0, api.KindNode: 0}
	disks := map[string]*histograms{}
	for _, e := range sorted {
		kinds[e.Kind]++
		c.element(e)
		h := disks[e.Disk]
		if h == nil {
			h = &histograms{}
			disks[e.Disk] = h
		}
		h.add(e)
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		c.number(elements, float64(kinds[kind]), label("kind", string(kind)))
	}
	for _, name := range slices.Sorted(maps.Keys(disks)) {
		h, disk := disks[name], label("disk", name)
		c.histogram(durations, h.flushes, disk, opFlush)
		c.histogram(durations, h.reads, disk, opRead)
		c.histogram(durations, h.writes, disk, opWrite)
		c.histogram(syncTimes, h.syncs, disk)
		c.histogram(waits, h.merge, disk, reasonMerge)
		c.histogram(waits, h.owner, disk, reasonOwner)
		c.histogram(waits, h.reader, disk, reasonReader)
	}
	fileSystems := slices.SortedFunc(slices.Values(r.FileSystems), func(a, b monitor.FileSystem) int { return cmp.Compare(a.Path, b.Path) })
	for _, f := range fileSystems {
		path := label("path", f.Path)
		c.number(fsFree, float64(f.FreeBytes), path)
		c.number(fsTotal, float64(f.TotalBytes), path)
		if f.SecondsToFull != nil {
			c.number(fsFull, *f.SecondsToFull, path)
		}
	}
	return c.made()
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// element adds the metrics of one element. Elements, and labels of one metric, come in ascending order.
func (c collection) element(e *monitor.Element) {
	own := [2]*dto.LabelPair{label("disk", e.Disk), label("name", e.Name)}
	with := func(third *dto.LabelPair) []*dto.LabelPair { return []*dto.LabelPair{own[0], own[1], third} }
	set := func(m metric, value float64) { c.number(m, value, own[:]...) }
	count := func(m metric, value uint64) { set(m, float64(value)) }
	set(healthy, truth(e.State != api.ElementFailed))
	if a := e.Activity; a != nil {
		set(connections, float64(e.Connections))
		flush, read, write := with(opFlush), with(opRead), with(opWrite)
		c.number(requests, float64(a.Flushes.Count), flush...)
		c.number(requests, float64(a.Reads.Count), read...)
		c.number(requests, float64(a.Writes.Count), write...)
		c.number(bytes, float64(a.ReadBytes), read...)
		c.number(bytes, float64(a.WrittenBytes), write...)
		count(errors, a.Errors)
	}
	if f := e.Figures; f != nil {
		const sector = 512
		set(storeSize, float64(f.TotalSectors)*sector)
		set(storeAllocated, float64(f.SectorsAllocated)*sector)
		set(storeMetadata, float64(f.MetadataSectors)*sector)
		set(storeFill, f.Percent/100)
		count(exceptions, f.Exceptions)
		set(valid, truth(f.State != api.StateInvalid))
		set(full, truth(f.Full))
	}
	if e.Figures != nil && e.Kind != api.KindCheckpoint { // a sealed layer does not grow
		set(fillRate, e.Rates.FillBytes)
		set(window, e.Rates.WindowSeconds)
		if e.Rates.SecondsToFull != nil {
			set(timeToFull, *e.Rates.SecondsToFull)
		}
	}
	if k := e.Counters; k != nil {
		c.number(copied, float64(k.FilledBytes), with(reasonFilled)...)
		c.number(copied, float64(k.PreservedBytes), with(reasonPreserved)...)
		count(syncs, k.Syncs)
		count(noRoom, k.NoRoom)
		if a := e.Activity; a != nil && a.WrittenBytes > 0 {
			set(amplification, float64(a.WrittenBytes+k.FilledBytes)/float64(a.WrittenBytes))
		}
	}
	if m := e.Merge; m != nil {
		set(merging, truth(m.State == api.MergeRunning))
		set(mergeFailed, truth(m.State == api.MergeFailed))
		set(mergeCopied, float64(m.CopiedBytes))
		set(mergeTotal, float64(m.TotalBytes))
	}
}
