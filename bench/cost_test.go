package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/bench/load"
	"github.com/dmsnap/dmsnap/internal/testhost"
)

func TestParseStat(t *testing.T) {
	const line = "7 (a) b) S 1 7 7 0 -1 4194304 99 0 0 0 250 50 0 0 20 0 5 0 99 1 2"
	if got, err := parseStat([]byte(line)); err != nil || got != 3*time.Second {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "7 (a) S 1", "7 (a) S 1 7 7 0 -1 4194304 99 0 0 0 x 50 0"} {
		if got, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: %v and no error", bad, got)
		}
	}
}

// TestShareBars: a bar of CPU time is a share of the peer's, and less of it is better.
func TestShareBars(t *testing.T) {
	costing := func(server string, cpu ...float64) column {
		c := column{Server: server}
		for _, v := range cpu {
			c.Samples = append(c.Samples, sample{Value: 1, More: map[string]float64{cpuFigure: v, rateFigure: 1}})
		}
		c.sum()
		return c
	}
	r := rowResult{Columns: []column{costing(ours, 5, 6, 7), costing(qcow2, 20, 20, 20), costing(qcow2by4, 10, 10, 10), costing(file, 6, 6, 6)}}
	r.judge(costBars(0.5, 0.6, 0.9))
	if got := r.Bars[0]; !got.Absent {
		t.Errorf("without nbdkit: %+v", got)
	}
	if got := r.Bars[1]; got.Peer != qcow2by4 || got.Ratio != 0.6 || got.Low != 0.5 || got.High != 0.7 || !got.Reached || got.Bar != "CPU ≤ 0.6 × best qcow2" {
		t.Errorf("%+v", got)
	}
	if got := r.Bars[2]; got.Ratio != 1 || got.Reached {
		t.Errorf("%+v", got)
	}
	var out bytes.Buffer
	if err := (&report{Rows: []rowResult{r}}).printCosts(&out); err != nil || !bytes.Contains(out.Bytes(), []byte("6 [5–7] µs; 1/s")) {
		t.Errorf("%v\n%s", err, out.Bytes())
	}
}

func TestSpreadIsABijection(t *testing.T) {
	for _, space := range []uint64{1, 2, 64, 1000} {
		seen := map[uint64]bool{}
		for i := range space {
			at := spread(i, space)
			if at >= space || seen[at] {
				t.Fatalf("%d of %d goes to %d", i, space, at)
			}
			seen[at] = true
		}
	}
}

// TestFloor: the floor writes and reads what is asked for, also what is longer than its buffer.
func TestFloor(t *testing.T) {
	dir := testhost.ShortDir(t)
	socket, image := filepath.Join(dir, "s"), filepath.Join(dir, "image")
	const size = 4 << 20
	if err := sparse(image, size); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serveFloor(ctx, socket, image) }()
	for deadline := time.Now().Add(time.Minute); greeting(socket) != nil; {
		if time.Now().After(deadline) {
			t.Fatal("the floor does not listen")
		}
		time.Sleep(time.Millisecond)
	}
	for _, j := range []load.Job{
		{Write: true, Block: 1 << 20, Depth: 2, Size: size, Count: 4, Random: true},
		{Block: 4096, Depth: 16, Size: size, Count: 2 * size / 4096, Random: true},
		{Block: 2 << 20, Depth: 2, Size: size, Count: 5},
		{Write: true, Block: 4096, Depth: 1, Size: size, Count: 3, Flush: true},
	} {
		if r, err := load.NBD(ctx, socket, "", j); err != nil || r.Requests != j.Count {
			t.Fatalf("%+v: %+v, %v", j, r, err)
		}
	}
	b, err := os.ReadFile(image)
	if err != nil || len(b) != size || bytes.IndexByte(b, 0) >= 0 {
		t.Errorf("%d bytes, %v, the first zero at %d", len(b), err, bytes.IndexByte(b, 0))
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
