package main

import (
	"context"
	"errors"
	"os"
)

// The columns of rows that read a disk which is not a raw file.
const (
	qemuRead  = "qemu-nbd"
	nbdPlugin = "nbdkit-nbd"
)

// sourceContenders serve a disk that is named: a qcow2 image, or the export of another server.
var sourceContenders = []contender{
	{key: qemuRead, title: "qemu-nbd", needs: "qemu-nbd",
		serve: func(l *lab, base, image, socket string) []string {
			return []string{"qemu-nbd", "-r", "-t", "-e", "64", "-f", "qcow2", "-k", socket, image}
		}},
	{key: nbdPlugin, title: "nbdkit nbd", needs: "nbdkit",
		serve: func(l *lab, base, image, socket string) []string {
			return []string{"nbdkit", "-f", "-U", socket, "nbd", "uri=" + image, "shared=true"}
		}},
}

// sourceRow is a row whose disk is what image returns: a file or a URI, and what ends its server.
func sourceRow(name string, j job, peer string, bars []bar, image func(ctx context.Context, l *lab) (string, func() error, error)) row {
	r := row{name: name, unit: "IOPS", columns: []string{ours, peer}, bars: bars}
	bytes := j.rw == "read"
	if bytes {
		r.unit = "MiB/s"
	}
	r.run = func(ctx context.Context, l *lab, c contender, round int) (s sample, err error) {
		disk, end, err := image(ctx, l)
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, end()) }()
		if c.key == ours {
			c = find(ourRaw) // an origin without snapshots
			// The store records the format of its origin, which differs between these rows.
			defer os.Remove(l.path("none.cow"))
		}
		t, err := l.open(ctx, c, "", disk)
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, t.close()) }()
		j := j
		j.seed = 100 + round
		err = t.costs(&s, func() (int64, error) { return l.fioSample(ctx, j, t, bytes, &s) })
		return s, err
	}
	return r
}

// qcow2Image returns a qcow2 image of the origin, with all clusters allocated. It is made once.
func qcow2Image(ctx context.Context, l *lab) (string, func() error, error) {
	none := func() error { return nil }
	path := l.path("source.qcow2")
	if _, err := os.Stat(path); err == nil {
		return path, none, warm(path)
	}
	base, err := l.image("base.img", l.origin)
	if err != nil {
		return "", nil, err
	}
	if err := command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, path); err != nil {
		return "", nil, err
	}
	settle()
	return path, none, warm(path)
}

// nbdExport serves the origin by nbdkit, and returns the URI.
func nbdExport(ctx context.Context, l *lab) (string, func() error, error) {
	base, err := l.image("base.img", l.origin)
	if err != nil {
		return "", nil, err
	}
	socket := l.path("up.sock")
	s, err := l.startAt(ctx, socket, greeting, func(socket string) []string {
		return []string{"nbdkit", "-f", "-r", "-U", socket, "file", base}
	})
	if err != nil {
		return "", nil, err
	}
	return s.uri(""), s.stop, nil
}

// sourceRows are reads of disks that are not raw files.
func sourceRows() []row {
	random := job{rw: "randread", block: 4096, depth: 16, timed: true}
	sequential := job{rw: "read", block: 1 << 20, depth: 4, timed: true}
	bars := []bar{{text: "≥ 1.2 × qemu-nbd", least: 1.2, peers: []string{qemuRead}}}
	return []row{
		sourceRow("4 KiB random read of a qcow2 image, depth 16", random, qemuRead, bars, qcow2Image),
		sourceRow("sequential read of a qcow2 image, 1 MiB, depth 4", sequential, qemuRead, bars, qcow2Image),
		sourceRow("4 KiB random read of an NBD export, depth 16", random, nbdPlugin, nil, nbdExport),
		sourceRow("sequential read of an NBD export, 1 MiB, depth 4", sequential, nbdPlugin, nil, nbdExport),
	}
}
