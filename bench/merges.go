package main

import (
	"cmp"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// mergeOrigin and mergeBytes are the sizes of an offline merge.
const (
	mergeOrigin = 2 << 30
	mergeBytes  = 512 << 20
)

var (
	scattered  = &job{name: "scattered", rw: "randwrite", block: 4096, depth: 16, total: mergeBytes, sync: true, seed: 2}
	contiguous = &job{name: "contiguous", rw: "write", block: 64 << 10, depth: 8, size: mergeBytes, sync: true}
)

// in returns a lab in a directory of its own, with origins of another size.
func (l *lab) in(name string, origin int64) (*lab, error) {
	other := *l
	other.dir, other.origin = filepath.Join(l.dir, name), origin
	return &other, os.MkdirAll(other.dir, 0o755)
}

// mergeRow merges what fill wrote. The figure is MiB of changes a second, from the start of the program until its
// end, when all is durable.
func mergeRow(name string, fill *job, bars []bar) row {
	return row{name: name, unit: "MiB/s", columns: []string{ours, qcow2, qcow2by4, direct}, bars: bars,
		run: func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
			l, err := l.in("merge", mergeOrigin)
			if err != nil {
				return sample{}, err
			}
			took, err := l.mergeOffline(ctx, c, fill)
			return sample{Value: mergeBytes / (1 << 20) / took.Seconds()}, err
		},
		cleanup: func(l *lab) error { return os.RemoveAll(l.path("merge")) }}
}

// mergeOffline merges a copy of the overlay into the origin. That the origin has the merged content already, from
// the last round, makes no difference: everything is written.
func (l *lab) mergeOffline(ctx context.Context, c contender, fill *job) (time.Duration, error) {
	base, err := l.image("base.img", l.origin)
	if err != nil {
		return 0, err
	}
	made := c
	if c.key == direct { // it copies what dmsnap's overlay has
		made = find(ours)
	}
	kept, err := l.template(ctx, made, base, fill)
	if err != nil {
		return 0, err
	}
	image := l.path("merge.run")
	if err := copyImage(ctx, kept, image); err != nil {
		return 0, err
	}
	var exceptions []ondisk.Exception
	if c.key == direct {
		if exceptions, err = exceptionsOf(image); err != nil {
			return 0, err
		}
	}
	settle()
	began := time.Now()
	switch c.key {
	case ours:
		err = command(ctx, l.binary, "merge", base, image)
	case direct:
		err = copyInOrder(base, image, exceptions)
	default:
		err = command(ctx, "qemu-img", "commit", "-q", image)
	}
	return time.Since(began), err
}

// exceptionsOf reads the exceptions of a store with chunks of 4 KiB, in the order of the origin.
func exceptionsOf(path string) ([]ondisk.Exception, error) {
	cow, err := block.Open(path, block.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer cow.Close()
	l, err := ondisk.NewLayout(8)
	if err != nil {
		return nil, err
	}
	var all []ondisk.Exception
	for e, err := range store.Scan(cow, l) {
		if err != nil {
			return nil, err
		}
		if !e.IsEnd() {
			all = append(all, e.Exception)
		}
	}
	slices.SortFunc(all, func(a, b ondisk.Exception) int { return cmp.Compare(a.Old, b.Old) })
	return all, nil
}

// copyInOrder is the ceiling of a merge: the same bytes from the same places of one file to the same places of
// the other, in the order of the origin, neighbours together as far as 1 MiB, then one fsync.
func copyInOrder(origin, cow string, exceptions []ondisk.Exception) error {
	from, err := os.Open(cow)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(origin, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer to.Close()
	l := ondisk.Layout{ChunkSectors: 8}
	buf := make([]byte, 1<<20)
	most := len(buf) / int(l.ChunkBytes())
	for i := 0; i < len(exceptions); {
		e, n := exceptions[i], 1
		for i+n < len(exceptions) && n < most && exceptions[i+n].Old == e.Old+ondisk.OriginChunk(n) && exceptions[i+n].New == e.New+ondisk.COWChunk(n) {
			n++
		}
		b := buf[:int64(n)*l.ChunkBytes()]
		if _, err := from.ReadAt(b, l.COWOffset(e.New)); err != nil {
			return err
		}
		if _, err := to.WriteAt(b, l.OriginOffset(e.Old)); err != nil {
			return err
		}
		i += n
	}
	return to.Sync()
}

// liveMergeRow has clients read and write at random while their snapshot is merged below them.
func liveMergeRow() row {
	return row{name: "live merge of 512 MiB under 4 KiB random load, 70/30, depth 16", unit: "% of the rate without",
		columns: []string{ours}, run: liveMerge,
		bars: []bar{{text: "ends; load keeps ≥ 50 %", limit: 50}}}
}

func liveMerge(ctx context.Context, l *lab, _ contender, round int) (s sample, err error) {
	base, err := l.image("base.img", l.origin)
	if err != nil {
		return s, err
	}
	kept, err := l.template(ctx, find(ours), base, halfFull)
	if err != nil {
		return s, err
	}
	origin, err := l.image("own.img", l.origin) // any disk of that size will do to merge into
	if err != nil {
		return s, err
	}
	cow, control := l.path("live.run"), l.path("c.sock")
	if err := copyImage(ctx, kept, cow); err != nil {
		return s, err
	}
	srv, err := l.start(ctx, func(socket string) []string {
		return append(serveDmsnap(l, origin, cow, socket), "--control", control)
	})
	if err != nil {
		return s, err
	}
	t := &target{server: srv, uri: srv.uri("snap")}
	defer func() { err = errors.Join(err, t.close()) }()
	settle()
	load := job{rw: "randrw", block: 4096, depth: 16, mix: 70, timed: true, seed: 100 + round}
	alone, err := l.fio(ctx, load, t)
	if err != nil {
		return s, err
	}
	long := *l
	long.seconds = 600 // it is stopped when the merge is complete
	running, err := long.startFio(ctx, load, t)
	if err != nil {
		return s, err
	}
	began := time.Now()
	err = command(ctx, l.binary, "merge", "--control", control, "snap", "--wait")
	took := time.Since(began)
	beside, fioErr := running.interrupt()
	if err := errors.Join(err, fioErr); err != nil {
		return s, err
	}
	return sample{Value: 100 * beside.IOPS / alone.IOPS,
		More: map[string]float64{"iops_alone": alone.IOPS, "iops_beside": beside.IOPS, "seconds": took.Seconds()}}, nil
}

// interrupt ends a run of fio early; what it reports is of the time until then.
func (r *fioRun) interrupt() (fioResult, error) {
	r.cmd.Process.Signal(syscall.SIGINT)
	err := r.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) { // fio's status says that it was interrupted
		return fioResult{}, err
	}
	return parseFio(r.out.Bytes())
}
