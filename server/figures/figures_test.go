package figures_test

import (
	"slices"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
)

func TestLatency(t *testing.T) {
	var r latency.Recorder
	for _, d := range []time.Duration{0, 3 * time.Microsecond, 3 * time.Microsecond, time.Hour} {
		r.Add(d)
	}
	got := figures.Latency(r.Histogram())
	want := []api.Bucket{{Below: 1e-6, Count: 1}, {Below: 4e-6, Count: 2}, {Below: 0, Count: 1}}
	if got.Count != 4 || !slices.Equal(got.Buckets, want) || got.Seconds < 3600 || got.Seconds > 3600.1 {
		t.Errorf("%+v, want 4 in %+v", got, want)
	}
}
