package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
)

// A job is one run of fio.
type job struct {
	name    string
	rw      string // fio's word: randread, randwrite, write, read, randrw
	block   int    // bytes of a request
	depth   int    // requests under way, of each client
	clients int    // connections; 0 is 1
	size    int64  // bytes of the disk it works in; 0 is the lab's origin
	total   int64  // bytes to transfer; 0: size of a job that is not timed
	timed   bool   // go on for the run's seconds, whatever has been transferred
	limited bool   // not timed, but ends after the run's seconds at the latest
	flush   bool   // after each write, and wait for it
	sync    bool   // at the end
	mix     int    // percent of reads
	seed    int
	uris    []string // a job for each, instead of the target's
	latency bool     // measure how long requests take; costs the client something
}

// fioArgs is fio's command line for a job on a target. Random writes that are not timed go to each block once:
// fio keeps a map of what it has been to.
func (l *lab) fioArgs(j job, t *target) []string {
	a := []string{"--output-format=json", "--rw=" + j.rw,
		"--bs=" + strconv.Itoa(j.block), "--iodepth=" + strconv.Itoa(j.depth),
		"--randrepeat=1", "--randseed=" + strconv.Itoa(1000+j.seed)}
	if j.uris != nil {
		a = append(a, "--ioengine=nbd")
	} else if t.path != "" {
		// Left alone, fio drops a file's pages from the cache first.
		a = append(a, "--ioengine=psync", "--filename="+t.path, "--invalidate=0")
		if t.mount != "" {
			a = append(a, "--direct=1")
		}
	} else {
		a = append(a, "--ioengine=nbd", "--uri="+t.uri)
	}
	size := j.size
	if size == 0 {
		size = l.origin
	}
	a = append(a, "--size="+strconv.FormatInt(size, 10))
	seconds := fmt.Sprintf("--runtime=%dms", int64(l.seconds*1000))
	switch {
	case j.timed:
		a = append(a, "--time_based", seconds, "--norandommap")
	case j.limited:
		a = append(a, seconds)
	}
	if j.total > 0 {
		a = append(a, "--io_size="+strconv.FormatInt(j.total, 10))
	}
	if j.flush {
		a = append(a, "--fsync=1")
	}
	if j.sync {
		a = append(a, "--end_fsync=1")
	}
	if j.mix > 0 {
		a = append(a, "--rwmixread="+strconv.Itoa(j.mix))
	}
	if j.clients > 1 {
		a = append(a, "--numjobs="+strconv.Itoa(j.clients), "--group_reporting")
	}
	if !j.latency {
		a = append(a, "--gtod_reduce=1")
	}
	if j.uris == nil {
		return append(a, "--name=bench")
	}
	for i, uri := range j.uris { // what is before the first name is common to all
		a = append(a, fmt.Sprintf("--name=job%d", i), "--uri="+uri)
	}
	return a
}

// A fioResult is what of fio's report is used.
type fioResult struct {
	IOPS  float64 // reads and writes
	Bytes float64 // a second
	P99   float64 // seconds: the worse of reads and writes, 0 when not measured
	Done  int64   // requests, flushes not among them
}

// A fioRun is fio at work.
type fioRun struct {
	cmd             *exec.Cmd
	out, complaints bytes.Buffer
}

func (l *lab) startFio(ctx context.Context, j job, t *target) (*fioRun, error) {
	r := &fioRun{cmd: exec.CommandContext(ctx, "fio", l.fioArgs(j, t)...)}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.complaints
	return r, r.cmd.Start()
}

// fio runs a job to its end.
func (l *lab) fio(ctx context.Context, j job, t *target) (fioResult, error) {
	r, err := l.startFio(ctx, j, t)
	if err == nil {
		err = r.cmd.Wait()
	}
	if err != nil {
		return fioResult{}, fmt.Errorf("%q: %w\n%s%s", r.cmd.Args, err, r.complaints.Bytes(), tail(r.out.Bytes(), 500))
	}
	return parseFio(r.out.Bytes())
}

// tail is the end of b.
func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// fioReport is the part of fio's JSON that is looked at.
type fioReport struct {
	Jobs []struct {
		Error       int
		Read, Write fioSide
	}
}

type fioSide struct {
	IOPS    float64 `json:"iops"`
	Bytes   float64 `json:"bw_bytes"`
	Total   int64   `json:"total_ios"`
	Latency struct {
		Percentile map[string]float64 `json:"percentile"` // nanoseconds
	} `json:"clat_ns"`
}

// parseFio reads what fio printed with --output-format=json. Lines of warnings may come first.
func parseFio(out []byte) (fioResult, error) {
	at := bytes.IndexByte(out, '{')
	if at < 0 {
		return fioResult{}, fmt.Errorf("fio printed no JSON: %q", tail(out, 500))
	}
	var report fioReport
	if err := json.NewDecoder(bytes.NewReader(out[at:])).Decode(&report); err != nil {
		return fioResult{}, fmt.Errorf("what fio printed: %w", err)
	}
	if len(report.Jobs) == 0 {
		return fioResult{}, errors.New("fio reports no job")
	}
	var r fioResult
	for _, j := range report.Jobs {
		if j.Error != 0 {
			return fioResult{}, fmt.Errorf("fio reports error %d", j.Error)
		}
		for _, s := range []fioSide{j.Read, j.Write} {
			r.IOPS += s.IOPS
			r.Bytes += s.Bytes
			r.Done += s.Total
			r.P99 = max(r.P99, s.Latency.Percentile["99.000000"]/1e9)
		}
	}
	if r.Done == 0 {
		return fioResult{}, errors.New("fio did nothing")
	}
	return r, nil
}
