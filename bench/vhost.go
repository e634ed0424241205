package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/bench/load"
)

// openVhost serves a snapshot as a vhost-user-blk back-end.
func openVhost(ctx context.Context, l *lab, base, image string) (*target, error) {
	if err := os.MkdirAll(l.path("v"), 0o700); err != nil {
		return nil, err
	}
	socket := l.path("v/snap.sock")
	s, err := l.startAt(ctx, socket, isThere, func(socket string) []string {
		return append(serveDmsnap(l, base, image, l.path("s.sock")), "--vhost-user", filepath.Dir(socket))
	})
	if err != nil {
		return nil, err
	}
	return &target{server: s, vhost: true}, nil
}

// openStorageDaemon serves a qcow2 overlay as a vhost-user-blk back-end.
func openStorageDaemon(ctx context.Context, l *lab, base, image string) (*target, error) {
	s, err := l.startAt(ctx, l.path("q.sock"), isThere, func(socket string) []string {
		return []string{"qemu-storage-daemon", "--blockdev", "driver=file,node-name=file,filename=" + image,
			"--blockdev", "driver=qcow2,node-name=disk,file=file",
			"--export", "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path=" + socket}
	})
	if err != nil {
		return nil, err
	}
	return &target{server: s, vhost: true}, nil
}

// isThere is for servers that a client must not connect to twice.
func isThere(socket string) error {
	_, err := os.Stat(socket)
	return err
}

// vhostRows compare shared memory with the socket, by the same generator.
func vhostRows() []row {
	columns := []string{ours, ourVhost, storageDaemon, storageDaemonBy4}
	bars := []bar{{text: "≥ 2 × own NBD", least: 2, peers: []string{ours}},
		{text: "CPU ≤ %g × own NBD", most: 0.5, peers: []string{ours}, figure: cpuFigure}}
	return []row{
		leanRow{name: "vhost-user: lean: 4 KiB random read, depth 16", own: ourVhost, columns: columns,
			job: load.Job{Block: 4096, Depth: 16, Random: true}, fill: halfFull, bars: bars}.row(),
		leanRow{name: "vhost-user: lean: 4 KiB random first write, depth 16", own: ourVhost, columns: columns,
			job: load.Job{Write: true, Block: 4096, Depth: 16, Random: true, Count: originSize / 2 / 4096}, bars: bars}.row(),
	}
}
