package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// processRows are the rows that are not about throughput: how long a program takes, and what a process needs.
func processRows() []row {
	const n = 16 * million
	only := []string{ours}
	return []row{
		{name: "open a store of 16 M scattered exceptions (dmsnap status, whole process, from cache)", unit: "M exceptions/s",
			columns: only, run: openStore(n),
			bars: []bar{{text: "≥ 10 M exceptions a second", limit: 10}}},
		{name: "memory for 16 M scattered exceptions (serve, whole process)", unit: "bytes each", less: true,
			columns: only, run: memoryOf(n, true),
			bars: []bar{{text: "≤ 16 bytes each", limit: 16}}},
		{name: "memory for 16 M sequential exceptions (serve, whole process)", unit: "bytes each", less: true,
			columns: only, run: memoryOf(n, false), cleanup: dropStores,
			bars: []bar{{text: "≤ 0.25 bytes each above an empty server", figure: "above_empty", limit: 0.25}}},
		{name: "create for a 1 TiB origin (whole process)", unit: "ms", less: true,
			columns: only, run: createLarge,
			bars: []bar{{text: "≤ 5 ms", limit: 5}}},
		{name: "serve until the first reply (whole process)", unit: "ms", less: true,
			columns: []string{ours, qcow2, cow, file}, run: firstReply,
			bars: []bar{{text: "≤ 30 ms", limit: 30}}},
		{name: "1,000 forks of one base in one process", unit: "KiB each", less: true,
			columns: only, run: forks(1000), cleanup: func(l *lab) error { return os.RemoveAll(l.path("forks")) },
			bars: []bar{{text: "≤ 200 KiB each", limit: 200},
				{text: "idle CPU none (≤ 0.1 % of a core)", figure: "idle_percent", limit: 0.1}}},
	}
}

// openStore times dmsnap status, which loads the whole store. (serve drops what is cached of it first.)
func openStore(n uint64) func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
	return func(ctx context.Context, l *lab, _ contender, _ int) (sample, error) {
		_, cow, err := l.bigStore(ctx, n, true)
		if err != nil {
			return sample{}, err
		}
		began := time.Now()
		if err := command(ctx, l.binary, "status", cow); err != nil {
			return sample{}, err
		}
		took := time.Since(began).Seconds()
		return sample{Value: float64(n) / 1e6 / took, More: map[string]float64{"seconds": took}}, nil
	}
}

// rest is how long a server has before its memory is looked at: what loading needed for a while goes back meanwhile.
const rest = 2 * time.Second

// memoryOf serves a store and divides what the process has in memory by the exceptions. Beside it the same with what
// a server of an empty store has subtracted.
func memoryOf(n uint64, scattered bool) func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
	return func(ctx context.Context, l *lab, _ contender, _ int) (sample, error) {
		origin, cow, err := l.bigStore(ctx, n, scattered)
		if err != nil {
			return sample{}, err
		}
		whole, peak, err := l.residentOf(ctx, origin, cow)
		if err != nil {
			return sample{}, err
		}
		empty := l.path("empty.cow")
		if err := createDmsnap(ctx, l, origin, empty); err != nil {
			return sample{}, err
		}
		base, _, err := l.residentOf(ctx, origin, empty)
		if err := errors.Join(err, os.Remove(empty)); err != nil {
			return sample{}, err
		}
		return sample{Value: whole / float64(n), More: map[string]float64{
			"above_empty": (whole - base) / float64(n), "peak": peak / float64(n), "empty_mib": base / (1 << 20)}}, nil
	}
}

// residentOf returns what a server of one snapshot has in memory, and had at most, in bytes.
func (l *lab) residentOf(ctx context.Context, origin, cow string) (now, peak float64, err error) {
	s, err := l.start(ctx, func(socket string) []string { return serveDmsnap(l, origin, cow, socket) })
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	time.Sleep(rest)
	now, err = s.memory("VmRSS")
	if err != nil {
		return 0, 0, err
	}
	peak, err = s.memory("VmHWM")
	return now, peak, err
}

// memory returns a line of /proc/PID/status, in bytes.
func (s *server) memory(name string) (float64, error) {
	text := field(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid), name)
	kib, err := strconv.ParseFloat(strings.TrimSuffix(text, " kB"), 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return kib * 1024, nil
}

// createLarge makes a store for a sparse origin of 1 TiB, several times.
func createLarge(ctx context.Context, l *lab, c contender, _ int) (sample, error) {
	origin, image := l.path("large.img"), l.path("large.cow")
	if err := sparse(origin, 1<<40); err != nil {
		return sample{}, err
	}
	var took []float64
	for range 9 {
		began := time.Now()
		if err := c.create(ctx, l, origin, image); err != nil {
			return sample{}, err
		}
		took = append(took, float64(time.Since(began).Microseconds())/1000)
		if err := os.Remove(image); err != nil {
			return sample{}, err
		}
	}
	return sample{Value: median(took)}, os.Remove(origin)
}

// firstReply starts a server several times; each time counts from the start of the process.
func firstReply(ctx context.Context, l *lab, c contender, _ int) (sample, error) {
	var took []float64
	for range 9 {
		t, err := l.prepare(ctx, c, nil, false)
		if err != nil {
			return sample{}, err
		}
		took = append(took, float64(t.server.ready.Microseconds())/1000)
		if err := t.close(); err != nil {
			return sample{}, err
		}
	}
	return sample{Value: median(took)}, nil
}

// forks serves k snapshots of one origin in one process. The figure is what each adds to the memory of a server
// with one; idle_percent is the CPU time of the process over five seconds without requests.
func forks(k int) func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
	return func(ctx context.Context, l *lab, _ contender, _ int) (sample, error) {
		base, err := l.image("base.img", l.origin)
		if err != nil {
			return sample{}, err
		}
		l, err = l.in("forks", l.origin)
		if err != nil {
			return sample{}, err
		}
		one, _, err := l.forked(ctx, base, 1)
		if err != nil {
			return sample{}, err
		}
		all, idle, err := l.forked(ctx, base, k)
		return sample{Value: (all - one) / float64(k-1) / 1024, More: map[string]float64{"idle_percent": idle}}, err
	}
}

// forked returns the memory of a server of k snapshots in bytes, and the percentage of a core it needs for nothing.
func (l *lab) forked(ctx context.Context, base string, k int) (resident, idle float64, err error) {
	s, err := l.start(ctx, func(socket string) []string {
		a := []string{l.binary, "serve", base}
		for i := range k {
			a = append(a, l.path(fmt.Sprintf("f%d.cow", i)))
		}
		return append(a, "--create", "--socket", socket)
	})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	time.Sleep(rest)
	if resident, err = s.memory("VmRSS"); err != nil {
		return 0, 0, err
	}
	began := time.Now()
	before, err := s.busy()
	if err != nil {
		return 0, 0, err
	}
	time.Sleep(5 * time.Second)
	after, err := s.busy()
	return resident, 100 * (after - before).Seconds() / time.Since(began).Seconds(), err
}

// busy is the CPU time the process's threads have had. A thread that ended takes its time with it; the Go runtime
// keeps its own.
func (s *server) busy() (time.Duration, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", s.cmd.Process.Pid))
	if err != nil || len(tasks) == 0 {
		return 0, fmt.Errorf("no schedstat of the server's threads: %v", err)
	}
	var sum time.Duration
	for _, path := range tasks {
		b, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		first, _, _ := strings.Cut(string(b), " ")
		ns, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}
