package fleet

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
)

// The figures of a fleet: go test -run - -bench . ./fleet. Nodes are over a disk of 1 MiB unless said otherwise, so that the
// copies are small; what is measured does not depend on the size of a disk.

// percentiles reports the durations of an operation.
func percentiles(b *testing.B, took []time.Duration) {
	b.Helper()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(took[len(took)-1].Microseconds()), "max-µs")
}

// thousand makes a fleet of 1,000 nodes with three layers each: two sealed ones that are their own, and a top.
func thousand(b *testing.B) *testFleet {
	b.Helper()
	f := newFleet(b, Options{})
	for i := range 1000 {
		name := fmt.Sprint("n", i)
		f.fork("golden", name)
		dev := f.nodes[name].dev
		for layer := range 3 {
			put(b, dev, int64(layer)*8192, name)
			if layer < 2 {
				f.checkpoint(fmt.Sprint("c", layer), name)
			}
		}
	}
	for _, err := range f.flushAll() {
		if err != nil {
			b.Fatal(err)
		}
	}
	return f
}

// BenchmarkForkAndCheckpoint measures both with 1,000 nodes present; the forked nodes are idle.
func BenchmarkForkAndCheckpoint(b *testing.B) {
	f := thousand(b)
	for name, op := range map[string]func(i int) error{
		"fork-node": func(i int) error {
			_, err := f.Fork(context.Background(), api.ForkRequest{From: fmt.Sprint("n", i%1000), Name: fmt.Sprint("f", time.Now().UnixNano())})
			return err
		},
		"fork-checkpoint": func(i int) error {
			_, err := f.Fork(context.Background(), api.ForkRequest{From: fmt.Sprintf("n%d@c1", i%1000), Name: fmt.Sprint("g", time.Now().UnixNano())})
			return err
		},
		"checkpoint": func(i int) error {
			_, err := f.Checkpoint(context.Background(), api.CheckpointRequest{Nodes: []string{fmt.Sprint("n", i%1000)}, Name: fmt.Sprint(time.Now().UnixNano())})
			return err
		},
	} {
		b.Run(name, func(b *testing.B) {
			var took []time.Duration
			for i := 0; b.Loop(); i++ {
				begin := time.Now()
				if err := op(i); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(begin))
			}
			percentiles(b, took)
		})
	}
}

// addSparse adds a disk that is one hole.
func (f *testFleet) addSparse(name string, size int64, writable bool) {
	f.t.Helper()
	path := filepath.Join(filepath.Dir(f.golden), name+".img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		f.t.Fatal(err)
	}
	if _, err := f.AddDisk(context.Background(), api.AddDiskRequest{Name: name, Source: path, Raw: true, Writable: writable}); err != nil {
		f.t.Fatal(err)
	}
}

// BenchmarkStart opens 1,000 nodes with three layers each, and reports what a node uses of memory.
func BenchmarkStart(b *testing.B) {
	f := thousand(b)
	f.stop()
	for b.Loop() {
		debug.FreeOSMemory()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		resident, used := residentBytes(b), processorTime(b)
		begin := time.Now()
		g, err := Open(f.dir, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(time.Since(begin).Milliseconds()), "start-ms")
		b.ReportMetric(float64((processorTime(b) - used).Milliseconds()), "start-cpu-ms")
		debug.FreeOSMemory()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1000/1024, "heap-KiB/node")
		b.ReportMetric(float64(residentBytes(b)-resident)/1000/1024, "resident-KiB/node")
		if err := g.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// processorTime is what the process has used: on a busy machine it says more than the time that has passed.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// residentBytes is the memory of the process.
func residentBytes(b *testing.B) int64 {
	b.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// BenchmarkBaseWrite writes 4 KiB to places of a disk that were not written yet, with one node over it and with 1,000.
func BenchmarkBaseWrite(b *testing.B) {
	for _, children := range []int{1, 1000} {
		b.Run(fmt.Sprint("children-", children), func(b *testing.B) {
			const size = 256 << 20
			f := newFleet(b, Options{})
			f.addSparse("base", size, true)
			for i := range children {
				f.fork("base", fmt.Sprint("n", i))
			}
			var dev block.Device = f.disks["base"].origin
			off := int64(0)
			for b.Loop() {
				if _, err := dev.WriteAt(make([]byte, 4096), off); err != nil {
					b.Fatal(err)
				}
				off = (off + 4096) % size
			}
		})
	}
}
