package main

import (
	"context"
	"errors"
	"slices"
)

// The states in which workloads begin, written through the server that is measured. Each block of 4 KiB is
// written once, in random order.
var (
	halfFull  = &job{name: "half", rw: "randwrite", block: 4096, depth: 16, total: originSize / 2, sync: true, seed: 1}
	halfAtOne = &job{name: "rewrite", rw: "randwrite", block: 4096, depth: 16, size: originSize / 2, sync: true, seed: 1}
)

// fioRow is a row whose figure is fio's: operations a second, or MiB a second.
type fioRow struct {
	name    string
	job     job
	fill    *job   // state it begins in; nil is an empty overlay
	changes bool   // it changes which chunks are in the overlay
	bytes   bool   // the figure is MiB/s
	own     string // the column that bars are about, "" for dmsnap
	columns []string
	bars    []bar
}

func (f fioRow) row() row {
	r := row{name: f.name, unit: "IOPS", own: f.own, columns: f.columns, bars: f.bars}
	if f.bytes {
		r.unit = "MiB/s"
	}
	r.run = func(ctx context.Context, l *lab, c contender, round int) (s sample, err error) {
		t, err := l.prepare(ctx, c, f.fill, f.changes)
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, t.close()) }()
		j := f.job
		j.seed = 100 + round // another order than the fill's, the same for all servers
		err = t.costs(&s, func() (int64, error) { return l.fioSample(ctx, j, t, f.bytes, &s) })
		return s, err
	}
	return r
}

// fioSample runs a job and puts its figures into a sample. It returns the number of requests.
func (l *lab) fioSample(ctx context.Context, j job, t *target, bytes bool, s *sample) (int64, error) {
	got, err := l.fio(ctx, j, t)
	if err == nil {
		*s = got.sample(bytes)
	}
	return got.Done, err
}

func (r fioResult) sample(bytes bool) sample {
	s := sample{Value: r.IOPS, More: map[string]float64{rateFigure: r.IOPS}}
	if bytes {
		s.Value = r.Bytes / (1 << 20)
	}
	if r.P99 > 0 {
		s.More["p99"] = r.P99
	}
	return s
}

var everyServer = []string{ours, ourRaw, qcow2, qcow2by4, cow, cowBy4, file, direct, floor}

// workloads are the rows of issue 5's table, in its order.
func workloads() []row {
	rows := []row{
		fioRow{name: "4 KiB random read, depth 16, half the chunks in the COW",
			job: job{rw: "randread", block: 4096, depth: 16, timed: true}, fill: halfFull, columns: everyServer,
			bars: append([]bar{{text: "≥ 1.5 × best COW peer", least: 1.5, peers: cowPeers},
				{text: "≥ 1.15 × nbdkit file", least: 1.15, peers: []string{file}}}, costBars(0.55, 0.6, 0.65)...),
		}.row(),
		fioRow{name: "4 KiB random read, depth 1, half the chunks in the COW",
			job: job{rw: "randread", block: 4096, depth: 1, timed: true}, fill: halfFull, columns: everyServer,
			bars: costBars(0.6, 0.6, 0.8),
		}.row(),
		fioRow{name: "4 KiB random first write, depth 16",
			job: job{rw: "randwrite", block: 4096, depth: 16, total: originSize / 2}, columns: everyServer,
			bars: append([]bar{{text: "≥ 1.5 × best durable COW peer", least: 1.5, peers: durablePeers},
				{text: "≥ 1.1 × nbdkit cow", least: 1.1, peers: volatile},
				{text: "≥ 0.93 × own raw export", least: 0.93, peers: []string{ourRaw}}}, costBars(0.67, 0.4, 0.85)...),
		}.row(),
		fioRow{name: "4 KiB random rewrite, depth 16",
			job: job{rw: "randwrite", block: 4096, depth: 16, size: originSize / 2, timed: true}, fill: halfAtOne, columns: everyServer,
			bars: append([]bar{{text: "≥ 1.2 × best COW peer", least: 1.2, peers: cowPeers}}, costBars(0.77, 0.4, 0.7)...),
		}.row(),
		fioRow{name: "64 KiB sequential first write, depth 8", bytes: true,
			job: job{rw: "write", block: 64 << 10, depth: 8}, columns: everyServer,
			bars: append([]bar{{text: "≥ 1.5 × best COW peer", least: 1.5, peers: cowPeers}}, costBars(0.6, 0.75, 1.6)...),
		}.row(),
		fioRow{name: "4 KiB random first write, depth 1, flush after each",
			job: job{rw: "randwrite", block: 4096, depth: 1, flush: true, limited: true}, columns: everyServer,
			bars: []bar{{text: "≥ 1.3 × best durable COW peer", least: 1.3, peers: durablePeers}},
		}.row(),
		originRow("4 KiB random write to the origin, 1 snapshot, depth 16", 1, 0.6),
		originRow("4 KiB random write to the origin, 4 snapshots, depth 16", 4, 0.3),
		fioRow{name: "sequential read of a snapshot, 1 MiB, depth 4", bytes: true,
			job: job{rw: "read", block: 1 << 20, depth: 4, timed: true}, fill: halfFull, columns: everyServer,
			bars: append([]bar{{text: "≥ 1.0 × best COW peer", least: 1, peers: cowPeers}}, costBars(0.85, 0.6, 1.05)...),
		}.row(),
		fioRow{name: "16 clients at once, 4 KiB, mixed 70/30, depth 4 each",
			job:  job{rw: "randrw", block: 4096, depth: 4, clients: 16, mix: 70, timed: true, latency: true},
			fill: halfFull, changes: true, columns: everyServer,
			bars: []bar{{text: "≥ 1.2 × best COW peer", least: 1.2, peers: cowPeers},
				{text: "p99 no worse than the best COW peer's", least: 1, peers: cowPeers, figure: "p99"}},
		}.row(),
		mergeRow("offline merge, 512 MiB of random 4 KiB chunks into 2 GiB", scattered,
			[]bar{{text: "≥ 3 × qemu-img commit", least: 3, peers: durablePeers},
				{text: "≥ 0.85 × copying in order with fsync", least: 0.85, peers: []string{direct}}}),
		mergeRow("offline merge, 512 MiB contiguous", contiguous,
			[]bar{{text: "≥ 0.95 × copying in order with fsync", least: 0.95, peers: []string{direct}}}),
		liveMergeRow(),
		volumeRow("4 KiB random read of a logical volume, depth 16", job{rw: "randread", block: 4096, depth: 16, timed: true}, false),
		volumeRow("sequential read of a logical volume, 1 MiB, depth 4", job{rw: "read", block: 1 << 20, depth: 4, timed: true}, true),
	}
	return slices.Concat(rows, leanRows(), vhostRows(), guestRows(), fuseRows(), exportRows(), sourceRows(), processRows(), largeRows())
}
