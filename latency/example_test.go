package latency_test

import (
	"fmt"
	"time"

	"github.com/dmsnap/dmsnap/latency"
)

// A Recorder counts durations; its histogram can be added to others.
func Example() {
	var reads, writes latency.Recorder
	reads.Add(80 * time.Microsecond)
	reads.Add(120 * time.Microsecond)
	writes.Add(time.Millisecond)
	all := reads.Histogram().Plus(writes.Histogram())
	fmt.Println(all.Count, all.Mean())
	// Output: 3 400µs
}
