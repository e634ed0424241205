// Package monitor turns what a server reports, again and again, into rates, forecasts and alerts.
//
//	var s monitor.Sampler
//	for range ticker {
//		report := s.Step(time.Now(), tree) // an api.Tree
//		for _, a := range alerts.Step(report) {
//			...
//		}
//	}
//
// A [Watcher] does that in the background, for several readers: its Run makes reports, [Watcher.Latest] returns the last one.
//
// # Guarantees
//
//   - The package sends no requests by itself, and reads nothing but the free space of the file systems that hold the files
//     of layers. What a report says is of the moment at which the caller's function read the tree.
//   - The methods of a Watcher may be called concurrently, Run once. A [Sampler], [Alerts] and a [Window] belong to one
//     goroutine. A [Report] that was returned is not changed any more.
//   - The only errors are those of the function that reads the tree. After one, Latest returns the last report with that
//     error, and the next step tries again.
//   - An alert begins once and ends once, with a margin, however often the number crosses its threshold in between. A
//     forecast is absent until there is enough to base it on.
//   - Memory is bounded: at most 64 samples for each element of the last tree.
package monitor

import "time"

// A Window remembers how a number grew for the last Span, and says how fast it grows. The zero value has no samples and
// a span of 5 minutes.
type Window struct {
	Span    time.Duration
	samples []sample // ascending in time
}

type sample struct {
	at    time.Time
	value float64
}

const (
	defaultSpan = 5 * time.Minute
	maxSamples  = 64
)

// Add adds a sample. A value that is smaller than the one before begins a new window: something was removed, and what was
// before says nothing about the future. Samples that are not earlier are replaced, and
// so is the last one where it is close to the one before, which bounds their number.
func (w *Window) Add(at time.Time, value float64) {
	if w.Span == 0 {
		w.Span = defaultSpan
	}
	n := len(w.samples)
	if n > 0 && value < w.samples[n-1].value {
		n = 0
	}
	if n > 1 && w.samples[n-1].at.Sub(w.samples[n-2].at) < w.Span/maxSamples {
		n--
	}
	for n > 0 && !at.After(w.samples[n-1].at) {
		n--
	}
	w.samples = w.samples[:n]
	w.samples = append(w.samples, sample{at, value})
	// The window begins with the last sample that is at least Span old.
	first := 0
	for first+1 < len(w.samples) && at.Sub(w.samples[first+1].at) >= w.Span {
		first++
	}
	w.samples = w.samples[:copy(w.samples, w.samples[first:])]
}

// Same adds the last sample once more.
func (w *Window) Same(at time.Time) {
	if n := len(w.samples); n > 0 {
		w.Add(at, w.samples[n-1].value)
	}
}

// Rate returns the growth for each second, and the time that it was measured over: 0 and 0 with fewer than two samples.
func (w *Window) Rate() (perSecond float64, over time.Duration) {
	if len(w.samples) < 2 {
		return 0, 0
	}
	first, last := w.samples[0], w.samples[len(w.samples)-1]
	over = last.at.Sub(first.at)
	return (last.value - first.value) / over.Seconds(), over
}
