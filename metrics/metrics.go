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
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// Handler answers scrapes with the metrics of the report that latest returns, of this process and of the Go runtime.
// latest may be called concurrently. When it fails, dmsnap_up is 0 and there are no others.
func Handler(latest func() (monitor.Report, error)) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{latest}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// collector is a prometheus.Collector.
type collector struct {
	latest func() (monitor.Report, error)
}

var (
	element = []string{"disk", "name"}
	disk    = []string{"disk"}
)

func metric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("dmsnap_"+name, help, labels, nil)
}

// The metrics.
var (
	up       = metric("up", "1 if the server answered.")
	refused  = metric("changes_refused", "1 if the tree accepts no changes because its state could not be recorded.")
	elements = metric("elements", "Disks, checkpoints and nodes (snapshots) that there are.", "kind")

	healthy     = metric("healthy", "0 if the element failed: see its error in the tree.", element...)
	connections = metric("export_connections", "NBD connections to the export.", element...)
	requests    = metric("export_requests_total", "Requests to the export, whatever way they took.", append(element, "op")...)
	bytes       = metric("export_bytes_total", "Bytes that were read, or written, zeroed and discarded.", append(element, "op")...)
	errors      = metric("export_errors_total", "Requests that failed.", element...)

	storeSize      = metric("store_size_bytes", "Size of the COW device.", element...)
	storeAllocated = metric("store_allocated_bytes", "Bytes of the COW device that are allocated.", element...)
	storeMetadata  = metric("store_metadata_bytes", "Bytes of the COW device that are metadata.", element...)
	storeFill      = metric("store_fill_ratio", "Allocated of size, 0 to 1.", element...)
	exceptions     = metric("store_exceptions", "Exceptions, which are chunks in the COW device.", element...)
	valid          = metric("store_valid", "0 if the snapshot is invalid: its content is lost.", element...)
	full           = metric("store_full", "1 if the last write that needed space found none.", element...)
	copied         = metric("store_copied_bytes_total", "Bytes copied into the COW device: preserved before the origin changed, or filled in around a write.", append(element, "reason")...)
	amplification  = metric("store_write_amplification", "Bytes written to the COW device for each byte that clients wrote, metadata not counted.", element...)
	syncs          = metric("store_syncs_total", "Requests to make exceptions durable.", element...)
	noRoom         = metric("store_no_room_total", "Writes that found no space, each time.", element...)

	fillRate   = metric("store_fill_bytes_per_second", "How fast the COW device fills, over dmsnap_time_to_full_window_seconds.", element...)
	timeToFull = metric("time_to_full_seconds", "When the COW device, or its file system, is full at that rate. Absent: not within 10 years, or not known yet.", element...)
	window     = metric("time_to_full_window_seconds", "What the forecast rests on.", element...)

	merging     = metric("merge_running", "1 while the merge is running, 0 when it is paused, done, failed or stopped.", element...)
	mergeFailed = metric("merge_failed", "1 if the last step of the merge failed.", element...)
	mergeCopied = metric("merge_copied_bytes", "Bytes that the merge has copied.", element...)
	mergeTotal  = metric("merge_total_bytes", "Bytes that the merge copies in all.", element...)

	durations = metric("request_duration_seconds", "Durations of requests to the exports of a disk, waiting included.", append(disk, "op")...)
	syncTimes = metric("sync_duration_seconds", "Durations of rounds that make exceptions durable, of all stores of a disk.", disk...)
	waits     = metric("wait_duration_seconds", "How long requests waited, by reason: owner (another request makes an exception for the same chunk), reader (an origin write waits for reads), merge (merge steps and writes wait for each other).", append(disk, "reason")...)

	fsFree  = metric("filesystem_free_bytes", "Free bytes of a file system that holds COW files.", "path")
	fsTotal = metric("filesystem_size_bytes", "Size of a file system that holds COW files.", "path")
	fsFull  = metric("filesystem_time_to_full_seconds", "When it is full at the rate at which the COW files on it grow.", "path")
)

// Describe is that of a collector whose metrics are not known beforehand.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect sends the metrics of one report.
func (c collector) Collect(to chan<- prometheus.Metric) {
	r, err := c.latest()
	s := sink{to}
	s.gauge(up, truth(err == nil))
	if err != nil {
		return
	}
	s.gauge(refused, truth(r.Error != ""))
	kinds := map[api.Kind]int{api.KindDisk: 0, api.KindCheckpoint: 0, api.KindNode: 0}
	disks := map[string]*histograms{}
	for i := range r.Elements {
		e := &r.Elements[i]
		kinds[e.Kind]++
		s.element(e)
		h := disks[e.Disk]
		if h == nil {
			h = &histograms{}
			disks[e.Disk] = h
		}
		h.add(e)
	}
	for kind, n := range kinds {
		s.gauge(elements, float64(n), string(kind))
	}
	for name, h := range disks {
		s.histogram(durations, h.reads, name, "read")
		s.histogram(durations, h.writes, name, "write")
		s.histogram(durations, h.flushes, name, "flush")
		s.histogram(syncTimes, h.syncs, name)
		s.histogram(waits, h.owner, name, "owner")
		s.histogram(waits, h.reader, name, "reader")
		s.histogram(waits, h.merge, name, "merge")
	}
	for _, f := range r.FileSystems {
		s.gauge(fsFree, float64(f.FreeBytes), f.Path)
		s.gauge(fsTotal, float64(f.TotalBytes), f.Path)
		if f.SecondsToFull != nil {
			s.gauge(fsFull, *f.SecondsToFull, f.Path)
		}
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// sink sends metrics.
type sink struct {
	to chan<- prometheus.Metric
}

func (s sink) gauge(d *prometheus.Desc, value float64, labels ...string) {
	s.to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
}

func (s sink) count(d *prometheus.Desc, value uint64, labels ...string) {
	s.to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
}

// element sends the metrics of one element.
func (s sink) element(e *monitor.Element) {
	s.gauge(healthy, truth(e.State != api.ElementFailed), e.Disk, e.Name)
	if a := e.Activity; a != nil {
		s.gauge(connections, float64(e.Connections), e.Disk, e.Name)
		s.count(requests, a.Reads.Count, e.Disk, e.Name, "read")
		s.count(requests, a.Writes.Count, e.Disk, e.Name, "write")
		s.count(requests, a.Flushes.Count, e.Disk, e.Name, "flush")
		s.count(bytes, a.ReadBytes, e.Disk, e.Name, "read")
		s.count(bytes, a.WrittenBytes, e.Disk, e.Name, "write")
		s.count(errors, a.Errors, e.Disk, e.Name)
	}
	if f := e.Figures; f != nil {
		const sector = 512
		s.gauge(storeSize, float64(f.TotalSectors)*sector, e.Disk, e.Name)
		s.gauge(storeAllocated, float64(f.SectorsAllocated)*sector, e.Disk, e.Name)
		s.gauge(storeMetadata, float64(f.MetadataSectors)*sector, e.Disk, e.Name)
		s.gauge(storeFill, f.Percent/100, e.Disk, e.Name)
		s.gauge(exceptions, float64(f.Exceptions), e.Disk, e.Name)
		s.gauge(valid, truth(f.State != api.StateInvalid), e.Disk, e.Name)
		s.gauge(full, truth(f.Full), e.Disk, e.Name)
	}
	if f := e.Figures; f != nil && e.Kind != api.KindCheckpoint { // a sealed layer does not grow
		s.gauge(fillRate, e.Rates.FillBytes, e.Disk, e.Name)
		s.gauge(window, e.Rates.WindowSeconds, e.Disk, e.Name)
		if e.Rates.SecondsToFull != nil {
			s.gauge(timeToFull, *e.Rates.SecondsToFull, e.Disk, e.Name)
		}
	}
	if c := e.Counters; c != nil {
		s.count(copied, c.PreservedBytes, e.Disk, e.Name, "preserved")
		s.count(copied, c.FilledBytes, e.Disk, e.Name, "filled")
		s.count(syncs, c.Syncs, e.Disk, e.Name)
		s.count(noRoom, c.NoRoom, e.Disk, e.Name)
		if a := e.Activity; a != nil && a.WrittenBytes > 0 {
			s.gauge(amplification, float64(a.WrittenBytes+c.FilledBytes)/float64(a.WrittenBytes), e.Disk, e.Name)
		}
	}
	if m := e.Merge; m != nil {
		s.gauge(merging, truth(m.State == api.MergeRunning), e.Disk, e.Name)
		s.gauge(mergeFailed, truth(m.State == api.MergeFailed), e.Disk, e.Name)
		s.gauge(mergeCopied, float64(m.CopiedBytes), e.Disk, e.Name)
		s.gauge(mergeTotal, float64(m.TotalBytes), e.Disk, e.Name)
	}
}
