package main

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// originRow writes to the origin while k snapshots keep what it overwrites. The other columns write the same
// blocks to a disk without snapshots.
func originRow(name string, k int, least float64) row {
	r := row{name: name, unit: "IOPS", columns: []string{ours, ourRaw, file, direct},
		bars: []bar{{text: "≥ %g × own raw export", least: least, peers: []string{ourRaw}}}}
	r.run = func(ctx context.Context, l *lab, c contender, round int) (s sample, err error) {
		var t *target
		if c.key == ours {
			t, err = l.serveOrigin(ctx, k)
		} else {
			t, err = l.prepare(ctx, c, nil, false)
		}
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, t.close()) }()
		// Each block is written once, so each write has to be kept first.
		j := job{rw: "randwrite", block: 4096, depth: 16, limited: true, seed: 100 + round}
		err = t.costs(&s, func() (int64, error) { return l.fioSample(ctx, j, t, false, &s) })
		return s, err
	}
	return r
}

// serveOrigin serves an origin with k empty snapshots; the target is the origin.
func (l *lab) serveOrigin(ctx context.Context, k int) (*target, error) {
	image, err := l.image("own.img", l.origin)
	if err != nil {
		return nil, err
	}
	var cows []string
	for i := range k {
		cow := l.path(fmt.Sprintf("own%d.cow", i))
		if err := os.Remove(cow); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := createDmsnap(ctx, l, image, cow); err != nil {
			return nil, err
		}
		cows = append(cows, cow)
	}
	settle()
	s, err := l.start(ctx, func(socket string) []string {
		a := append([]string{l.binary, "serve", image}, cows...)
		return append(a, "--export-origin", "--socket", socket)
	})
	if err != nil {
		return nil, err
	}
	return &target{server: s, export: "origin", uri: s.uri("origin")}, nil
}
