package main

import (
	"context"
	"errors"
	"time"

	"github.com/dmsnap/dmsnap/bench/load"
)

// leanRow is a row whose client is the lean load generator.
type leanRow struct {
	name    string
	job     load.Job // its size is the lab's origin, and its time the run's seconds, where none are given
	fill    *job     // state it begins in; nil is an empty overlay
	changes bool     // it changes which chunks are in the overlay
	bytes   bool     // the figure is MiB/s
	again   bool     // its files are read again before it; see [target.readAgain]
	own     string   // the column that bars are about, "" for dmsnap
	columns []string
	bars    []bar
}

func (r leanRow) row() row {
	unit := "requests/s"
	if r.bytes {
		unit = "MiB/s"
	}
	return row{name: r.name, unit: unit, own: r.own, columns: r.columns, bars: r.bars,
		run: func(ctx context.Context, l *lab, c contender, round int) (s sample, err error) {
			t, err := l.prepare(ctx, c, r.fill, r.changes)
			if err != nil {
				return s, err
			}
			defer func() { err = errors.Join(err, t.close()) }()
			if r.again {
				if err := t.readAgain(); err != nil {
					return s, err
				}
			}
			j := r.job
			if j.Size == 0 {
				j.Size = l.origin
			}
			if j.Count == 0 || j.Flush {
				j.Time = time.Duration(l.seconds * float64(time.Second))
			}
			j.Seed = uint64(100 + round) // another order than the fill's, the same for all servers
			err = t.costs(&s, func() (int64, error) {
				run := load.NBD
				if t.vhost {
					run = func(ctx context.Context, socket, _ string, j load.Job) (load.Result, error) {
						return load.Vhost(ctx, socket, j)
					}
				}
				got, err := run(ctx, t.server.socket, t.export, j)
				if err != nil {
					return 0, err
				}
				s.Value, s.More = got.Rate(), map[string]float64{rateFigure: got.Rate()}
				if r.bytes {
					s.Value *= float64(j.Block) / (1 << 20)
				}
				return got.Requests, nil
			})
			return s, err
		}}
}

// costBars are the bars of a server's CPU time a request: shares of what nbdkit's cow filter with blocks of 4 KiB, the better qcow2 and nbdkit's
// file plugin need.
func costBars(ofCOW, ofQcow2, ofFile float64) []bar {
	return []bar{
		{text: "CPU ≤ %g × nbdkit cow 4k", most: ofCOW, peers: []string{cowBy4}, figure: cpuFigure},
		{text: "CPU ≤ %g × best qcow2", most: ofQcow2, peers: durablePeers, figure: cpuFigure},
		{text: "CPU ≤ %g × nbdkit file", most: ofFile, peers: []string{file}, figure: cpuFigure},
	}
}

var leanServers = []string{ours, ourRaw, qcow2, qcow2by4, cow, cowBy4, file, floor}

// leanRows are the rows of the CPU time a request, once more with a client that is no limit.
func leanRows() []row {
	return []row{
		leanRow{name: "lean: 4 KiB random read, depth 16, half the chunks in the COW", columns: leanServers,
			job: load.Job{Block: 4096, Depth: 16, Random: true}, fill: halfFull, again: true, bars: costBars(0.55, 0.6, 0.65)}.row(),
		leanRow{name: "lean: 4 KiB random read, depth 1", columns: leanServers,
			job: load.Job{Block: 4096, Depth: 1, Random: true}, fill: halfFull, again: true, bars: costBars(0.6, 0.6, 0.8)}.row(),
		leanRow{name: "lean: 4 KiB random first write, depth 16", columns: leanServers,
			job: load.Job{Write: true, Block: 4096, Depth: 16, Random: true, Count: originSize / 2 / 4096}, bars: costBars(0.67, 0.4, 0.85)}.row(),
		leanRow{name: "lean: 4 KiB random rewrite, depth 16", columns: leanServers,
			job: load.Job{Write: true, Block: 4096, Depth: 16, Random: true, Size: originSize / 2}, fill: halfAtOne, bars: costBars(0.77, 0.4, 0.7)}.row(),
		leanRow{name: "lean: 64 KiB sequential first write, depth 8", bytes: true, columns: leanServers,
			job: load.Job{Write: true, Block: 64 << 10, Depth: 8, Count: originSize / (64 << 10)}, bars: costBars(0.6, 0.75, 1.6)}.row(),
		leanRow{name: "lean: sequential read of a snapshot, 1 MiB, depth 4", bytes: true, columns: leanServers,
			job: load.Job{Block: 1 << 20, Depth: 4}, fill: halfFull, again: true, bars: costBars(0.85, 0.6, 1.05)}.row(),
	}
}
