// Package latency counts how long things took, in a histogram that costs a few nanoseconds for each.
//
//	var r latency.Recorder
//	begin := latency.Now()
//	err := dev.Flush()
//	r.Add(begin.Since())
//	h := r.Histogram() // a copy, in plain numbers
//
// # Guarantees
//
//   - A [Recorder] is ready in its zero value, must not be copied after its first use, and may be used concurrently: Add is
//     two atomic additions, without a lock or an allocation.
//   - A [Histogram] is plain numbers that change no more. Its Count is the sum of its buckets. A duration that is added
//     while it is made may be in Buckets and not yet in Total, or the other way round.
//   - Buckets have fixed bounds, powers of two from 1 µs to 8.4 s, so that histograms can be added ([Histogram.Plus]).
//   - Nothing here returns an error. A duration below 0 is counted in the first bucket.
package latency

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Buckets is the number of buckets of a histogram.
const Buckets = 25

// Bound returns what bucket i counts: durations shorter than this, and not shorter than Bound(i-1). It is 2^i
// microseconds, from 1 µs to 8.4 s; the last bucket has no bound, and Bound returns the longest duration.
func Bound(i int) time.Duration {
	if i >= Buckets-1 {
		return 1<<63 - 1
	}
	return time.Microsecond << i
}

// A Histogram says how often something happened and how long it took.
type Histogram struct {
	Count   uint64
	Total   time.Duration // the sum of all durations
	Buckets [Buckets]uint64
}

// Mean returns the mean duration, 0 when nothing was counted.
func (h Histogram) Mean() time.Duration {
	if h.Count == 0 {
		return 0
	}
	return h.Total / time.Duration(h.Count)
}

// Plus returns the sum of two histograms.
func (h Histogram) Plus(g Histogram) Histogram {
	h.Count += g.Count
	h.Total += g.Total
	for i, n := range g.Buckets {
		h.Buckets[i] += n
	}
	return h
}

// A Recorder makes a histogram.
type Recorder struct {
	total   atomic.Int64
	buckets [Buckets]atomic.Uint64
}

// Add counts one duration.
func (r *Recorder) Add(d time.Duration) {
	r.total.Add(int64(d))
	r.buckets[bucket(d)].Add(1)
}

// bucket is the bucket that counts d.
func bucket(d time.Duration) int {
	return min(bits.Len64(uint64(max(d, 0)/time.Microsecond)), Buckets-1)
}

// Histogram returns what was counted so far. What is added meanwhile may be in its buckets and not yet in its total, or
// the other way round; Count is always the sum of the buckets.
func (r *Recorder) Histogram() Histogram {
	h := Histogram{Total: time.Duration(r.total.Load())}
	for i := range r.buckets {
		n := r.buckets[i].Load()
		h.Buckets[i] = n
		h.Count += n
	}
	return h
}

// started is what instants are counted from: reading the monotonic clock alone takes half the time of time.Now.
var started = time.Now()

// An Instant is a point in time of the monotonic clock.
type Instant time.Duration

// Now returns the present instant.
func Now() Instant { return Instant(time.Since(started)) }

// Since returns the time from i until now.
func (i Instant) Since() time.Duration { return time.Duration(Now() - i) }
