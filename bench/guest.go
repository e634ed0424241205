package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	guest "github.com/dmsnap/dmsnap/test/kernel/job"
	uml "github.com/dmsnap/dmsnap/test/kernel/machine"
)

// boot starts a guest of user-mode Linux whose disk /dev/vda is t, over vhost-user. The guest sees the host's files, fio among
// them.
func (l *lab) boot(ctx context.Context, t *target) (*uml.Machine, error) {
	program := l.path("guest")
	if _, err := os.Stat(program); err != nil {
		if err := command(ctx, "env", "CGO_ENABLED=0", "go", "build", "-o", program, "./test/kernel/guest"); err != nil {
			return nil, err
		}
	}
	shim, err := uml.BuildShim(l.dir)
	if err != nil {
		l.say("user-mode Linux without the shim for long register states: %v", err)
	}
	dir := l.path("u")
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return nil, err
	}
	m, err := uml.UML(uml.Config{Guest: program, Shim: shim, Dir: dir, VhostUser: []string{t.server.socket}})
	if err != nil {
		return nil, err
	}
	got, err := m.Do(guest.Op{Do: guest.Module, Argv: []string{"virtio_blk"}},
		guest.Op{Do: guest.Until, Argv: []string{"ls", "/dev"}, Stdin: "vda", Seconds: 30})
	for _, r := range got {
		if r.Err != "" {
			err = errors.Join(err, errors.New(r.Err))
		}
	}
	if err != nil {
		m.Kill()
		return nil, fmt.Errorf("guest: %w\n%s", err, m.Console())
	}
	return m, nil
}

// guestRow is a row whose client is fio in a guest of user-mode Linux, over vhost-user.
func guestRow(name string, j job, fill *job, bars []bar) row {
	return row{name: name, unit: "IOPS", own: ourVhost, columns: []string{ourVhost, storageDaemon, storageDaemonBy4}, bars: bars,
		run: func(ctx context.Context, l *lab, c contender, round int) (s sample, err error) {
			if err := uml.HaveUML(); err != nil {
				return s, err
			}
			t, err := l.prepare(ctx, c, fill, false)
			if err != nil {
				return s, err
			}
			defer func() { err = errors.Join(err, t.close()) }()
			m, err := l.boot(ctx, t)
			if err != nil {
				return s, err
			}
			defer m.Kill()
			j := j
			j.seed = 100 + round
			args := append([]string{"fio"}, l.fioArgs(j, &target{path: "/dev/vda", mount: "/dev"})...)
			args[slices.Index(args, "--ioengine=psync")] = "--ioengine=libaio" // many requests at once
			err = t.costs(&s, func() (int64, error) {
				got, err := m.Do(guest.Op{Do: guest.Exec, Argv: args, Seconds: 120})
				if err != nil {
					return 0, err
				}
				if got[0].Err != "" || got[0].Code != 0 {
					return 0, fmt.Errorf("%s: %s: %s", strings.Join(args, " "), got[0].Err, got[0].Out)
				}
				r, err := parseFio([]byte(got[0].Out))
				s = r.sample(false)
				return r.Done, err
			})
			return s, err
		}}
}

// guestRows are the vhost-user rows with a real driver. The guest limits their rate, with any server.
func guestRows() []row {
	bars := []bar{{text: "CPU ≤ %g × qemu-storage-daemon", most: 0.5, peers: []string{storageDaemon}, figure: cpuFigure}}
	return []row{
		guestRow("vhost-user: fio in a guest: 4 KiB random read, depth 16",
			job{rw: "randread", block: 4096, depth: 16, timed: true}, halfFull, bars),
		guestRow("vhost-user: fio in a guest: 4 KiB random first write, depth 16",
			job{rw: "randwrite", block: 4096, depth: 16, limited: true}, nil, bars),
	}
}
