package main

import (
	"context"
	"errors"
	"os"
)

// openFuse shows a snapshot as a file.
func openFuse(ctx context.Context, l *lab, base, image string) (*target, error) {
	dir := l.path("f")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s, err := l.start(ctx, func(socket string) []string { return append(serveDmsnap(l, base, image, socket), "--fuse", dir) })
	if err != nil {
		return nil, err
	}
	return &target{server: s, path: dir + "/snap", mount: dir}, nil
}

// openNbdfuse shows an export of dmsnap as a file, by a program that is its client.
func openNbdfuse(ctx context.Context, l *lab, base, image string) (*target, error) {
	behind, err := l.start(ctx, func(socket string) []string { return serveDmsnap(l, base, image, socket) })
	if err != nil {
		return nil, err
	}
	dir := l.path("n")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, errors.Join(err, behind.stop())
	}
	s, err := l.startAt(ctx, l.path("none.sock"), func(string) error { return isThere(dir + "/nbd") }, func(string) []string {
		return []string{"nbdfuse", dir, "--unix", behind.socket}
	})
	if err != nil {
		return nil, errors.Join(err, behind.stop())
	}
	s.mount = dir
	return &target{server: s, behind: behind, path: dir + "/nbd", mount: dir}, nil
}

// fuseRows compare a file of dmsnap with one of nbdfuse over dmsnap's NBD.
func fuseRows() []row {
	columns := []string{ours, ourFuse, nbdfuse}
	faster := []bar{{text: "≥ 1.5 × nbdfuse over own NBD", least: 1.5, peers: []string{nbdfuse}}}
	near := []bar{{text: "≥ 0.8 × own NBD", least: 0.8, peers: []string{ours}}}
	return []row{
		fioRow{name: "FUSE: 4 KiB random read, 8 jobs, direct", own: ourFuse, columns: columns, bars: faster,
			job: job{rw: "randread", block: 4096, depth: 1, clients: 8, timed: true}, fill: halfFull}.row(),
		fioRow{name: "FUSE: 4 KiB random write, 8 jobs, direct", own: ourFuse, columns: columns, bars: faster,
			job: job{rw: "randwrite", block: 4096, depth: 1, clients: 8, timed: true}, fill: halfFull, changes: true}.row(),
		fioRow{name: "FUSE: sequential read, 1 MiB", own: ourFuse, columns: columns, bytes: true, bars: near,
			job: job{rw: "read", block: 1 << 20, depth: 1, timed: true}, fill: halfFull}.row(),
		fioRow{name: "FUSE: sequential write, 1 MiB", own: ourFuse, columns: columns, bytes: true, bars: near,
			job: job{rw: "write", block: 1 << 20, depth: 1}}.row(),
	}
}
