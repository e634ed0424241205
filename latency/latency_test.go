package latency

import (
	"sync"
	"testing"
	"time"
)

func TestBuckets(t *testing.T) {
	for _, c := range []struct {
		d    time.Duration
		want int
	}{
		{-time.Second, 0}, {0, 0}, {999, 0}, {time.Microsecond, 1}, {2*time.Microsecond - 1, 1}, {2 * time.Microsecond, 2},
		{time.Millisecond, 10}, {time.Second, 20}, {8 * time.Second, 23}, {9 * time.Second, 24}, {1<<63 - 1, 24},
	} {
		if got := bucket(c.d); got != c.want {
			t.Errorf("%v is counted in bucket %d, want %d", c.d, got, c.want)
		}
		if c.d >= 0 && c.d < 1<<62 && (c.d >= Bound(c.want) || c.want > 0 && c.d < Bound(c.want-1)) {
			t.Errorf("%v is not within the bounds of bucket %d", c.d, c.want)
		}
	}
}

func TestHistogramIsTheSum(t *testing.T) {
	var r, other Recorder
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for i := range 1000 {
				r.Add(time.Duration(i) * time.Microsecond)
			}
		})
	}
	all.Wait()
	h := r.Histogram()
	if want := 8 * 999 * 500 * time.Microsecond; h.Count != 8000 || h.Total != want || h.Mean() != want/8000 {
		t.Errorf("8000 durations of %v in all: %d of %v, mean %v", want, h.Count, h.Total, h.Mean())
	}
	if h.Buckets[0] != 8 || h.Buckets[9] != 8*256 {
		t.Errorf("below 1 µs: %d, from 256 to 511 µs: %d; want 8 and 2048", h.Buckets[0], h.Buckets[9])
	}
	other.Add(time.Minute)
	if sum := h.Plus(other.Histogram()); sum.Count != 8001 || sum.Total != h.Total+time.Minute || sum.Buckets[24] != 1 || sum.Buckets[0] != 8 {
		t.Errorf("the sum with one minute is %+v", sum)
	}
	if (Histogram{}).Mean() != 0 {
		t.Error("the mean of nothing is not 0")
	}
}

func TestInstants(t *testing.T) {
	begin, clock := Now(), time.Now()
	for time.Since(clock) < time.Millisecond {
	}
	if got, most := begin.Since(), time.Since(clock); got < time.Millisecond || got > most+time.Second {
		t.Errorf("%v since an instant %v ago", got, most)
	}
}

// BenchmarkAdd is what one measurement costs: two looks at the clock and two additions.
func BenchmarkAdd(b *testing.B) {
	var r Recorder
	for b.Loop() {
		r.Add(Now().Since())
	}
}
