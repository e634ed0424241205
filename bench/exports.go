package main

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// manyExports is how many connections and exports a row of many has.
const manyExports = 16

// exportRows have each connection on an export of its own.
func exportRows() []row {
	r := row{name: "16 connections on 16 exports, 4 KiB, mixed 70/30, depth 4 each", unit: "IOPS", columns: []string{ours, storageDaemon, storageDaemonBy4},
		bars: []bar{{text: "more than one connection has", figure: "to_one", more: true, limit: 1},
			{text: "p99 no worse than peers'", least: 1, peers: []string{storageDaemon, storageDaemonBy4}, figure: "p99"}}}
	r.run = func(ctx context.Context, l *lab, c contender, round int) (s sample, err error) {
		t, uris, err := l.serveMany(ctx, c)
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, t.close()) }()
		j := job{rw: "randrw", block: 4096, depth: 4, mix: 70, timed: true, latency: true, seed: 100 + round, size: originSize / 4}
		t.uri = uris[0]
		one, err := l.fio(ctx, j, t)
		if err != nil {
			return s, err
		}
		j.uris = uris
		err = t.costs(&s, func() (int64, error) { return l.fioSample(ctx, j, t, false, &s) })
		if err == nil {
			s.More["to_one"], s.More["one_iops"], s.More["one_p99"] = s.Value/one.IOPS, one.IOPS, one.P99
		}
		return s, err
	}
	return []row{r}
}

// serveMany serves overlays of one origin, each with an export of its own.
func (l *lab) serveMany(ctx context.Context, c contender) (*target, []string, error) {
	base, err := l.image("base.img", l.origin)
	if err != nil {
		return nil, nil, err
	}
	var images []string
	for i := range manyExports {
		image := l.path(fmt.Sprintf("%s%d.many", c.key, i))
		if err := os.Remove(image); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, nil, err
		}
		if err := c.create(ctx, l, base, image); err != nil {
			return nil, nil, err
		}
		images = append(images, image)
	}
	settle()
	s, err := l.start(ctx, func(socket string) []string {
		var a []string
		if c.key == ours {
			a = []string{l.binary, "serve", base, "--socket", socket}
			for i, image := range images {
				a = append(a, fmt.Sprintf("e%d=%s", i, image))
			}
			return a
		}
		a = []string{"qemu-storage-daemon", "--nbd-server", "addr.type=unix,addr.path=" + socket}
		for i, image := range images {
			a = append(a, "--blockdev", fmt.Sprintf("driver=file,node-name=f%d,filename=%s", i, image),
				"--blockdev", fmt.Sprintf("driver=qcow2,node-name=e%d,file=f%d", i, i),
				"--export", fmt.Sprintf("type=nbd,id=x%d,node-name=e%d,name=e%d,writable=on", i, i, i))
		}
		return a
	})
	if err != nil {
		return nil, nil, err
	}
	var uris []string
	for i := range manyExports {
		uris = append(uris, s.uri(fmt.Sprintf("e%d", i)))
	}
	return &target{server: s}, uris, nil
}
