package fleet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// underLoad is the size of the disk of BenchmarkCheckpointUnderLoad, in bytes.
const underLoad = 256 << 20

// BenchmarkCheckpointUnderLoad reports the longest request of four clients that write 4 KiB at random places of a disk of
// 256 MiB, over NBD, while a checkpoint is made ten times a second. Each client makes so many requests a second, in the runs
// called max as many as it can: then the clients, the server and the kernel want more than two processors have, and requests
// wait for these.
//
// The runs called files show how much of that the machine and the file system take: the same clients write to plain files
// (floor).
func BenchmarkCheckpointUnderLoad(b *testing.B) {
	for _, rate := range []int{1000, 5000, 0} {
		title := fmt.Sprint("rate-", rate)
		if rate == 0 {
			title = "rate-max"
		}
		b.Run("node/"+title, func(b *testing.B) {
			f := newFleet(b, Options{})
			f.addSparse("base", underLoad, false)
			f.fork("base", "vm")
			var pauses []time.Duration
			f.underLoad(b, "vm", rate, func(i int) {
				c, err := f.Checkpoint(context.Background(), api.CheckpointRequest{Nodes: []string{"vm"}, Name: fmt.Sprint("c", i)})
				if err != nil {
					b.Fatal(err)
				}
				pauses = append(pauses, time.Duration(c.PauseSeconds*1e9))
			})
			percentiles(b, pauses)
		})
		b.Run("files/"+title, func(b *testing.B) {
			f := newFleet(b, Options{})
			dev := &floor{dir: f.dir}
			dev.next(b)
			if err := f.nbd.Add(nbd.Export{Name: "files", Device: dev, MultiConn: true}); err != nil {
				b.Fatal(err)
			}
			done := make(chan struct{})
			var flusher sync.WaitGroup
			flusher.Go(func() { dev.flushOften(b, done) })
			f.underLoad(b, "files", rate, func(int) { dev.next(b) })
			close(done)
			flusher.Wait()
		})
	}
}

// underLoad has four clients write to an export at a rate each, and calls seal ten times a second.
func (f *testFleet) underLoad(b *testing.B, export string, rate int, seal func(i int)) {
	const clients = 4
	stop := make(chan struct{})
	var writers sync.WaitGroup
	var sealing atomic.Bool
	var mu sync.Mutex
	var beside, during []time.Duration
	for k := range clients {
		dev := f.dial(export)
		writers.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(k)))
			p := make([]byte, 4096)
			began := time.Now()
			for i := time.Duration(0); ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if rate > 0 {
					time.Sleep(time.Until(began.Add(i * time.Second / time.Duration(rate))))
				}
				begin, before := time.Now(), sealing.Load()
				if _, err := dev.WriteAt(p, r.Int64N(underLoad/4096)*4096); err != nil {
					b.Error(err)
					return
				}
				took, in := time.Since(begin), before || sealing.Load()
				mu.Lock()
				if in {
					during = append(during, took)
				} else {
					beside = append(beside, took)
				}
				mu.Unlock()
			}
		})
	}
	for i := 0; b.Loop(); i++ {
		time.Sleep(100 * time.Millisecond)
		sealing.Store(true)
		seal(i)
		sealing.Store(false)
	}
	close(stop)
	writers.Wait()
	slow, _ := slices.BinarySearch(append(slices.Sorted(slices.Values(beside)), 1<<62), 10*time.Millisecond)
	b.ReportMetric(float64(len(beside)-slow), "writes-beside-over-10-ms")
	b.ReportMetric(float64(len(beside)+len(during))/b.Elapsed().Seconds(), "writes/s")
	b.ReportMetric(float64(slices.Max(append(during, 0)).Microseconds()), "longest-write-in-checkpoint-µs")
	b.ReportMetric(float64(slices.Max(append(beside, 0)).Microseconds()), "longest-write-beside-µs")
}

// A floor is a device that writes to plain files what a node would write to its layers: each request to the next 4 KiB of a
// file. What it writes can't be read.
type floor struct {
	dir  string
	file atomic.Pointer[os.File]
	off  atomic.Int64

	mu   sync.Mutex
	left []*os.File // full ones that are not durable
	n    int
}

func (d *floor) Size() int64                           { return underLoad }
func (d *floor) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }
func (d *floor) Flush() error                          { return nil }
func (d *floor) WriteAt(p []byte, _ int64) (int, error) {
	return d.file.Load().WriteAt(p, d.off.Add(int64(len(p)))%underLoad)
}

// next has the requests from now on write to a new file, sparse as that of a layer.
func (d *floor) next(b *testing.B) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f, err := os.Create(filepath.Join(d.dir, fmt.Sprint("floor", d.n)))
	if err == nil {
		err = f.Truncate(underLoad)
	}
	if err != nil {
		b.Error(err)
		return
	}
	d.n++
	d.off.Store(0)
	if old := d.file.Swap(f); old != nil {
		d.left = append(d.left, old)
	}
}

// flushOften makes files and their names durable, as often as a fleet does that no client flushes.
func (d *floor) flushOften(b *testing.B, done chan struct{}) {
	for tick := time.NewTicker(settleEvery); ; {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		d.mu.Lock()
		left := d.left
		d.left = nil
		d.mu.Unlock()
		for _, f := range left {
			if err := f.Sync(); err != nil {
				b.Error(err)
			}
		}
		if err := block.SyncDirectory(d.dir); err != nil {
			b.Error(err)
		}
	}
}
