package metrics

import (
	dto "github.com/prometheus/client_model/go"

	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// histograms are those of a disk: the sums of its elements'.
type histograms struct {
	reads, writes, flushes, syncs, owner, reader, merge histogram
}

func (h *histograms) add(e *monitor.Element) {
	if a := e.Activity; a != nil {
		h.reads.add(a.Reads)
		h.writes.add(a.Writes)
		h.flushes.add(a.Flushes)
	}
	if c := e.Counters; c != nil {
		h.syncs.add(c.Rounds)
		h.owner.add(c.OwnerWaits)
		h.reader.add(c.ReadWaits)
		h.merge.add(c.MergeWaits)
	}
}

// A histogram is a sum of api.Latency.
type histogram struct {
	count   uint64
	seconds float64
	buckets [latency.Buckets]uint64
}

func (h *histogram) add(l api.Latency) {
	h.count += l.Count
	h.seconds += l.Seconds
	i := 0
	for _, b := range l.Buckets { // ascending; the last one may have no bound
		for i < latency.Buckets-1 && (b.Below == 0 || bounds[i] < b.Below*0.999) {
			i++
		}
		h.buckets[i] += b.Count
	}
}

// bounds are the upper bounds of the buckets in seconds, without the last bucket, which has none.
var bounds = func() (list [latency.Buckets - 1]float64) {
	for i := range list {
		list[i] = latency.Bound(i).Seconds()
	}
	return list
}()

// histogram adds a histogram.
func (c collection) histogram(m metric, h histogram, labels ...*dto.LabelPair) {
	buckets := make([]*dto.Bucket, len(bounds))
	sum := uint64(0)
	for i := range bounds {
		sum += h.buckets[i]
		buckets[i] = &dto.Bucket{UpperBound: &bounds[i], CumulativeCount: new(sum)}
	}
	c[m].Metric = append(c[m].Metric, &dto.Metric{Label: labels, Histogram: &dto.Histogram{
		SampleCount: new(sum + h.buckets[latency.Buckets-1]), SampleSum: &h.seconds, Bucket: buckets}})
}
