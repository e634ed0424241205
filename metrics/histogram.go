package metrics

import (
	"strconv"

	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// histograms are those of a disk: the sums of its elements'.
type histograms struct {
	disk                                                string // the label
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
	seconds float64
	buckets [latency.Buckets]uint64
}

func (h *histogram) add(l api.Latency) {
	h.seconds += l.Seconds
	i := 0
	for _, b := range l.Buckets { // ascending; the last one may have no bound
		for i < latency.Buckets-1 && (b.Below == 0 || bounds[i] < b.Below*0.999) {
			i++
		}
		h.buckets[i] += b.Count
	}
}

// bounds are the upper bounds of the buckets in seconds, without the last bucket, which has none; boundLabels are the labels of all.
var bounds, boundLabels = func() (list [latency.Buckets - 1]float64, labels [latency.Buckets]string) {
	for i := range list {
		list[i] = latency.Bound(i).Seconds()
		labels[i] = label("le", strconv.FormatFloat(list[i], 'g', -1, 64))
	}
	labels[latency.Buckets-1] = label("le", "+Inf")
	return list, labels
}()

// histogram adds a histogram.
func (t *text) histogram(f family, h *histogram, labels string) {
	sum := uint64(0)
	for i, n := range h.buckets {
		sum += n
		t.sample(f.name, "_bucket", labels, boundLabels[i], float64(sum))
	}
	t.sample(f.name, "_sum", labels, "", h.seconds)
	t.sample(f.name, "_count", labels, "", float64(sum))
}
